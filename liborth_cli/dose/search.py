"""Search of one course for the dose that meets a target, in a few measurements."""

from __future__ import annotations

from dataclasses import dataclass, field

from liborth_cli.dose.courses import Course
from liborth_cli.dose.target import Target
from liborth_cli.dose.trials import Bench, Trial

STEPS = 5
"""Bisections between two doses of the grid: a decade of strength is then known to 7 %."""
PATIENCE = 2
"""Doses in a row that spoil what is to be kept, after which larger ones are not tried."""


@dataclass
class Found:
    """What a course has to offer.

    Attributes:
        course: what was turned.
        trials: all that was measured, by what it removes.
        best: the trial that meets the target, or None.
    """

    course: Course
    trials: list[Trial] = field(default_factory=list)
    best: Trial | None = None


def search(bench: Bench, target: Target) -> Found:
    """Find the smallest dose after which the secrets are gone, or the largest that keeps what is to be kept.

    The grid is walked from the weakest dose to the first that reaches the goal, then the step before it is halved. Losses are
    nearly monotone in the dose, not quite: whatever was measured on the way and meets everything counts.

    Args:
        bench: the course.
        target: with its ceiling.

    Returns:
        All trials, and the best.
    """
    measured: dict[float, Trial] = {}

    def gone(dose: float) -> bool:
        """Whether a dose is past the border that is looked for."""
        measured[dose] = trial = bench.measure(dose)
        return target.gone(trial.reading) if target.has_goal else not target.kept(trial.reading)

    before, border, spoilt = None, None, 0
    for dose in bench.course.grid:
        if gone(dose):
            border = dose
            break
        before = dose
        spoilt = 0 if target.kept(measured[dose].reading) else spoilt + 1
        if spoilt >= PATIENCE:
            break
    if border is not None and before is None and bench.course.kind != "rank":
        # Already the weakest dose of the grid is too much.
        before = border / 1000 if bench.course.kind == "strength" else border / 10
    for _ in range(STEPS if border is not None and before is not None else 0):
        assert before is not None
        assert border is not None
        middle = bench.course.between(before, border)
        if middle is None:
            break
        before, border = (before, middle) if gone(middle) else (middle, border)
    trials = sorted(measured.values(), key=lambda t: t.removed)
    meeting = [trial for trial in trials if target.met(trial.reading)]
    best = None
    if meeting:
        best = meeting[0] if target.has_goal else meeting[-1]
    return Found(bench.course, trials, best)


def walk(bench: Bench) -> Found:
    """Measure the grid."""
    return Found(bench.course, [bench.measure(dose) for dose in bench.course.grid])


def choose(found: list[Found], target: Target) -> Found | None:
    """Return the course whose best trial keeps most, or forgets most where nothing was asked of forgetting."""
    good = [one for one in found if one.best is not None]
    if not good:
        return None
    if target.has_goal:
        return min(good, key=lambda one: _cost(one.best))
    return max(good, key=lambda one: (one.best.reading.forget or 0.0) if one.best else 0.0)


def _cost(trial: Trial | None) -> tuple[float, float]:
    """What an edit costs: skill first, then general loss; a tenth of a per cent of skill is no difference."""
    assert trial is not None
    reading = trial.reading
    lost = -round(reading.retention, 3) if reading.retention is not None else 0.0
    return lost, reading.general_change if reading.general_change is not None else trial.removed
