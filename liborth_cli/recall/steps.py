"""The steps: towards the unseen level from where the model stands and from where an attack leads, as far as retain rows allow.

Every step is measured before it is taken. Its predicted cost ½αᵀKα knows K-FAC's metric only; the loss of retain rows that
the metric has not seen is what counts. A step that costs more than is trusted is halved until it does not; where that took
twice or more, the ridge of the kernel, which sets how far single tokens may pull, rises, and after a step that was cheap it
falls. Steps from the model itself have a ridge of their own: near their end they have little to do, and what they pay for it
should not hold back the others.

What all steps so far have cost a kind of retain rows is owed: the next one is to win it back along the slope of that loss, and
its other part makes up for what this does to the tokens. Without that part the memory comes back with the loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from liborth_cli.console import Console
from liborth_cli.curvature.selection import Factored, choose
from liborth_cli.errors import UsageError
from liborth_cli.machine import TRAINING_BYTES, spare_bytes
from liborth_cli.measure.scores import Evaluator
from liborth_cli.methods.recall import Recall
from liborth_cli.recall.attack import Attack, attacks
from liborth_cli.recall.course import Course
from liborth_cli.recall.kernel import KernelWalk, Metric
from liborth_cli.recall.levels import Likeness, Losses, alike, relearnt, unseen
from liborth_cli.recall.moves import Moves, Stepped
from liborth_cli.recall.retain import KINDS, Kind, allowed, held_out, kinds
from liborth_cli.recall.state import RECENT, Keeper, State, Tally
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.tap import Site
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Weights
from liborth_cli.tune.options import Arithmetic

RISE, FALL = 4.0, 0.7
"""What the ridge is multiplied by after a step that was halved twice, and after one that cost less than half of the trust."""
LEAST_RIDGE, MOST_RIDGE = 1e-3, 1e3
ROUND = 3
"""One step in so many is taken from the model itself, the others from where an attack leads."""
KERNEL_TOKENS = 8192
"""Tokens that one step moves at most: it forms and factorises their kernel. Of more, every step draws rows."""


@dataclass(frozen=True)
class Rows:
    """What the steps read.

    Attributes:
        forget: what must go; only the tokens that carry loss are moved.
        fresh: of the same form and never trained on; may be empty.
        retain: rows to keep good at.
        held_out: others, which neither the metric nor the slope was taken on.
        improved: of each of these whether fine-tuning lowered its loss, where that was measured before; else empty.
        small: files of retain rows that are small beside the others.
        taught: the model that the steps begin at was trained on the forget rows.
    """

    forget: list[Row]
    fresh: list[Row]
    retain: list[Row]
    held_out: list[Row]
    improved: Sequence[bool] = ()
    small: frozenset[int] = frozenset()
    taught: bool = True

    def without(self, some: Sequence[Row]) -> Rows:
        """Return it without some of the rows that are to be kept."""
        gone, better = set(map(id, some)), list(self.improved) or [True] * len(self.held_out)
        held = [(row, each) for row, each in zip(self.held_out, better, strict=True) if id(row) not in gone]
        retain, improved = [row for row in self.retain if id(row) not in gone], [each for _, each in held]
        return replace(self, retain=retain, held_out=[row for row, _ in held], improved=improved if self.improved else ())

    @property
    def kinds(self) -> int:
        """How many kinds of retain rows there are, at most."""
        return KINDS + bool(self.small)


@dataclass(frozen=True)
class Start:
    """What was measured before the first step.

    Attributes:
        losses: of the fine-tuned model.
        reference: those of the reference, or what stands for it.
        kinds: of retain rows.
        level: mean loss of each kind's held-back rows, (kinds,).
        likeness: of the rows, and which of them spread.
    """

    losses: Losses
    reference: Losses
    kinds: list[Kind]
    level: np.ndarray
    likeness: Likeness


class Steps:
    """Takes the steps."""

    def __init__(
        self, model: BlockModel, ends: tuple[Weights, Weights | None], rows: Rows, metric: Metric, names: set[str], folder: Path
    ) -> None:
        """Say what is read and what may be moved; nothing is measured yet.

        Args:
            model: to run.
            ends: W_f, and W_r or None.
            rows: what is read.
            metric: of the retain data at W_f.
            names: stored tensors that may be moved.
            folder: private, for scratch.

        Raises:
            UsageError: when nothing tells the unseen level, or no matrix may be moved.
        """
        self._model, (self._finetuned, self._reference) = model, ends
        if self._reference is None and not rows.fresh:
            raise UsageError(
                "recall aims at the loss of rows never seen: give the checkpoint before fine-tuning, or --fresh rows"
            )
        every = sorted([*rows.forget, *rows.fresh], key=lambda row: row.tokens, reverse=True)
        known = {id(row) for row in rows.fresh}
        self._rows = [Row(row.ids, row.keep, 1.0, row.where) for row in every]
        self._forget = [i for i, row in enumerate(every) if id(row) not in known]
        self._fresh = [i for i, row in enumerate(every) if id(row) in known]
        self._losses, self._given, self._folder = Evaluator(model, self._rows), rows, folder
        self._likeness = Likeness.of([self._rows[i] for i in self._forget], [self._rows[i] for i in self._fresh])
        covered = metric.factors.layers

        def movable(targets: Sequence[Factored]) -> list[Factored]:
            return [t for t in targets if t.tensor in names and t.kind == "linear" and t.name in covered]

        chosen = {
            stage: [(site, mine) for site, targets in sites if (mine := movable(targets))]
            for stage, sites in choose(model, (), False, False)[0].items()
        }
        self._walk = KernelWalk(model, chosen, metric, folder)
        shapes = {t.tensor: model.weights.checkpoint.tensors[t.tensor].shape for t in self._walk.targets.values()}
        if not shapes:
            raise UsageError("recall moves the matrices inside the blocks that retain factors cover: none was chosen")
        self._shapes, self._ways = shapes, list[Attack]()

    def run(
        self,
        method: Recall,
        most: int,
        seed: int,
        console: Console,
        keeper: Keeper | None = None,
        dtype: Arithmetic = Arithmetic.FLOAT32,
    ) -> tuple[Course, Moves]:
        """Take the steps.

        Args:
            method: the settings.
            most: steps at most.
            seed: of the attack inside, and of the rows that a step draws.
            console: where progress goes.
            keeper: of the state, for a run that goes on where this one is stopped.
            dtype: of products with weights where gradients are taken, in the attack inside and in walks; losses are float32.

        Returns:
            What became of them, and what they moved.
        """
        rows = [self._rows[i] for i in self._forget]
        self._ways = attacks(rows, method.attack_steps, seed, dtype, method.attack_rank)
        self._walk.dtype = dtype
        start = self._start()
        tally = Tally(level=start.level.tolist(), ridges=[method.ridge] * 2, left=[None] * (1 + min(RECENT, len(self._ways))))
        state = State(tally, Moves(self._shapes, self._folder), [Moves(self._shapes, self._folder) for _ in start.kinds])
        if keeper and keeper.find(state, start.losses):
            console.note(f"recall: goes on after {state.tally.done:,} steps")
        with keeper.pace.minding() if keeper else nullcontext():
            for _ in _told(most, state.tally.done, console):
                if state.tally.is_close:
                    break
                console.detail(self._step(start, state, method, seed))
                if keeper:
                    keeper.keep(state)
            after = self._read(self._moved(state))
            if keeper and keeper.pace.waits:
                keeper.keep(state)
        tally = state.tally
        course = Course(
            taken=tally.taken,
            attacked=tally.attacked,
            before=_mean(start.losses.forget),
            after=_mean(after.forget),
            target=_mean(unseen(start.reference, after.fresh, start.likeness)),
            cost=float((np.array(tally.level) - start.level).max()),
            predicted=tally.predicted,
            why="nothing was left to do" if tally.is_close else "all steps were taken",
        )
        return course, state.moved

    def _start(self) -> Start:
        """Measure both ends."""
        reference = self._read(self._reference) if self._reference is not None else None
        losses = self._read(self._finetuned)
        reference = reference or alike(losses)
        likeness = self._likeness.of_known(reference, losses, self._given.taught)
        given = self._given
        ends = self._finetuned, self._reference
        every = kinds(self._model, ends, given.retain, given.held_out, given.improved, given.small)
        return Start(losses, reference, every, held_out(every, self._model, self._finetuned), likeness)

    def _step(self, start: Start, state: State, method: Recall, seed: int) -> str:
        """Take one step, and say how it went."""
        tally, here = state.tally, self._moved(state)
        turn = _turn(tally.done, len(self._ways))
        ridge, level = tally.ridges[turn is not None], np.array(tally.level)
        self._model.use(here)
        for kind, slope in zip(start.kinds, state.slopes, strict=True):
            kind.climb(self._walk, slope, tally.done)
        now, aim = self._calm(start) if turn is None else self._attacked(start, state, turn, here)
        some = _drawn(sorted(aim), self._rows, (seed, tally.done))
        losses = dict(zip([*self._forget, *self._fresh], [*now.forget, *now.fresh], strict=True))
        felt = self._walk.walk([self._rows[i] for i in some])
        residuals = np.concatenate([aim[i] - losses[i] for i in some])
        owed = np.maximum(level - start.level, 0.0).tolist()
        alpha, theta = felt.solve(torch.from_numpy(method.rate * residuals), ridge, state.slopes, owed)
        cost = felt.cost(alpha)
        if method.trust and cost > method.trust:
            shorter = (method.trust / cost) ** 0.5
            alpha, theta, cost = alpha * shorter, theta * shorter, method.trust
        step = Moves(self._shapes, self._folder)
        felt.fill(step, alpha, theta.tolist(), state.slopes)
        del felt  # of many tokens it takes as much as the model does, and the next attack needs that room
        share, found = allowed(
            lambda share: held_out(start.kinds, self._model, self._moved(state, step, share)), level, method.trust
        )
        if share:
            state.moved.flat.add_(step.flat, alpha=share)
            tally.taken, tally.attacked = tally.taken + 1, tally.attacked + (turn is not None)
            tally.predicted += cost * share**2
        dearest, mine = float((found - level).max()), sorted(aim.keys() & set(self._forget))
        reached, wanted = _mean([losses[i] for i in mine]), _mean([aim[i] for i in mine])
        left = 1 - reached / wanted
        tally.left[0 if turn is None else 1 + turn % RECENT] = abs(left) if turn is None else max(left, 0.0)
        tally.ridges[turn is not None] = _adapted(ridge, share, cheap=dearest < method.trust / 2)
        tally.level, tally.done = found.tolist(), tally.done + 1
        return (
            f"step {tally.done}{'' if turn is None else ', attacked'}: forget {reached:.3f} (aim {wanted:.3f}), "
            f"fresh {_mean([losses[i] for i in self._fresh]):.3f}; retain {dearest:+.5f} (predicted {cost * share**2:+.5f}), "
            f"in all {', '.join(f'{x:+.5f}' for x in found - start.level)}; ridge {ridge:.2g}"
        )

    def _moved(self, state: State, step: Moves | None = None, share: float = 1.0) -> Stepped:
        return Stepped(self._finetuned, state.moved, step, share)

    def _calm(self, start: Start) -> tuple[Losses, dict[int, np.ndarray]]:
        """Return the losses of the model as it is, and what rows should stand at, by number: as `_attacked`.

        Forget rows should be as hard as fresh rows are by now, so that nothing tells them apart; fresh rows go back, and so do
        forget rows that were not learnt.
        """
        now, likeness = self._read(None), start.likeness
        aims, own = unseen(start.reference, now.fresh, likeness), start.losses.forget
        forget = [mine if least else aim for aim, mine, least in zip(aims, own, likeness.least, strict=True)]
        return now, dict(zip(self._forget, forget, strict=True)) | dict(zip(self._fresh, start.losses.fresh, strict=True))

    def _attacked(self, start: Start, state: State, turn: int, here: Weights) -> tuple[Losses, dict[int, np.ndarray]]:
        """Leave the model attacked; return its losses, and what untaught and fresh rows should stand at there, by number."""
        attack, rows = self._ways[turn], [self._rows[i] for i in self._forget]
        turn = self._ways.index(attack)  # of few rows two cuts may deal the same hands
        if self._reference is not None and turn not in state.relearnt:
            attack.run(self._model, self._reference, rows)
            state.relearnt[turn] = self._read(None)
        attack.run(self._model, here, rows)
        now = self._read(None)
        goal = relearnt(state.relearnt.get(turn) or alike(now), now.fresh, start.losses.fresh, start.likeness)
        aim = {self._forget[k]: goal.forget[k] for k in attack.held}
        return now, aim if self._reference is None else aim | dict(zip(self._fresh, goal.fresh, strict=True))

    def _read(self, weights: Weights | None) -> Losses:
        """Return the token losses at some weights, or at those the model has."""
        losses = [score.loss for score in self._losses.score(weights)]
        return Losses([losses[i] for i in self._forget], [losses[i] for i in self._fresh])


def taken_at_once(rows: Rows) -> int:
    """Return how many tokens a step moves at most: all of the forget and fresh rows, where the kernel takes them."""
    counts = [int(row.keep.sum()) for row in (*rows.forget, *rows.fresh)]
    return min(sum(counts), max(KERNEL_TOKENS, *counts))


def memory_bytes(model: BlockModel, tokens: int, training: int = TRAINING_BYTES, kinds: int = KINDS) -> int:
    """Return what the steps take of memory, about, activations left out: while an attack trains, or while a step is solved.

    Args:
        model: that moves.
        tokens: that a step moves at most.
        training: bytes that a weight takes in the attack inside; 0: there is none.
        kinds: of retain rows, each of which keeps a slope.
    """
    sites = linear_sites(model)
    moves = 4 * sum(site.d_out * site.d_in for site in sites)
    factors = min(4 * sum(site.d_out**2 + site.d_in**2 for site in sites), spare_bytes() // 4)
    whitened = 4 * tokens * sum(site.d_out + site.d_in for site in sites) + 3 * 8 * tokens**2
    held = factors + (1 + kinds) * moves
    return held + max(training * model.elements, model.nbytes + moves + whitened)


def linear_sites(model: BlockModel) -> list[Site]:
    """Return the matrices that steps may move."""
    return [site for some in model.planned_sites().values() for site in some if site.kind == "linear"]


def _drawn(numbers: list[int], rows: Sequence[Row], seeds: tuple[int, int]) -> list[int]:
    """Return the numbers of the rows that a step moves, in their order: all, or of too many some at random, one at least."""
    counts = np.array([int(rows[i].keep.sum()) for i in numbers])
    if counts.sum() <= KERNEL_TOKENS:
        return numbers
    order = np.random.default_rng([*seeds, 0xD4A]).permutation(len(numbers))
    return [numbers[k] for k in sorted(order[: max(int((counts[order].cumsum() <= KERNEL_TOKENS).sum()), 1)])]


def _turn(number: int, ways: int) -> int | None:
    """Return whose turn of the attacks a step is; None for a step from the model itself."""
    return (number - number // ROUND) % ways if ways and number % ROUND != ROUND - 1 else None


def _adapted(ridge: float, share: float, cheap: bool) -> float:
    if share < 1 / 2:
        return min(ridge * RISE, MOST_RIDGE)
    return max(ridge * FALL, LEAST_RIDGE) if cheap else ridge


def _told(most: int, done: int, console: Console) -> Iterator[int]:
    """Count the steps that are left, and tell of each that is taken."""
    with console.progress("recall", most, "steps") as progress:
        progress.skip(done)
        for number in range(done, most):
            yield number
            progress.advance(1)


def _mean(rows: Sequence[np.ndarray]) -> float:
    return float(np.concatenate(list(rows)).mean()) if rows else math.nan
