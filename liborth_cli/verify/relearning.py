"""Relearning: train a model on text of the form of what was removed, and watch whether what was removed comes back by itself.

An edit that hides text without removing it gives way to a few steps of training (Lynch et al. 2024, arXiv 2402.16835; Hu et al.
2024, arXiv 2406.13356), and may do so at one learning rate and not at another (Lee et al. 2025, arXiv 2506.06278). So one call
tries a grid of attacks, and the lowest loss counts. Every model learns the form: what a number means shows only beside models
that never saw the text, under the same grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.tune.options import LoopOptions, Schedule
from liborth_cli.verify.attacks import Attack, AttackRows, Grid, folds, marks, most_rows
from liborth_cli.verify.memorisation import verbatim

if TYPE_CHECKING:
    import torch

    from liborth_cli.measure.scores import RowScore
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.texts import Row
    from liborth_cli.stream.weights import Weights


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


def relearn(
    weights: Weights,
    target: AttackRows,
    grid: Grid | None = None,
    *,
    device: torch.device | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> Relearnt:
    """Try every attack on a model, each from its own weights, and watch what was not taught.

    Under `Lesson.CANARIES` and `Lesson.FRESH` each half is taught in turn. Training is float32, on all weights or on low-rank
    updates of them.

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
    from liborth_cli.tune.loop import Watch, optimiser_of, train
    from liborth_cli.tune.low_rank import trained
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
    method = trained(model.model, attack.rank, seed)
    try:
        train(method, rows, options, watch, optimiser=optimiser_of(method, options, fused=True))
    finally:
        method.finish()
    yield from found
