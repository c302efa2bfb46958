"""Peak memory and time of split and excise at three depths: the widths are the same, the models 6, 12 and 24 layers deep.

make bench-memory
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from make_pair import make_pair
from measure import LIBORTH, clear, run
from record import machine, record

DEPTHS = (6, 12, 24)
TOLERANCE = 1.10
"""The deepest may need this much of what the shallowest needs."""


def main() -> None:
    """Measure, print, record, and fail when memory grows with depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    a = parser.parse_args()
    lines = ["| job | " + " | ".join(f"{depth} layers" for depth in DEPTHS) + " |", "|---|" + "---|" * len(DEPTHS)]
    jobs: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    sizes = []
    for depth in DEPTHS:
        pair, out = a.work / f"pair{depth}", a.work / "out"
        if not (pair / "finetuned").exists():
            make_pair(pair, torch.bfloat16, hidden=768, intermediate=2048, layers=depth, vocabulary=8000, keys=768, shards=3)
        sizes.append(sum(f.stat().st_size for f in (pair / "finetuned").iterdir()) / 1e6)
        sides = [str(pair / "base"), str(pair / "finetuned")]
        commands = {
            "split --method svd --rank 64": [LIBORTH, "split", *sides, "--rank", "64", "-o", str(out)],
            "excise --beta 0.7": [LIBORTH, "excise", str(out), "--beta", "0.7", "-o", str(a.work / "mixed")],
            "split --method magnitude --energy 0.5": [
                LIBORTH, "split", *sides, "--method", "magnitude", "--energy", "0.5", "-o", str(a.work / "magnitude"),
            ],
        }  # fmt: skip
        for job, command in commands.items():
            found = run(command)
            jobs.setdefault(job, []).append(found.anonymous_mib)
            seconds.setdefault(job, []).append(found.cpu_seconds)
            print(depth, job, found, flush=True)
        clear(out, a.work / "mixed", a.work / "magnitude")
    lines.append("| size of one checkpoint, MB | " + " | ".join(f"{size:.0f}" for size in sizes) + " |")
    lines += [f"| `{job}` | " + " | ".join(f"{peak:.0f}" for peak in peaks) + " |" for job, peaks in jobs.items()]
    lines += [
        f"| `{job}`, processor seconds | " + " | ".join(f"{time:.1f}" for time in times) + " |"
        for job, times in seconds.items()
    ]
    grown = [job for job, peaks in jobs.items() if peaks[-1] > TOLERANCE * peaks[0]]
    verdict = f"Grows with depth: {', '.join(grown)}." if grown else "None grows with depth by more than a tenth."
    table = "\n".join(lines)
    head = f"{machine()}. Peak anonymous resident memory, MiB; once each, processors allowed: {len(os.sched_getaffinity(0))}."
    record("memory", f"{head}\n\n{table}\n\n{verdict}\n")
    print(table, verdict, sep="\n")
    if grown:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
