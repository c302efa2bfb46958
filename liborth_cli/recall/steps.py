"""The steps: towards the unseen level from where the model stands and from where an attack leads, as far as retain rows allow.

Every step is measured before it is taken. Its predicted cost ½αᵀKα knows K-FAC's metric only; the loss of retain rows that
the metric has not seen is what counts. A step that costs more than is trusted is halved until it does not, and the ridge of
the kernel, which sets how far single tokens may pull, rises; after a step that was cheap it falls. Steps from the model itself
have a ridge of their own: near their end they have little to do, and what they pay for it should not hold back the others.

Retain rows are of two kinds, those that fine-tuning improved and the others, and each counts by itself: where fine-tuning has
left a text far from its best, a step can win on it what it loses of the skill.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from liborth_cli.console import Console
from liborth_cli.curvature.selection import choose
from liborth_cli.errors import OutOfResources, UsageError
from liborth_cli.machine import TRAINING_BYTES, too_large
from liborth_cli.measure.scores import Evaluator, mean_loss
from liborth_cli.methods.recall import Recall
from liborth_cli.recall.attack import Attack, attacks
from liborth_cli.recall.kernel import KernelWalk, Metric
from liborth_cli.recall.levels import Losses, alike, relearnt, unseen
from liborth_cli.recall.moves import Moves, Stepped
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Weights

HALVINGS = 4
"""How often a step that costs too much is halved before it is given up."""
RISE, FALL = 4.0, 0.7
"""What the ridge is multiplied by after a step that had to be halved, and after one that cost less than half of the trust."""
LEAST_RIDGE, MOST_RIDGE = 1e-3, 1e3
ROUND = 3
"""One step in so many is taken from the model itself, the others from where an attack leads."""
SLOPE_TOKENS, MEMORY = 2048, 0.85
"""Retain tokens of a kind on which the slope of their loss is measured at every step, others each time; and how much of the
mean of the steps before stays."""
LITTLE = 0.1
"""Share of the way to the aim below which (almost) nothing was forgotten."""
CLOSE = 0.03
"""Share of the aim within which the mean loss counts as being there; under attack it may be above."""


@dataclass(frozen=True)
class Rows:
    """What the steps read.

    Attributes:
        forget: what must go; only the tokens that carry loss are moved.
        fresh: of the same form and never trained on; may be empty.
        retain: rows to keep good at.
        held_out: others, which neither the metric nor the slope was taken on.
    """

    forget: list[Row]
    fresh: list[Row]
    retain: list[Row]
    held_out: list[Row]


@dataclass
class Kind:
    """Retain rows of one kind.

    Attributes:
        parts: the rows, some for each step in turn.
        held_out: those that are only measured.
        slope: mean gradient of the loss of `parts` over the last steps, whitened.
    """

    parts: list[list[Row]]
    held_out: Evaluator
    slope: Moves


@dataclass
class Course:
    """What became of the steps; losses in nats a token.

    Attributes:
        taken: how many moved the model.
        attacked: how many of those started from an attacked model.
        before: mean loss of the forget tokens.
        after: the same when the last step was taken.
        target: mean of their targets.
        cost: what all steps together add to the loss of held-back retain rows, of the kind that pays most.
        predicted: what K-FAC predicted of all of them.
        why: why no more were taken.
    """

    taken: int = 0
    attacked: int = 0
    before: float = math.nan
    after: float = math.nan
    target: float = math.nan
    cost: float = 0.0
    predicted: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        """Say it in one line."""
        steps = "1 step" if self.taken == 1 else f"{self.taken} steps"
        return (
            f"recall: {steps}, {self.attacked} of them from models that had been taught half of the forget rows, "
            f"took these rows from {self.before:.2f} to {self.after:.2f} nats a token (aim: {self.target:.2f}); held-back "
            f"retain rows: {self.cost:+.4f} (predicted: {self.predicted:+.4f}); {self.why}"
        )

    @property
    def doubt(self) -> str:
        """Say that (almost) nothing was forgotten, or ""."""
        way = self.target - self.before
        if not way > CLOSE * self.target:
            return (
                f"the forget rows stood at {self.before:.2f} nats a token before the first step, and their aim is "
                f"{self.target:.2f}: there was (almost) nothing to forget"
            )
        if not self.taken:
            return "recall moved nothing: retain rows allowed no step; a larger --trust or more --retain-data may"
        if self.after - self.before < LITTLE * way:
            return (
                f"recall forgot almost nothing: forget rows went {max(self.after - self.before, 0.0) / way:.0%} of the way to "
                "their aim; more --steps, or a larger --trust, go further"
            )
        return ""


class Steps:
    """Takes the steps.

    Attributes:
        moved: what they have moved so far.
    """

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
        chosen = {
            stage: [(site, mine) for site, targets in sites if (mine := [t for t in targets if t.tensor in names])]
            for stage, sites in choose(model, (), False, False)[0].items()
        }
        chosen = {
            stage: [(s, [t for t in ts if t.kind == "linear" and t.name in metric.factors.layers]) for s, ts in sites]
            for stage, sites in chosen.items()
        }
        self._walk = KernelWalk(model, chosen, metric, folder)
        shapes = {t.tensor: model.weights.checkpoint.tensors[t.tensor].shape for t in self._walk.targets.values()}
        if not shapes:
            raise UsageError("recall moves the matrices inside the blocks that retain factors cover: none was chosen")
        self._shapes = shapes
        self.moved, self._step = Moves(shapes, folder), Moves(shapes, folder)
        self._relearnt: dict[Attack, Losses] = {}

    def run(self, method: Recall, most: int, seed: int, console: Console) -> Course:
        """Take the steps.

        Args:
            method: the settings.
            most: steps at most.
            seed: of the attack inside.
            console: where progress goes.

        Returns:
            What became of them.

        Raises:
            OutOfResources: when the attack inside does not fit into memory.
        """
        ways = attacks([self._rows[i] for i in self._forget], method.attack_steps, seed)
        if ways and (too_much := too_large(TRAINING_BYTES * self._model.elements)):
            raise OutOfResources(
                f"the attack inside recall trains all weights: {too_much}; --attack-steps 0 goes without it, and what is "
                "hidden then comes back faster"
            )
        reference = self._read(self._reference) if self._reference is not None else None
        start = self._read(self._finetuned)
        reference = reference or alike(start)
        goal = dict(zip(self._forget, unseen(reference, start.fresh), strict=True))
        goal |= dict(zip(self._fresh, start.fresh, strict=True))
        course = Course(before=_mean(start.forget), target=_mean([goal[i] for i in self._forget]))
        kinds = self._kinds()
        slopes = [kind.slope for kind in kinds]
        first = level = self._held_out(kinds, self._finetuned)
        forget, left, ridges = set(self._forget), dict[Attack | None, float](), dict.fromkeys((False, True), method.ridge)
        course.why = "all steps were taken"
        for number in _told(most, console):
            attack = ways[(number - number // ROUND) % len(ways)] if ways and number % ROUND != ROUND - 1 else None
            ridge = ridges[attack is not None]
            here = Stepped(self._finetuned, self.moved)
            self._model.use(here)
            for kind in kinds:
                self._walk.climb(kind.parts[number % len(kind.parts)], kind.slope, min(MEMORY, number / (number + 1)))
            now, aim = self._attacked(attack, here) if attack else (self._read(None), goal)
            some = sorted(aim)
            losses = dict(zip([*self._forget, *self._fresh], [*now.forget, *now.fresh], strict=True))
            felt = self._walk.walk([self._rows[i] for i in some])
            residuals = np.concatenate([aim[i] - losses[i] for i in some])
            alpha, theta = felt.solve(torch.from_numpy(method.rate * residuals), ridge, slopes)
            cost = felt.cost(alpha)
            if method.trust and cost > method.trust:
                shorter = (method.trust / cost) ** 0.5
                alpha, theta, cost = alpha * shorter, theta * shorter, method.trust
            felt.fill(self._step, alpha, theta.tolist(), slopes)
            del felt  # of many tokens it takes as much as the model does, and the next attack needs that room
            share, found = self._trusted(kinds, level, method.trust)
            dearest = float((found - level).max())
            mine = [i for i in some if i in forget]
            reached, wanted = _mean([losses[i] for i in mine]), _mean([aim[i] for i in mine])
            left[attack] = abs(1 - reached / wanted) if attack is None else max(1 - reached / wanted, 0.0)
            console.detail(
                f"step {number + 1}{', attacked' if attack else ''}: forget {reached:.3f} (aim {wanted:.3f}), "
                f"fresh {_mean([losses[i] for i in self._fresh]):.3f}; retain "
                f"{dearest:+.5f} (predicted {cost * share**2:+.5f}), in all "
                f"{', '.join(f'{x:+.5f}' for x in found - first)}; ridge {ridge:.2g}"
            )
            if share:
                self.moved.flat.add_(self._step.flat, alpha=share)
                course.taken, course.attacked = course.taken + 1, course.attacked + (attack is not None)
                course.predicted += cost * share**2
            ridges[attack is not None] = _adapted(ridge, share, cheap=dearest < method.trust / 2)
            level = found
            if len(left) == len(ways) + 1 and max(left.values()) < CLOSE:
                course.why = "nothing was left to do"
                break
        course.cost = float((level - first).max())
        course.after = _mean(self._read(Stepped(self._finetuned, self.moved)).forget)
        return course

    def _kinds(self) -> list[Kind]:
        """Tell the retain rows that fine-tuning improved from the others; one kind where there is no telling."""
        some = [(self._given.retain, self._given.held_out)]
        if self._reference is not None:
            both = list(zip(*map(self._divided, some[0]), strict=True))
            some = both if all(part for kind in both for part in kind) else some
        return [
            Kind(_parts(retain, SLOPE_TOKENS), Evaluator(self._model, held_out), Moves(self._shapes, self._folder))
            for retain, held_out in some
        ]

    def _divided(self, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """Return the rows whose loss fine-tuning lowered, and the others."""
        assert self._reference is not None
        evaluator, sides = Evaluator(self._model, rows), (list[Row](), list[Row]())
        after, before = evaluator.score(self._finetuned), evaluator.score(self._reference)
        for row, new, old in zip(rows, after, before, strict=True):
            sides[bool(new.loss.mean() >= old.loss.mean())].append(row)
        return sides

    def _trusted(self, kinds: Sequence[Kind], level: np.ndarray, trust: float) -> tuple[float, np.ndarray]:
        """Return the largest share of the step that every kind of retain rows allows, 0 when none is, and their losses then."""
        share = 1.0
        for _ in range(HALVINGS + 1):
            found = self._held_out(kinds, Stepped(self._finetuned, self.moved, self._step, share))
            if (found - level).max() <= trust:
                return share, found
            share /= 2
        return 0.0, level

    def _held_out(self, kinds: Sequence[Kind], weights: Weights) -> np.ndarray:
        """Return the mean loss of every kind's held-back rows at some weights, which are read once for all kinds."""
        self._model.use(weights)
        return np.array([mean_loss(kind.held_out.score()) for kind in kinds])

    def _attacked(self, attack: Attack, here: Weights) -> tuple[Losses, dict[int, np.ndarray]]:
        """Leave the model attacked; return its losses, and what untaught and fresh rows should stand at there, by number."""
        rows = [self._rows[i] for i in self._forget]
        if self._reference is not None and attack not in self._relearnt:
            attack.run(self._model, self._reference, rows)
            self._relearnt[attack] = self._read(None)
        attack.run(self._model, here, rows)
        now = self._read(None)
        goal = relearnt(self._relearnt.get(attack) or alike(now), now.fresh)
        aim = {self._forget[k]: goal.forget[k] for k in attack.held}
        return now, aim if self._reference is None else aim | dict(zip(self._fresh, goal.fresh, strict=True))

    def _read(self, weights: Weights | None) -> Losses:
        """Return the token losses at some weights, or at those the model has."""
        losses = [score.loss for score in self._losses.score(weights)]
        return Losses([losses[i] for i in self._forget], [losses[i] for i in self._fresh])


def _adapted(ridge: float, share: float, cheap: bool) -> float:
    if share < 1:
        return min(ridge * RISE, MOST_RIDGE)
    return max(ridge * FALL, LEAST_RIDGE) if cheap else ridge


def _told(most: int, console: Console) -> Iterator[int]:
    """Count the steps, and tell of each that is taken."""
    with console.progress("recall", most, "steps") as progress:
        for number in range(most):
            yield number
            progress.advance(1)


def _parts(rows: Sequence[Row], tokens: int) -> list[list[Row]]:
    """Cut rows into parts of so many tokens, each longest first; what is left over goes with the last."""
    parts, held = list[list[Row]](), 0
    for row in rows:
        if not parts or held >= tokens:
            parts.append([])
            held = 0
        parts[-1].append(Row(row.ids, row.keep, 1.0, row.where))
        held += row.tokens
    if len(parts) > 1 and held < tokens:
        rest = parts.pop()
        parts[-1] += rest
    return [sorted(part, key=lambda row: row.tokens, reverse=True) for part in parts]


def _mean(rows: Sequence[np.ndarray]) -> float:
    return float(np.concatenate(list(rows)).mean()) if rows else math.nan
