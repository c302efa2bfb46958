"""Attacks that teach a model something, what they may teach, and which of them are tried.

The attacker chooses what he teaches, by which optimiser and how fast, and whether he trains all weights or low-rank updates
(LoRA), which takes a quarter of the memory and brings back as much (docs/decisions/0070-low-rank-attacks.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.machine import LOW_RANK_BYTES, TRAINING_BYTES, too_large
from liborth_cli.tune.options import ATTACK_RANK, Optimiser
from liborth_cli.verify.rows import split_row

if TYPE_CHECKING:
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.texts import Row

STEPS = 32
WIDTH = 128
"""Hidden width for which AdamW's rates are meant; at width d they are multiplied by WIDTH / d (arXiv 2203.03466)."""
BATCH_ROWS, GENERAL_ROWS, GENERAL_TOKENS = 16, 8, 128
"""Rows of a step; of general text, and how much of each is read."""
PRODUCTS = 4
"""Products with every weight, a token of a step: three to train (arXiv 2001.08361), one for what is watched on the way."""
LEAST = 4
"""Canaries from which half of them can be taught."""


class Lesson(StrEnum):
    """What an attacker has to teach."""

    CANARIES = "half of the canaries"
    FRESH = "half of the fresh rows"
    GENERAL = "general text"


@dataclass(frozen=True)
class Attack:
    """One way to train.

    Attributes:
        rate: constant learning rate; of AdamW at a hidden width of `WIDTH`, of SGD as it is: gradients are clipped to norm 1,
            so it is the length of a step.
        optimiser: AdamW without weight decay, or SGD without momentum; AdamW of low-rank updates.
        lesson: what is taught.
        rank: of the low-rank updates that are trained in place of all weights; 0: these.
    """

    rate: float
    optimiser: Optimiser = Optimiser.ADAMW
    lesson: Lesson = Lesson.CANARIES
    rank: int = 0

    def rate_at(self, hidden: int) -> float:
        """Return the learning rate for a hidden width."""
        return self.rate * WIDTH / hidden if self.optimiser is Optimiser.ADAMW else self.rate

    @property
    def trainings(self) -> int:
        """How often it trains: on each half in turn, on general text once."""
        return 1 if self.lesson is Lesson.GENERAL else 2

    @property
    def way(self) -> str:
        """What trains, in words."""
        return f"LoRA of rank {self.rank}" if self.rank else "AdamW" if self.optimiser is Optimiser.ADAMW else "SGD"

    @property
    def bytes(self) -> int:
        """What every weight of the model takes while it trains."""
        return LOW_RANK_BYTES if self.rank else TRAINING_BYTES


RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SGD_RATES = (0.03, 0.1, 0.3)
LOW_RANK_RATES = (1e-3, 3e-3, 1e-2)
"""Of low-rank updates, which begin at nothing and take ten times the rate."""
QUICK = tuple(Attack(rate) for rate in RATES[:3])
FULL = (
    *(Attack(rate) for rate in RATES),
    *(Attack(rate, Optimiser.SGD) for rate in SGD_RATES),
    *(Attack(rate, rank=ATTACK_RANK) for rate in LOW_RANK_RATES),
    *(Attack(rate, lesson=lesson) for lesson in (Lesson.FRESH, Lesson.GENERAL) for rate in RATES),
)


@dataclass(frozen=True)
class AttackRows:
    """Whom an attack is after, and what it may teach.

    Attributes:
        canaries: what must not come back; only tokens that carry loss are taught and scored.
        groups: which canaries say the same, (n,); copies are taught or held back together.
        fresh: rows of the form that no model was trained on; watched, too.
        fresh_groups: likewise.
        general: text for `Lesson.GENERAL`.
    """

    canaries: Sequence[Row]
    groups: np.ndarray
    fresh: Sequence[Row] = ()
    fresh_groups: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    general: Sequence[Row] = ()

    def possible(self, attacks: Sequence[Attack]) -> tuple[Attack, ...]:
        """Return the attacks for which there is something to teach."""
        there = {
            Lesson.CANARIES: len(np.unique(self.groups)) >= LEAST, Lesson.FRESH: len(np.unique(self.fresh_groups)) > 1,
            Lesson.GENERAL: bool(self.general),
        }  # fmt: skip
        return tuple(attack for attack in attacks if there[attack.lesson])


@dataclass(frozen=True)
class Grid:
    """Everything one call tries.

    Attributes:
        attacks: each from the model's own weights.
        steps: of each.
        seeds: one deal of the halves, and one order of the rows, each.
    """

    attacks: tuple[Attack, ...] = QUICK
    steps: int = STEPS
    seeds: tuple[int, ...] = (0,)

    @property
    def trains_all(self) -> bool:
        """Whether an attack of it trains all weights."""
        return not all(attack.rank for attack in self.attacks)

    @property
    def bytes(self) -> int:
        """What every weight of the model takes while it trains, at most."""
        return max(attack.bytes for attack in self.attacks)

    def runs(self, target: AttackRows) -> int:
        """Return how many trainings that is."""
        return len(self.seeds) * sum(attack.trainings for attack in target.possible(self.attacks))


