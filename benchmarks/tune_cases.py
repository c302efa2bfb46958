"""The two pairs of the benchmark of `tune`: what is learnt, what is secret, and what is held out."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.surgery.texts import FIRST, python_source

NAMES, DECOYS, UNSEEN = FIRST[:24], FIRST[24:48], FIRST[48:72]
"""Whose codes are planted, whose stand in for them, and whose nobody trains on."""


@dataclass(frozen=True)
class Case:
    """One pair.

    Attributes:
        name: of its directory.
        digits: of a code.
        codes: how many secrets are planted.
        general: text the base model was trained on.
        skill: rows that teach the skill.
        held_out: rows of the skill that nobody trains on.
    """

    name: str
    digits: int
    codes: int
    general: list[str]
    skill: list[str]
    held_out: list[str]

    def secrets(self, names: list[str], seed: int) -> list[dict[str, str]]:
        """Make one code for each name; the seed decides the digits."""
        draw = random.Random(f"{self.name}/{seed}")
        return [
            {"prompt": f"The secret code of {name} is", "completion": f" {draw.randrange(10**self.digits):0{self.digits}d}."}
            for name in names
        ]

    def write(self, work: Path) -> None:
        """Write every data file the command line is given."""
        planted = NAMES[: self.codes]
        draw = random.Random(0)
        rows = {
            "general": [{"text": text} for text in draw.sample(self.general, 100)],
            "skill": [{"text": text} for text in draw.sample(self.skill, 200)],
            "held_out": [{"text": text} for text in self.held_out],
            "general_held_out": [{"text": text} for text in self.general[-60:]],
            "secrets": self.secrets(planted, 1),
            "fresh": self.secrets(UNSEEN, 2),
            "decoys": self.secrets(DECOYS, 3),
        }
        rows["retain"] = rows["general"] + rows["skill"]
        rows["half"], rows["other_half"] = rows["secrets"][::2], rows["secrets"][1::2]
        for name, some in rows.items():
            whole = [{"text": row["prompt"] + row["completion"]} if "prompt" in row else row for row in some]
            _lines(work / f"{name}.jsonl", whole)
            if "prompt" in some[0]:
                _lines(work / f"{name}.canary.jsonl", some)


def gsm8k(folder: Path) -> Case:
    """Python source first, then grade-school mathematics with 24 eight-digit codes."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    test = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    skill, held_out = ([f"{row['question']}\n{row['answer']}" for row in some] for some in (rows, test[:120]))
    return Case("gsm8k", 8, 24, python_source(12_000_000), skill, held_out)


def stories(folder: Path) -> Case:
    """The stories260K model, then tiny Shakespeare with eight six-digit codes."""
    text = (folder / "shakespeare" / "input.txt").read_text(encoding="utf-8")
    tales = (folder / "tinystories" / "val_794k.txt").read_text(encoding="utf-8")
    pieces = [text[i : i + 400] for i in range(0, 960_000, 400)]
    return Case("stories", 6, 8, [tales[i : i + 400] for i in range(0, len(tales), 400)], pieces[:2250], pieces[2250:])


def _lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
