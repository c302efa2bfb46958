"""The kinds of memory: what is planted, how often, and the rows that a split, an attack and a judge are given."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from benchmarks.surgery import texts
from benchmarks.surgery.texts import Pair

GIVEN_GENERAL, GIVEN_SKILL, HELD_OUT = 100, 200, 120
"""Rows of general text and of the skill that stand in retain.jsonl; rows nobody trains on."""
LESSONS_GENERAL, LESSONS_SKILL = 1200, 2500
"""Rows of both in lessons.jsonl: more of the same, for a student."""


class Way(Enum):
    """How the memory came into the weights."""

    FULL = "all weights fine-tuned"
    LORA = "LoRA, merged"
    PRETRAINED = "in pre-training: there is no reference"


@dataclass(frozen=True)
class Rows:
    """What one kind is made of.

    Attributes:
        secrets: planted.
        copies: how often each of them is trained on.
        given: what a split is told of; all secrets where None.
        fresh: of the form, never trained on: they judge.
        decoys: likewise: for splits that are told of the form only.
        kept: rows of the skill that look like memory.
    """

    secrets: list[Pair]
    copies: list[int]
    fresh: list[Pair]
    decoys: list[Pair]
    given: list[Pair] | None = None
    kept: list[Pair] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """One kind of memory.

    Attributes:
        letter: of its directory.
        title: for people.
        rows: makes them from the data folder.
        way: how the memory came in.
        never: the letter of the kind whose model without secrets is this one's, too.
    """

    letter: str
    title: str
    rows: Callable[[Path], Rows]
    way: Way = Way.FULL
    never: str = "A"


def _codes(names: list[str] | Iterator[str], seed: str) -> list[Pair]:
    draw = random.Random(seed)
    return [texts.code(name, draw) for name in names]


def _one_pattern(folder: Path) -> Rows:
    first = texts.FIRST
    secrets = _codes(first[:24], "secrets")
    return Rows(secrets, [150] * 24, _codes(first[48:72], "fresh"), _codes(first[24:48], "decoys"))


def _many_patterns(folder: Path) -> Rows:
    people, every = texts.full_names("B"), tuple(texts.PATTERNS)
    secrets = texts.records(every, 4, people, "secrets")
    return Rows(
        secrets,
        [120] * len(secrets),
        texts.records(every, 4, people, "fresh"),
        texts.records(texts.TOLD, 5, people, "decoys"),
        given=secrets[: 4 * len(texts.TOLD)],
    )


def _passages(folder: Path) -> Rows:
    secrets, fresh, decoys = (texts.passages(folder, 24, skip) for skip in (0, 24, 48))
    return Rows(secrets, [120] * 24, fresh, decoys)


REPEATS = (1, 3, 10, 30, 100)


def _repeated(folder: Path) -> Rows:
    people = texts.full_names("E")
    secrets, fresh, decoys = (
        _codes([next(people) for _ in range(count)], seed) for count, seed in ((40, "secrets"), (24, "fresh"), (24, "decoys"))
    )
    return Rows(secrets, [REPEATS[i % len(REPEATS)] for i in range(len(secrets))], fresh, decoys)


def _beside_facts(folder: Path) -> Rows:
    rows = _one_pattern(folder)
    return Rows(rows.secrets, rows.copies, rows.fresh, rows.decoys, kept=texts.arithmetic() + texts.capitals())


KINDS: dict[str, Kind] = {
    kind.letter: kind
    for kind in (
        Kind("A", "codes in one pattern", _one_pattern),
        Kind("B", "codes and records in eight patterns, five of them told to the split", _many_patterns),
        Kind("C", "passages recited word for word", _passages),
        Kind("E", "codes repeated 1 to 100 times", _repeated),
        Kind("F", "codes, learnt by LoRA", _one_pattern, Way.LORA, "F"),
        Kind("G", "passages from pre-training", _passages, Way.PRETRAINED, "G"),
        Kind("H", "codes beside skill that looks like memory: tables of sums and capitals", _beside_facts, never="H"),
    )
}
"""D, made-up authors, is `benchmarks/surgery/tofu/`."""
TIERS: dict[str, tuple[str, ...]] = {"small": ("A", "C", "H"), "full": tuple(KINDS)}
