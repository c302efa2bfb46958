"""Peak memory of a streamed estimate at three depths of one width; block inputs wait in a scratch file.

make bench-curvature-memory
"""

from __future__ import annotations

import argparse
from pathlib import Path

from curvature_jobs import make
from curvature_peers import run
from memory import DEPTHS, TOLERANCE
from record import machine, record


def main() -> None:
    """Measure, record, print, and fail when memory grows with depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    asked = parser.parse_args()
    sizes, peaks = [], []
    for depth in DEPTHS:
        model = asked.work / f"model{depth}"
        if not (model / "tokens.npy").exists():
            make(model, depth, width=512, inner=1408, vocabulary=8000, tokens=1024, length=256)
        sizes.append((model / "model.safetensors").stat().st_size / 1e6)
        peaks.append(run("streamed", model)["mib"])
        print(depth, round(peaks[-1]), flush=True)
    rows = [
        ["", *(f"{depth} layers" for depth in DEPTHS)],
        ["---"] * (len(DEPTHS) + 1),
        ["size of the checkpoint, MB", *(f"{size:.0f}" for size in sizes)],
        ["peak resident memory, MiB", *(f"{peak:.0f}" for peak in peaks)],
    ]
    growth = max(peaks) / min(peaks)
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    record("curvature-memory", f"{machine()}.\n\n{text}\n\nLargest over smallest: {growth:.2f} (goal: at most {TOLERANCE}).\n")
    if growth > TOLERANCE:
        raise SystemExit(f"memory grows with depth: {growth:.2f}")


if __name__ == "__main__":
    main()
