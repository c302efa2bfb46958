"""Relearning: train a model on text of the form of what was removed, and watch whether what was removed comes back by itself.

An edit that hides text without removing it gives way to a few steps of training (Lynch et al. 2024, arXiv 2402.16835; Hu et al.
2024, arXiv 2406.13356), and may do so at one learning rate and not at another (Lee et al. 2025, arXiv 2506.06278). So one call
tries a grid of attacks, and the lowest loss counts. Every model learns the form: what a number means shows only beside models
that never saw the text, under the same grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.tune.options import LoopOptions, Optimiser, Schedule
from liborth_cli.verify.memorisation import verbatim
from liborth_cli.verify.rows import split_row

if TYPE_CHECKING:
    import torch

    from liborth_cli.measure.scores import RowScore
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.texts import Row
    from liborth_cli.stream.weights import Weights

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
        optimiser: AdamW without weight decay, or SGD without momentum.
        lesson: what is taught.
    """

    rate: float
    optimiser: Optimiser = Optimiser.ADAMW
    lesson: Lesson = Lesson.CANARIES

    def rate_at(self, hidden: int) -> float:
        """Return the learning rate for a hidden width."""
        return self.rate * WIDTH / hidden if self.optimiser is Optimiser.ADAMW else self.rate

    @property
    def trainings(self) -> int:
        """How often it trains: on each half in turn, on general text once."""
        return 1 if self.lesson is Lesson.GENERAL else 2


RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SGD_RATES = (0.03, 0.1, 0.3)
QUICK = tuple(Attack(rate) for rate in RATES[:3])
FULL = (
    *(Attack(rate) for rate in RATES),
    *(Attack(rate, Optimiser.SGD) for rate in SGD_RATES),
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

    def runs(self, target: AttackRows) -> int:
        """Return how many trainings that is."""
        return len(self.seeds) * sum(attack.trainings for attack in target.possible(self.attacks))


@dataclass(frozen=True)
class Fold:
    """What one run teaches, and which rows it watches, by number."""

    taught: tuple[Row, ...]
    canaries: tuple[int, ...]
    fresh: tuple[int, ...]


@dataclass(frozen=True)
class Relearnt:
    """What came back. Losses are means a token of each row, nats; NaN where a row was not watched, or training broke down.

    Attributes:
        attacks: that were tried.
        steps: after which rows were scored; the first is 0.
        canaries: (runs, n, attacks, steps); a run is a deal of the halves and one of its two halves.
        recited: of the canaries, whether every token was the likeliest, same shape, bool.
        fresh: likewise of the fresh rows.
    """

    attacks: tuple[Attack, ...]
    steps: tuple[int, ...]
    canaries: np.ndarray
    recited: np.ndarray
    fresh: np.ndarray

    def curve(self, rows: str, attack: int) -> np.ndarray:
        """Return the mean loss of "canaries" or "fresh" at every step of one attack, (steps,)."""
        return means(np.ones((1, *getattr(self, rows).shape[:2])), getattr(self, rows))[0, attack]

    def lowest(self, rows: str = "canaries") -> tuple[float, int, int]:
        """Return the lowest mean loss over attacks and steps, the number of its attack, and its step."""
        table = means(np.ones((1, *getattr(self, rows).shape[:2])), getattr(self, rows))[0]
        attack, step = np.unravel_index(int(np.nanargmin(table)), table.shape)
        return float(table[attack, step]), int(attack), self.steps[step]


def means(weights: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the mean over runs and rows of a table of `Relearnt`, (draws, attacks, steps).

    Args:
        weights: (draws, runs, rows).
        table: (runs, rows, attacks, steps).
    """
    flat = table.reshape(table.shape[0] * table.shape[1], -1)
    seen, each = np.isfinite(flat), weights.reshape(len(weights), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (each @ np.where(seen, flat, 0.0)) / (each @ seen)
    return found.reshape(len(weights), *table.shape[2:])


def beyond_fresh(
    models: Sequence[Relearnt], never: np.ndarray, canaries: np.ndarray, runs: np.ndarray | None = None
) -> np.ndarray:
    """Return how much lower canaries get than fresh rows under each attack, less the same in a control, (draws, attacks).

    Both are watched in the same trainings, so a gap is taken within each attack, and the largest counts: were the lowest of
    all attacks held against each other, one more that brings the fresh rows down would make the verdict milder.

    Args:
        models: what came back in the model that is judged, and in the control where there is one.
        never: weights of the fresh rows, (draws, n).
        canaries: of the canaries, likewise.
        runs: of the runs; all count alike where None.
    """
    gaps = []
    for number in range(len(models[0].attacks)):
        some = slice(number, number + 1)
        ends = [(model.fresh[:, :, some], model.canaries[:, :, some]) for model in models]
        apart = [lowest(fresh, never, runs) - lowest(held, canaries, runs) for fresh, held in ends]
        gaps.append(apart[0] - sum(apart[1:], np.zeros_like(apart[0])))
    return np.stack(gaps, 1)


def lowest(table: np.ndarray, rows: np.ndarray, runs: np.ndarray | None) -> np.ndarray:
    """Return the lowest mean over attacks and steps, (draws,), under weights of the rows, (draws, n), and of the runs."""
    runs = np.ones((len(rows), len(table))) if runs is None else runs
    return np.nanmin(means(runs[:, :, None] * rows[:, None, :], table), (1, 2))


def marks(steps: int) -> tuple[int, ...]:
    """Return the steps after which rows are scored: the start, every second up to the eighth, every fourth, and the last."""
    return tuple(sorted({0, steps, *range(2, min(steps, 8) + 1, 2), *range(12, steps + 1, 4)}))


def relearn(
    weights: Weights,
    target: AttackRows,
    grid: Grid | None = None,
    *,
    device: torch.device | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> Relearnt:
    """Try every attack on a model, each from its own weights, and watch what was not taught.

    Under `Lesson.CANARIES` and `Lesson.FRESH` each half is taught in turn. Training is float32 on all weights.

    Args:
        weights: of the model; they are not changed.
        target: rows.
        grid: what is tried; the quick one when None. Attacks for which `target` has nothing to teach are left out.
        device: where; the CPU when None.
        advance: told of every step.

    Raises:
        OutOfResources: when memory ran out.
    """
    import torch

    from liborth_cli.stream.model import BlockModel

    grid = grid or Grid()
    tried, at = target.possible(grid.attacks), marks(grid.steps)
    model = BlockModel(weights, torch.float32, device or torch.device("cpu"))
    runs = 2 * len(grid.seeds)
    canaries = np.full((runs, len(target.canaries), len(tried), len(at)), np.nan)
    recited, fresh = np.zeros(canaries.shape, bool), np.full((runs, len(target.fresh), len(tried), len(at)), np.nan)
    try:
        for deal, seed in enumerate(grid.seeds):
            for number, attack in enumerate(tried):
                for half, fold in enumerate(folds(target, attack.lesson, seed, model.context)):
                    run = 2 * deal + half
                    watched = [target.canaries[i] for i in fold.canaries] + [target.fresh[i] for i in fold.fresh]
                    for mark, scores in _taught(model, fold.taught, watched, attack, (at, seed), advance):
                        losses, own = np.array([s.loss.mean() for s in scores]), len(fold.canaries)
                        canaries[run, fold.canaries, number, mark] = losses[:own]
                        recited[run, fold.canaries, number, mark] = [verbatim(s) for s in scores[:own]]
                        fresh[run, fold.fresh, number, mark] = losses[own:]
    finally:
        model.close()
    return Relearnt(tried, at, canaries, recited, fresh)


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


def _taught(
    model: BlockModel,
    taught: Sequence[Row],
    watched: Sequence[Row],
    attack: Attack,
    when: tuple[tuple[int, ...], int],
    advance: Callable[[int], None],
) -> Iterator[tuple[int, list[RowScore]]]:
    """Train from the model's own weights, and yield the number of each mark with the scores of the watched rows."""
    import torch

    from liborth_cli.measure.scores import windows
    from liborth_cli.tune.data import Example
    from liborth_cli.tune.full import Full
    from liborth_cli.tune.loop import Watch, optimiser_of, train
    from liborth_cli.verify.subject import evaluator_of

    at, seed = when
    model.load_all()
    evaluator = evaluator_of(model, watched, True)
    found: list[tuple[int, list[RowScore]]] = []

    class Marks(Watch):
        def after(self, done: int) -> bool:
            if done in at:
                self.look(done)
            advance(1)
            return True

        def look(self, done: int) -> None:
            model.model.eval()
            found.append((at.index(done), evaluator.score()))
            model.model.train()

    rows = [Example.of(part) for row in taught for part in windows(row, model.context or row.tokens)]
    options = LoopOptions(
        steps=at[-1], batch_size=min(most_rows(attack.lesson), len(rows)), optimiser=attack.optimiser,
        rate=attack.rate_at(model.hidden), schedule=Schedule.CONSTANT, warmup=0.0, seed=seed,
    )  # fmt: skip
    watch = Marks()
    watch.look(0)
    torch.manual_seed(seed)
    method = Full(model.model, dict(model.model.named_parameters()))
    train(method, rows, options, watch, optimiser=optimiser_of(method, options, fused=True))
    yield from found


def words(attacks: Sequence[Attack], hidden: int) -> str:
    """Say which attacks were tried, at which rates, for a hidden width."""
    parts = []
    for lesson in Lesson:
        for optimiser, name in ((Optimiser.ADAMW, "AdamW"), (Optimiser.SGD, "SGD")):
            rates = [a.rate_at(hidden) for a in attacks if a.lesson is lesson and a.optimiser is optimiser]
            if rates:
                listed = ", ".join(f"{rate:.2g}" for rate in rates)
                parts.append(f"{lesson} by {name} at {'rate' if len(rates) == 1 else 'rates'} {listed}")
    return "; ".join(parts)
