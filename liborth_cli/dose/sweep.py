"""A sweep: one method, its amount turned up dose by dose; every candidate is measured and none of them written.

A candidate is the model that a split would write, to the bit of its dtype (for `svd`, up to the certified tail): every matrix
is divided while it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from liborth_cli.console import Console, JsonObject
from liborth_cli.dose.measure import Measure, Reading
from liborth_cli.dose.remember import Key, Lesson, Recorded, Remembered, key_of
from liborth_cli.dose.target import Target
from liborth_cli.machine import Run, spare_bytes
from liborth_cli.measure.unwritten import Division, Unwritten
from liborth_cli.methods import METHODS, NEEDS, Amount, Layer
from liborth_cli.split import SplitOptions, Splitter
from liborth_cli.split.matrix import MatrixReport, split_matrix
from liborth_cli.split.split import Opened

GRID: dict[str, tuple[float, ...]] = {
    "strength": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0),
    "share": (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7),
}
"""Where a sweep looks first. A share is what is taken away, or moved to memory."""
TURNED = ("strength", "mass", "rank", "energy", "steps", "epochs", "scale")
"""Amounts that can be turned, by the names of docs/methods.md; a method's first one among them is."""
COUNTED = ("rank", "steps", "epochs")
LARGEST_RANK = 128
TWO_SIDED = ("kfac", "ekfac")
"""Methods whose memory side is in dispute: both are looked at."""
STEPS = 5
"""Bisections between two doses of the grid: a decade of strength is then known to 7 %."""
PATIENCE = 2
"""Doses in a row that spoil what is to be kept, after which larger ones are not tried."""


