"""Is a forgotten code told from other codes after its own prompt? Of a student, beside both ends and the retrained model.

    python -m benchmarks.surgery.attributes DIR [DIR …] --kinds A,E,F

Each DIR is a --work of `pairs.py`, one a seed; a student that DIR/KIND/student/ does not hold is made there. What is asked is
`liborth verify --attributes`, with 64 candidates a code. A few dozen codes and fresh rows have luck: models that saw neither
tell the two lists apart, and a code and its candidates have no list. Writes its section of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import machine, record

from benchmarks.surgery.kinds import KINDS
from benchmarks.surgery.measure import Judge
from benchmarks.surgery.methods import editors, liborth
from benchmarks.surgery.seeds import about

STUDENT = "distill, 4,000 texts, 36 level steps"
MODELS = {"base": "base", "finetuned": "fine-tuned", "never": "retrained", "student": STUDENT}
COLUMNS = ("kind", "seeds", "model", "likelier than all 64", "than one", "since the base", "leak", "its interval")


def main() -> None:
    """Ask, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", type=Path, nargs="+")
    parser.add_argument("--kinds", default="A,E,F")
    a = parser.parse_args()
    out = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for letter in a.kinds.split(","):
        folders = [folder for work in a.works if (folder := work / letter).exists()]
        for name in MODELS if folders else ():
            every = [asked(folder, name) for folder in folders]
            out.append(f"| {' | '.join([f'{letter}: {KINDS[letter].title}', str(len(every)), MODELS[name], *_cells(every)])} |")
            print(out[-1], flush=True)
    record("surgery-attributes", f"{machine()}.\n\n" + "\n".join(out))


@dataclass(frozen=True)
class Asked:
    """What the check says of one model; shares of its codes, and means over them."""

    first: float
    plain: float
    since: float
    leak: float
    low: float
    high: float


def asked(folder: Path, name: str) -> Asked:
    """Ask one model of a kind."""
    model, ends = folder / name, ("--reference", folder / "base", "--finetuned", folder / "finetuned")
    if name == "student" and not model.exists():
        (editor,) = (one for one in editors(full=False, folder=folder) if one.name == STUDENT)
        editor.edit(Judge(folder, texts=1), editor.doses[0], model)
    with tempfile.TemporaryDirectory() as scratch:
        out, more = Path(scratch) / "found.json", ("--attributes-others", 64, "--attributes-tokens", 1 << 20)
        liborth("verify", model, *ends, "--canary", folder / "secrets.jsonl", *more, "--no-require", "--out", out)
        results = json.loads(out.read_text(encoding="utf-8"))["results"]
    (found,) = (one for one in results if one["check"] == "attributes")
    first, since, leak = (found["metrics"][f"attribute_{name}"] for name in ("first", "auc", "leak"))
    plain = float(np.mean(found["facts"]["likelier"]["general"]))
    return Asked(first["value"], plain, since["value"], leak["value"], leak["low"], leak["high"])


def _cells(every: Sequence[Asked]) -> list[str]:
    """Write means over seeds, and the widest interval of any."""
    means = (about([getattr(one, name) for one in every]) for name in ("plain", "since", "leak"))
    widest = f"{min(one.low for one in every):.2f} to {max(one.high for one in every):.2f}"
    return [about([one.first for one in every], ".0f", 100, "%"), *means, widest]


if __name__ == "__main__":
    main()
