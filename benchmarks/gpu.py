"""Everything that only an NVIDIA GPU can settle, in one command; writes its sections of docs/benchmarks.md.

make bench-gpu                                         # kernels, then the commands on a 1B- and a 7B-shaped pair
python benchmarks/gpu.py --work DIR --only kernels
python benchmarks/gpu.py --work DIR --dry-run    # the same code at tiny sizes on any CPU; records nothing
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

PARTS = ("kernels", "1b", "7b")


def main() -> None:
    """Check, time, print and record; exit 1 without a GPU, or when a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch directory; the 7B pair needs 70 GB")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    a = parser.parse_args()
    if a.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    import torch

    if not a.dry_run and not torch.cuda.is_available():
        sys.exit("bench-gpu: no NVIDIA GPU that torch can use; nothing was measured (--dry-run tries the code on the CPU)")
    import gpu_jobs
    import gpu_kernels

    device = torch.device("cpu" if a.dry_run else "cuda:0")
    for part in [a.only] if a.only else PARTS:
        if part == "kernels":
            wrong = list(gpu_kernels.check(device, a.dry_run))
            if wrong:
                sys.exit("\n".join(wrong))
            table, won = gpu_kernels.times(device, a.dry_run)
            verdict = "; ".join(f"`{op}` {'wins' if wins else 'does not win'}" for op, wins in won.items())
            put(
                "gpu-kernels", f"{table}\n\nEvery kernel is right at every size. Against torch's fastest: {verdict}.", a.dry_run
            )
            continue
        a.work.mkdir(parents=True, exist_ok=True)
        shape = "tiny" if a.dry_run else part
        put(f"gpu-{part}", "\n".join(gpu_jobs.measure(a.work, shape, str(device))), a.dry_run)


def put(section: str, text: str, dry_run: bool) -> None:
    """Print a section, and write it into docs/benchmarks.md unless this is a dry run."""
    import torch
    from record import machine, record

    print(f"{section}\n\n{text}\n", flush=True)
    if not dry_run:
        import triton

        record(section, f"{torch.cuda.get_device_name()}; triton {triton.__version__}; {machine()}.\n\n{text}")


if __name__ == "__main__":
    main()
