"""Everything that only an NVIDIA GPU can settle, in one command; writes its sections of docs/benchmarks.md.

make bench-gpu                                                     # all parts, in 8 minutes
python benchmarks/gpu.py --work DIR --only kernels,curvature       # some
python benchmarks/gpu.py --work DIR --minutes 3 --brief --profile  # what matters most, and where its time goes
python benchmarks/gpu.py --work DIR --dry-run                      # the same code at tiny sizes on any CPU; records nothing

Everything is printed as soon as it is known. Where a part fails, or is not done in time, the next begins.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from gpu_parts import PARTS, Asked
from record import machine, record, standing

CUT = "Cut off before its end; this is what it had measured."
OPEN = re.compile(f"Not yet measured|{re.escape(CUT)}")
"""Sections that may be replaced by what a part had measured when it was cut off."""
SLACK = 20.0
"""Seconds beyond its time after which a part that does not stop by itself is killed."""


def main() -> None:
    """Run the parts, print and record; exit 1 without a GPU, or when a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch directory; the 7B pair needs 60 GB")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between: " + ", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--brief", action="store_true", help="kernels at fewer sizes")
    parser.add_argument("--profile", action="store_true", help="also say where the time goes")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    a = parser.parse_args()
    end = time.monotonic() + 60 * a.minutes
    parts = a.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        sys.exit(f"bench-gpu: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if a.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    import torch

    if not a.dry_run and not torch.cuda.is_available():
        sys.exit("bench-gpu: no NVIDIA GPU that torch can use; nothing was measured (--dry-run tries the code on the CPU)")
    a.work.mkdir(parents=True, exist_ok=True)
    results = a.work / "results"
    results.mkdir(exist_ok=True)
    for left in results.iterdir():
        left.unlink()
    asked = Asked(a.work, "cpu" if a.dry_run else "cuda", a.brief, a.profile, a.dry_run)
    failed = run(parts, asked, results, end)
    for part in () if a.dry_run else parts:
        whole, cut = results / f"{part}.md", results / f"{part}.cut"
        if whole.exists():
            put(f"gpu-{part}", whole.read_text(encoding="utf-8"))
        elif cut.exists() and OPEN.search(standing(f"gpu-{part}")):
            put(f"gpu-{part}", f"{CUT}\n\n{cut.read_text(encoding='utf-8')}")
    if failed:
        sys.exit(f"bench-gpu: not done: {', '.join(failed)}")


def run(parts: list[str], asked: Asked, results: Path, end: float) -> list[str]:
    """Run parts in one process, and in a new one what is left when that dies or hangs; return those that failed."""
    failed, rest = [], list(parts)
    while rest:
        if (left := end - time.monotonic()) < 5:
            return failed + rest
        words = asked.words(rest, left)
        child = subprocess.Popen([sys.executable, "-u", str(Path(__file__).with_name("gpu_parts.py")), *words])
        while child.poll() is None:
            time.sleep(0.2)
            now = results / "now"
            if now.exists():
                part, _, until = now.read_text().partition(" ")
                late = until and time.time() > float(until) + SLACK
                if late or time.monotonic() > end + SLACK:
                    print(f"== {part}: does not stop, and is killed", flush=True)
                    child.kill()
                    child.wait()
        done = {file.stem for file in results.glob("*.md")} | {file.stem for file in results.glob("*.failed")}
        finished = [part for part in rest if part in done]
        failed += [part for part in finished if not (results / f"{part}.md").exists()]
        rest = [part for part in rest if part not in done]
        if rest and child.returncode:
            failed.append(rest.pop(0))  # where it died
    return failed


def put(section: str, text: str) -> None:
    """Write a section into docs/benchmarks.md."""
    import torch
    import triton

    when = time.strftime("%Y-%m-%d")
    record(section, f"{torch.cuda.get_device_name()}; triton {triton.__version__}; {machine()}; {when}.\n\n{text}")


if __name__ == "__main__":
    main()