@dataclass(frozen=True)
class Sweep:
    """One way to remove more and more.

    Attributes:
        method: a key of METHODS.
        side: which end of the ranking is memory.
        kind: the amount that is turned.
        grid: doses in the order of what they remove: strengths, shares removed, or ranks kept.
        hard: cut, where the method has a choice.
    """

    method: str
    side: str
    kind: str
    grid: tuple[float, ...]
    hard: bool = False

    @classmethod
    def of(cls, method: str, side: str | None, largest: int, hard: bool = False) -> Sweep:
        """Return the sweep of one method.

        Args:
            method: a key of METHODS.
            side: which end is memory; None leaves it to the method.
            largest: the shorter side of the largest matrix.
            hard: cut, where the method has a choice.
        """
        amounts = METHODS[method].amounts
        kind = next(kind for kind in amounts if kind in TURNED)
        grid = GRID.get(kind, GRID["share"])
        if "edit" in METHODS[method].needs:
            grid = (float(METHODS[method].suggested.value or 1),)
        if kind == "rank":
            top = min(LARGEST_RANK, max(largest // 2, 1))
            grid = tuple(float(2**i) for i in range(top.bit_length() - 1, -1, -1))
        return cls(method, side or METHODS[method].memory_side, kind, grid, hard and "threshold" in amounts)

    @property
    def title(self) -> str:
        """For tables: the method, and its memory side where that is in dispute."""
        low = {"tail": "low", "top": "high"}[self.side]
        return f"{self.method}, {low} is memory" if self.method in TWO_SIDED else self.method

    def amount(self, dose: float) -> Amount:
        """Return the amount that stands for a dose."""
        if self.kind in COUNTED:
            return Amount(self.kind, round(dose))
        if self.kind == "strength":
            return Amount("strength", dose, self.hard)
        # What leads is kept when memory is the tail, and removed when it is the top.
        return Amount(self.kind, dose if self.side == "top" else 1 - dose)

    def below(self, dose: float) -> float | None:
        """Return a dose that removes next to nothing beside one; None when there is none."""
        return None if self.kind in COUNTED else dose / (1000 if self.kind == "strength" else 10)

    def middle(self, weaker: float, stronger: float) -> float | None:
        """Return the dose half way between two, in equal ratios; None when there is none."""
        middle = (weaker * stronger) ** 0.5
        middle = float(round(middle)) if self.kind in COUNTED else float(f"{middle:.3g}")
        return middle if min(weaker, stronger) < middle < max(weaker, stronger) else None


def sweeps(methods: Sequence[str], side: str | None, largest: int, hard: bool = False) -> list[Sweep]:
    """Return the sweeps of some methods: both sides of those whose side is in dispute, unless one is asked for."""
    sides = {method: ("tail", "top") if method in TWO_SIDED and side is None else (side,) for method in methods}
    return [Sweep.of(method, one, largest, hard) for method in methods for one in sides[method]]


@dataclass(frozen=True)
class Candidate:
    """A model that could be written, measured.

    Attributes:
        title: what is turned, for tables.
        method: a key of METHODS.
        side: which end is memory.
        amount: how much leads.
        dose: on the sweep's own scale; more removes more, but for ranks.
        removed: share of the update's energy in the memory part.
        reading: what was measured.
        shares: energy of each matrix's update, and the share of it in the memory part.
    """

    title: str
    method: str
    side: str
    amount: Amount
    dose: float
    removed: float
    reading: Reading
    shares: dict[Key, tuple[float, float]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, sweep: Sweep, dose: float, recorded: Recorded, reading: Reading) -> Candidate:
        """Make the candidate of one dose of a sweep, from what was noted while it was divided."""
        return cls(
            title=sweep.title,
            method=sweep.method,
            side=sweep.side,
            amount=sweep.amount(dose),
            dose=dose,
            removed=recorded.removed,
            reading=reading,
            shares=recorded.shares,
        )

    def to_json(self) -> JsonObject:
        """Return a JSON object."""
        return {
            "method": self.method,
            "memory_side": self.side,
            "amount": str(self.amount),
            "removed": self.removed,
            "title": self.title,
            **self.reading.to_json(),
        }


@dataclass
class Found:
    """What a sweep has to offer.

    Attributes:
        sweep: what was turned.
        candidates: all that was measured, by what it removes.
        best: the one that meets the target, or None.
    """

    sweep: Sweep
    candidates: list[Candidate] = field(default_factory=list)
    best: Candidate | None = None


class Trials:
    """The candidates of one sweep, measured one after the other.

    Attributes:
        sweep: what is turned.
    """

    def __init__(
        self, sweep: Sweep, inputs: Opened, options: SplitOptions, measure: Measure, run: Run, console: Console
    ) -> None:
        """Plan the split; nothing is read yet.

        Args:
            sweep: what is turned.
            inputs: what is divided.
            options: the split, but for method, side and amount.
            measure: what is measured.
            run: device and threads.
            console: where progress goes.
        """
        self.sweep, self._measure, self._device, self._console = sweep, measure, run.device, console
        self._world = run.world
        options = replace(options, method=sweep.method, amount=sweep.amount(sweep.grid[-1]), memory_side=sweep.side)
        sides = {NEEDS[need].side for need in METHODS[sweep.method].needs if need != "edit"}
        retain, forget = inputs.retain if "retain" in sides else None, inputs.forget if "forget" in sides else []
        self._plan = Splitter(inputs.reference, inputs.finetuned, options, retain, forget, inputs.edit)
        self._remembered = Remembered(half_the_room(), rank=int(max(sweep.grid)) if sweep.kind == "rank" else 1)

    @property
    def lesson(self) -> Lesson:
        """What this sweep has to remember, when its factors come block by block."""
        return Lesson(self._plan, self._remembered)

    def remember(self, lesson: Lesson) -> None:
        """Divide by what a sweep of the same method remembers: the factors are gone."""
        self._plan.factors.released, self._remembered = True, lesson.remembered

    def measure(self, dose: float) -> Candidate:
        """Measure one dose."""
        return self._said(Candidate.of(self.sweep, dose, *self._read(dose)))

    def measure_all(self, doses: Sequence[float]) -> list[Candidate]:
        """Measure several doses; of several ranks each takes some, when there are enough."""
        if not 1 < self._world.size <= len(doses):
            return [self.measure(dose) for dose in doses]

        def work(dose: float) -> tuple[dict[Key, tuple[float, float]], JsonObject]:
            recorded, reading = self._read(dose)
            return recorded.shares, reading.to_json()

        with self._measure.alone():
            found = self._world.each(doses, work)
        made = [(Recorded(self._remembered, shares), Reading(**reading)) for shares, reading in found]
        return [self._said(Candidate.of(self.sweep, dose, *one)) for dose, one in zip(doses, made, strict=True)]

    def _read(self, dose: float) -> tuple[Recorded, Reading]:
        recorded = Recorded(self._remembered)
        reading = self._measure.read(self._weights(dose, recorded))
        return recorded, reading

    def attack(self, candidate: Candidate) -> Candidate:
        """Return a candidate of this sweep with what relearning brings back."""
        if candidate.reading.relearn is not None or self._measure.no_attack:
            return candidate
        weights = self._weights(candidate.dose, self._remembered)
        return self._said(replace(candidate, reading=self._measure.attacked(weights, candidate.reading)))

    def control(self, candidate: Candidate) -> Candidate:
        """Measure a random edit that takes as much energy from every matrix as a candidate of this sweep does."""
        kept = {key: min(max(1 - removed, 0.0), 1.0) for key, (_, removed) in candidate.shares.items()}

        def random(layer: Layer, options: SplitOptions) -> tuple[torch.Tensor, MatrixReport]:
            part = Amount("energy", kept.get(key_of(layer), 1.0))
            return split_matrix(layer, replace(options, method="random", amount=part, memory_side="tail"))

        recorded = Recorded(random)
        reading = self._measure.read(self._weights(candidate.dose, recorded))
        # The amount shown is that of the edit it is as large as.
        made = Candidate.of(self.sweep, candidate.dose, recorded, reading)
        return self._said(replace(made, title=f"random, sized as {candidate.title}", method="random", side="tail"))

    def _weights(self, dose: float, division: Division) -> Unwritten:
        return Unwritten(self._plan, self._device, division).with_amount(self.sweep.amount(dose))

    def _said(self, candidate: Candidate) -> Candidate:
        self._console.detail(f"{candidate.title} {candidate.amount}: {candidate.reading}")
        return candidate


def half_the_room() -> int:
    """Return half of the bytes of host memory that are free: what may be kept of decompositions."""
    return spare_bytes() // 2


# Searching ------------------------------------------------------------------------------------------------------------------


def walk(trials: Trials) -> Found:
    """Measure the grid."""
    return Found(trials.sweep, trials.measure_all(trials.sweep.grid))


def search(trials: Trials, target: Target) -> Found:
    """Find the smallest dose after which the secrets are gone, or the largest that keeps what is to be kept.

    The grid is walked from the weakest dose to the first that reaches the goal, then the step before it is halved. Losses are
    nearly monotone in the dose, not quite: whatever was measured on the way and meets everything counts. Relearning is tried
    only where the target asks for it and the rest of it is met; in the end, always on the best.

    Args:
        trials: of the sweep.
        target: with the conditions that always hold.

    Returns:
        All candidates, and the best.
    """
    measured: dict[float, Candidate] = {}

    def past(dose: float) -> bool:
        """Whether a dose is past the border that is looked for."""
        candidate = measured[dose] = trials.measure(dose)
        if not target.has_goal:
            return not target.kept(candidate.reading)
        if not target.gone(candidate.reading, attacked=False):
            return False
        if "relearn" not in target.names or not target.kept(candidate.reading):
            return True
        measured[dose] = trials.attack(candidate)
        return target.gone(measured[dose].reading)

    weaker, border = _bracket(trials.sweep, past, lambda dose: target.kept(measured[dose].reading))
    for _ in range(STEPS):
        middle = None if weaker is None or border is None else trials.sweep.middle(weaker, border)
        if middle is None:
            break
        weaker, border = (weaker, middle) if past(middle) else (middle, border)
    best = None
    meeting = sorted((one for one in measured.values() if target.met(one.reading)), key=lambda one: one.removed)
    if meeting:
        best = trials.attack(meeting[0] if target.has_goal else meeting[-1])
        measured[best.dose] = best
    return Found(trials.sweep, sorted(measured.values(), key=lambda one: one.removed), best)


def _bracket(sweep: Sweep, past: Callable[[float], bool], kept: Callable[[float], bool]) -> tuple[float | None, float | None]:
    """Walk the grid; return the last dose before the border and the first past it, None where there is none."""
    weaker, spoilt = None, 0
    for dose in sweep.grid:
        if past(dose):
            # When already the weakest dose is too much, a weaker one is made up.
            return (sweep.below(dose) if weaker is None else weaker), dose
        weaker = dose
        spoilt = 0 if kept(dose) else spoilt + 1
        if spoilt >= PATIENCE:
            break
    return weaker, None


def best_sweep(found: Sequence[Found], target: Target) -> Found | None:
    """Return the sweep whose best candidate keeps most, or forgets most where nothing was asked of forgetting."""
    good = [(one, one.best) for one in found if one.best is not None]
    if not good:
        return None
    if target.has_goal:
        return min(good, key=lambda pair: _cost(pair[1]))[0]
    return max(good, key=lambda pair: pair[1].reading.forget or 0.0)[0]


def _cost(candidate: Candidate) -> tuple[float, float]:
    """What an edit costs: skill first, then general loss; a tenth of a per cent of skill is no difference."""
    reading = candidate.reading
    lost = -round(reading.retention, 3) if reading.retention is not None else 0.0
    return lost, reading.general_change if reading.general_change is not None else candidate.removed
