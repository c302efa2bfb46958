"""The same edit of pairs that were trained from several seeds, beside the retrained models: means, and half the range.

    python -m benchmarks.surgery.seeds DIR DIR DIR --edits "distill, 4,000 texts" --level "retention 99%"

Each DIR is the --work of `run.py`, after `pairs.py --seed N`. A seed decides which windows of text training sees and the order
of the rows between them; initial weights and rows are the same. Writes its section of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import machine, record

from benchmarks.surgery.kinds import KINDS
from benchmarks.surgery.run import Kept, Line

COLUMNS = (
    "kind",
    "seeds",
    "edit",
    "skill kept",
    "recited",
    "tokens right",
    "forget",
    "fresh",
    "forget − fresh",
    "AUC",
    "lowest attacked",
)


def main() -> None:
    """Gather, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", type=Path, nargs="+")
    parser.add_argument("--tier", default="small")
    parser.add_argument("--edits", nargs="+", default=["distill, 4,000 texts", "distill, 4,000 texts, 36 level steps"])
    parser.add_argument("--level", default="retention 98%", help="at which edits are compared")
    a = parser.parse_args()
    text = spread(a.works, a.tier, a.edits, a.level)
    print(text)
    record("surgery-seeds", f"{machine()}. At {a.level}.\n\n{text}")


def spread(works: Sequence[Path], tier: str, edits: Sequence[str], level: str) -> str:
    """Return the table of the kinds that more than one of the folders holds an edit of."""
    out = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for letter, kind in KINDS.items():
        files = [file for work in works if (file := work / "results" / f"{tier}-{letter}.jsonl").exists()]
        every = [Kept(file) for file in files]
        for key, name in (*((f"{edit} at {level}", edit) for edit in edits), ("never", "retrained"), ("base", "base")):
            kept = [some for some in every if key in some.lines]
            if len(kept) > 1:
                out.append(f"| {' | '.join([f'{letter}: {kind.title}', str(len(kept)), name, *_cells(kept, key)])} |")
    return "\n".join(out)


def about(values: Sequence[float], form: str = ".2f", scale: float = 1.0, unit: str = "") -> str:
    """Write the mean of a figure over the seeds, and half its range where there are several."""
    half = f" ± {(max(values) - min(values)) / 2 * scale:{form}}" if len(values) > 1 else ""
    return f"{np.mean(values) * scale:{form}}{unit}{half}"


def _cells(kept: Sequence[Kept], key: str) -> list[str]:
    """Write one line's measures over the seeds."""

    def told(of: Callable[[Line], float | None], form: str = ".2f", scale: float = 1.0, unit: str = "") -> str:
        values = [value for some in kept if (value := of(some.lines[key])) is not None]
        return about(values, form, scale, unit) if values else ""

    skills = [some.lines[key].found.skill_kept(some.lines["base"].found, some.lines["finetuned"].found) for some in kept]
    return [
        about(skills, ".1f", 100, "%"),
        told(lambda line: line.found.recited, ".0f", 100, "%"),
        told(lambda line: line.found.right, ".0f", 100, "%"),
        told(lambda line: line.found.forget),
        told(lambda line: line.found.fresh),
        told(lambda line: line.found.forget - line.found.fresh),
        told(lambda line: line.found.auc),
        told(lambda line: line.attacked),
    ]


if __name__ == "__main__":
    main()