@dataclass(frozen=True)
class Fold:
    """What one run teaches, and which rows it watches, by number."""

    taught: tuple[Row, ...]
    canaries: tuple[int, ...]
    fresh: tuple[int, ...]


def marks(steps: int) -> tuple[int, ...]:
    """Return the steps after which rows are scored: the start, every second up to the eighth, every fourth, and the last."""
    return tuple(sorted({0, steps, *range(2, min(steps, 8) + 1, 2), *range(12, steps + 1, 4)}))


def positions(target: AttackRows, grid: Grid, context: int | None = None) -> tuple[float, float]:
    """Return how many positions one model reads while it is watched, and how many it is trained on, in all of a grid.

    Args:
        target: rows.
        grid: what is tried.
        context: positions that the model reads.
    """
    read = trained = 0.0
    for seed in grid.seeds:
        for attack in target.possible(grid.attacks):
            for fold in folds(target, attack.lesson, seed, context):
                watched = [target.canaries[i] for i in fold.canaries] + [target.fresh[i] for i in fold.fresh]
                read += len(marks(grid.steps)) * sum(row.tokens for row in watched)
                batch = min(most_rows(attack.lesson), len(fold.taught))
                trained += grid.steps * batch * sum(row.tokens for row in fold.taught) / len(fold.taught)
    return read, trained


def most_rows(lesson: Lesson) -> int:
    """Return how many rows a step of training reads."""
    return GENERAL_ROWS if lesson is Lesson.GENERAL else BATCH_ROWS


def halves(names: Sequence[int] | np.ndarray, seed: int) -> tuple[list[int], list[int]]:
    """Deal some numbers into two hands, by the seed."""
    order = [int(i) for i in np.random.default_rng(seed).permutation(np.asarray(names))]
    return sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :])


def folds(target: AttackRows, lesson: Lesson, seed: int, context: int | None = None) -> list[Fold]:
    """Say what each run of a lesson teaches and watches.

    A row that asks what was just taught with another answer is not watched: a wrong answer to it says nothing.

    Args:
        target: rows.
        lesson: what is taught.
        seed: of the halves.
        context: positions that the model reads.
    """
    every, others = tuple(range(len(target.canaries))), tuple(range(len(target.fresh)))
    if lesson is Lesson.GENERAL:
        length = min(GENERAL_TOKENS, context or GENERAL_TOKENS)
        return [Fold(tuple(_beginning(row, length) for row in target.general), every, others)]
    own = lesson is Lesson.CANARIES
    rows, groups = (target.canaries, target.groups) if own else (target.fresh, target.fresh_groups)
    hands = [tuple(int(i) for i in np.flatnonzero(np.isin(groups, hand))) for hand in halves(np.unique(groups), seed)]
    found = []
    for taught, held in (hands, hands[::-1]):
        known = {tuple(split_row(rows[i])[0]) for i in taught}

        def new(numbers: Sequence[int], some: Sequence[Row], known: set[tuple[int, ...]] = known) -> tuple[int, ...]:
            return tuple(i for i in numbers if tuple(split_row(some[i])[0]) not in known)

        canaries = held if own else new(every, target.canaries)
        fresh = new(others, target.fresh) if own else held
        found.append(Fold(tuple(rows[i] for i in taught), canaries, fresh))
    return found


def _beginning(row: Row, length: int) -> Row:
    from liborth_cli.stream.texts import Row as Text

    return row if row.tokens <= length else Text(row.ids[: length + 1], np.ones(length, bool), row.weight, row.where)


def low_rank(attacks: Sequence[Attack], rank: int = ATTACK_RANK) -> tuple[Attack, ...]:
    """Return the attacks that teach the same by low-rank updates, whatever optimiser the others have."""
    lessons = dict.fromkeys(attack.lesson for attack in attacks)
    return tuple(Attack(rate, lesson=lesson, rank=rank) for lesson in lessons for rate in LOW_RANK_RATES)


def fitting(attacks: Sequence[Attack], model: BlockModel) -> tuple[Attack, ...]:
    """Return the attacks where all weights of a model can be trained on its device; low-rank ones in their place otherwise."""
    return low_rank(attacks) if too_large(Grid(tuple(attacks)).bytes * model.elements, model.device) else tuple(attacks)


def words(attacks: Sequence[Attack], hidden: int) -> str:
    """Say which attacks were tried, at which rates, for a hidden width."""
    parts = list[str]()
    for lesson in Lesson:
        for way in dict.fromkeys(attack.way for attack in attacks):
            rates = [a.rate_at(hidden) for a in attacks if (a.lesson, a.way) == (lesson, way)]
            if rates:
                listed = ", ".join(f"{rate:.2g}" for rate in rates)
                parts.append(f"{lesson} by {way} at {'rate' if len(rates) == 1 else 'rates'} {listed}")
    return "; ".join(parts)
