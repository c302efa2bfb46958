"""Which trial stands for a course, and sentences about what was found."""

from __future__ import annotations

from liborth_cli.dose.frontier import Frontier
from liborth_cli.dose.gauge import Gauge
from liborth_cli.dose.search import Found
from liborth_cli.dose.trials import Trial

SWOLLEN = 1.5
"""Energy of the memory part, in units of the update's, from which an edit is called swollen."""


def knee(found: Found, gauge: Gauge) -> Trial:
    """Return the weakest trial whose secrets reach half of the way to the never-trained level; the strongest when none does."""
    goal = (gauge.after.fresh or gauge.before.forget or 0.0) / 2
    reached = [t for t in found.trials if t.reading.forget is not None and t.reading.forget >= goal]
    return reached[0] if reached else found.trials[-1]


def swollen(frontier: Frontier) -> list[str]:
    """Warn of courses that take away more than there is: their parts are larger than the update."""
    worst = [max(one.trials, key=lambda t: t.removed) for one in frontier.found]
    return [
        f"warning: {t.title} {t.amount} moves {t.removed:.3g} times the energy of the update: its basis is not orthogonal, and "
        "retain factors of few tokens let it swell; no random edit is that large"
        for t in worst
        if t.removed > SWOLLEN
    ]


def why(best: Found | None, frontier: Frontier, method: str) -> list[str]:
    """Say which edit was chosen and why, or how close the best one came."""
    target = frontier.target
    assert target is not None
    lines = []
    if best is None or best.best is None:
        for one in frontier.found:
            if one.trials and method in ("auto", one.course.method):
                near = min(one.trials, key=lambda t: (len(target.missed(t.reading)), -(t.reading.forget or 0.0)))
                lines.append(
                    f"{near.title} {near.amount} comes closest, and misses {' and '.join(target.missed(near.reading))}"
                )
        return lines
    reading = best.best.reading
    kept = (
        f"{reading.retention:.2%} of the skill" if reading.retention is not None else f"{reading.general_change:+.2%} general"
    )
    lines.append(f"chosen: {best.best.title} {best.best.amount}, {kept}")
    for one in frontier.found:
        if one is not best and one.best is not None and one.best.reading.retention is not None:
            lines.append(f"{one.best.title} {one.best.amount} meets the target too, with {one.best.reading.retention:.2%}")
        elif one is not best:
            lines.append(f"{one.course.title} does not meet it")
    alike = [f"{control.title} {control.amount}" for control in frontier.controls if target.met(control.reading)]
    return lines + [f"warning: {title} meets the target as well: what was measured does not tell them apart" for title in alike]
