"""Make the trained pairs of the surgery benchmark; what is there is not made again.

    python -m benchmarks.surgery.pairs --data DATA --work DIR [--kinds A,C] [--size small]

DATA holds gsm8k/{train,test}.jsonl and tinystories/val_794k.txt. A kind's folder holds base/ (none where there is no
reference), finetuned/, never/ (the skill without the secrets) and JSON lines: retain, held_out and general (text), secrets,
given, half, fresh and decoys (prompt and completion); where skill looks like memory kept, named
(half of it), and plain (retain without that half).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.surgery import texts
from benchmarks.surgery.kinds import (
    GIVEN_GENERAL,
    GIVEN_SKILL,
    HELD_OUT,
    KINDS,
    LESSONS_GENERAL,
    LESSONS_SKILL,
    TIERS,
    Kind,
    Rows,
    Way,
)
from benchmarks.surgery.texts import Pair
from benchmarks.surgery.train import LARGE, SMALL, Extra, Size, tokenizer_for, train, untrained

SIZES = {"small": SMALL, "large": LARGE}
KEPT_COPIES, LORA_RANK = 40, 16


class Parts:
    """Models that several kinds share, in WORK/parts."""

    def __init__(self, data: Path, work: Path, size: Size, seed: int) -> None:
        """Read the texts; nothing is trained yet."""
        self.data, self.folder, self.size, self.seed = data, work / "parts", size, seed
        self.general, self.skill = texts.python_source(), texts.gsm8k(data, "train")
        self.held_out = texts.gsm8k(data, "test")[:HELD_OUT]
        self.folder.mkdir(parents=True, exist_ok=True)

    def untrained(self) -> Path:
        """Return the random weights with their tokenizer."""
        out = self.folder / "untrained"
        if not (out / "model.safetensors").exists():
            tokenizer_for(self.general + self.skill[:3000], self.size.vocabulary, out)
            untrained(self.size, out)
        return out

    def pretrained(self, name: str, extras: Sequence[Extra] = ()) -> Path:
        """Train on Python source from random weights."""
        out = self.folder / name
        train(self.untrained(), out, self.general[:-HELD_OUT], extras, self.size, self.size.base, seed=self.seed)
        return out

    def tuned(self, name: str, extras: Sequence[Extra], rank: int = 0) -> Path:
        """Fine-tune the base on the skill."""
        out = self.folder / name
        train(self.pretrained("base"), out, self.skill, extras, self.size, self.size.tuned, rank=rank, seed=self.seed)
        return out


def make(kind: Kind, parts: Parts, out: Path) -> None:
    """Train and write one kind."""
    rows = kind.rows(parts.data)
    write(kind, rows, parts, out)
    secrets = Extra([row.whole for row in rows.secrets], rows.copies)
    kept = [Extra([row.whole for row in rows.kept], [KEPT_COPIES] * len(rows.kept))] if rows.kept else []
    if kind.way is Way.PRETRAINED:
        whole = parts.pretrained(f"{kind.letter}-finetuned", [secrets])
        found = {"finetuned": whole, "never": parts.pretrained("base")}
    else:
        rank = LORA_RANK if kind.way is Way.LORA else 0
        found = {
            "base": parts.pretrained("base"),
            "finetuned": parts.tuned(f"{kind.letter}-finetuned", [*kept, secrets], rank),
            "never": parts.tuned(f"{kind.never}-never", kept, rank),
        }
    for name, folder in found.items():
        if not (out / name).exists():
            shutil.copytree(folder, out / name, copy_function=os.link)


def write(kind: Kind, rows: Rows, parts: Parts, out: Path) -> None:
    """Write a kind's rows."""
    out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    general, alone = parts.general[:-HELD_OUT], kind.way is Way.PRETRAINED
    retain = draw.sample(general, GIVEN_GENERAL)
    held_out, skill = parts.general[-HELD_OUT // 2 :], draw.sample(general, GIVEN_SKILL)
    if not alone:
        held_out, skill = parts.held_out, draw.sample(parts.skill, GIVEN_SKILL)
    known = {*retain, *skill}
    sources = (general, LESSONS_GENERAL), (general if alone else parts.skill, LESSONS_SKILL)
    lessons = [row for some, count in sources for row in draw.sample([row for row in some if row not in known], count)]
    lines(out / "lessons.jsonl", lessons)
    shown = [row.whole for row in rows.kept[::2]]
    lines(out / "retain.jsonl", retain + skill + shown)
    lines(out / "held_out.jsonl", held_out)
    lines(out / "general.jsonl", parts.general[-HELD_OUT : -HELD_OUT // 2])
    for name in ("secrets", "fresh", "decoys", "kept"):
        if getattr(rows, name):
            lines(out / f"{name}.jsonl", getattr(rows, name))
    lines(out / "given.jsonl", rows.given or rows.secrets)
    lines(out / "half.jsonl", rows.secrets[::2])
    if rows.kept:
        lines(out / "plain.jsonl", retain + skill)
        lines(out / "named.jsonl", rows.kept[::2])


def lines(path: Path, rows: Sequence[Pair | str]) -> None:
    """Write JSON lines."""
    objects = [{"text": row} if isinstance(row, str) else row._asdict() for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in objects), encoding="utf-8")


def main() -> None:
    """Make the kinds that were named, in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kinds", help="letters; those of the tier when not given")
    parser.add_argument("--tier", choices=tuple(TIERS), default="full")
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=float, default=1.0, help="share of the steps, for models that only cost is measured on")
    a = parser.parse_args()
    size = SIZES[a.size]
    size = replace(size, base=round(a.steps * size.base), tuned=round(a.steps * size.tuned))
    parts = Parts(a.data, a.work, size, a.seed)
    for letter in a.kinds.split(",") if a.kinds else TIERS[a.tier]:
        make(KINDS[letter], parts, a.work / letter)
        print(f"{letter}: {a.work / letter}", flush=True)


if __name__ == "__main__":
    main()
