"""What was measured, as a table, as a document, and in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from liborth_cli.console import Console
from liborth_cli.dose.courses import TWO_SIDED
from liborth_cli.dose.gauge import Reading
from liborth_cli.dose.search import Found
from liborth_cli.dose.target import Target
from liborth_cli.dose.trials import Trial

EQUAL = 0.95
"""Skill kept at which two sides are compared, where both reach it."""


@dataclass
class Frontier:
    """Everything that was measured.

    Attributes:
        before: the reference.
        after: the fine-tuned checkpoint.
        found: one a course.
        controls: random edits.
        target: what was asked for, or None.
        chosen: the trial that is written, or None.
        why: the reasons, as sentences.
    """

    before: Reading
    after: Reading
    found: list[Found] = field(default_factory=list)
    controls: list[Trial] = field(default_factory=list)
    target: Target | None = None
    chosen: Trial | None = None
    why: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        document: dict[str, Any] = {
            "reference": self.before.to_json(),
            "finetuned": self.after.to_json(),
            "frontier": [trial.to_json() for one in self.found for trial in one.trials],
            "controls": [trial.to_json() for trial in self.controls],
            "sentences": [*self.why, *self.polarity()],
        }
        if self.target is not None:
            document["target"] = {"text": self.target.text, "conditions": [c.text for c in self.target.conditions]}
            document["found"] = self.chosen.to_json() if self.chosen else None
        return document

    def show(self, console: Console, out: bool) -> None:
        """Print the table, and what follows from it.

        Args:
            console: where to.
            out: on stdout: it is the result.
        """
        rows = [_row("reference", "", None, self.before), _row("fine-tuned", "", 0.0, self.after)]
        for one in self.found:
            rows += [self._trial(trial) for trial in one.trials]
        rows += [self._trial(trial) for trial in self.controls]
        # Columns that nothing was measured for are left out.
        used = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]
        columns, cells = [COLUMNS[i] for i in used], [[row[i] for i in used] for row in rows]
        console.table(columns, cells, "Losses in nats a token; general against the fine-tuned checkpoint.", out=out)
        for line in [*self.why, *self.polarity()]:
            if out and not console.as_json:
                console.result(line, {})
            else:
                console.note(line)

    def polarity(self) -> list[str]:
        """Say, for methods whose memory side is in dispute, on which side it was found."""
        lines = []
        for method in TWO_SIDED:
            sides = {one.course.side: one for one in self.found if one.course.method == method}
            if len(sides) < 2:
                continue
            curves = {side: self._curve(one) for side, one in sides.items()}
            at = max(EQUAL, *(min((kept for kept, _ in curve), default=1.0) for curve in curves.values()))
            low, high = (_interpolate(curves[side], at) for side in ("tail", "top"))
            if low is None or high is None:
                continue
            verdict = "low" if low > high else "high"
            lines.append(
                f"{method}: at {at:.1%} of the skill, removing low curvature takes the secrets to {low:.2f} nats and removing "
                f"high curvature to {high:.2f}: memory lies on the {verdict} side"
            )
        return lines

    def _curve(self, one: Found) -> list[tuple[float, float]]:
        readings = [self.after, *(trial.reading for trial in one.trials)]
        return sorted((r.retention, r.forget) for r in readings if r.retention is not None and r.forget is not None)

    def _trial(self, trial: Trial) -> list[str]:
        mark = ""
        if self.target is not None:
            mark = "chosen" if trial == self.chosen else "meets it" if self.target.met(trial.reading) else ""
        return _row(trial.title, str(trial.amount), trial.removed, trial.reading, mark)


COLUMNS = (
    "edit",
    "amount",
    ">energy removed",
    ">skill kept",
    ">general",
    ">forget loss",
    ">recited",
    ">never trained",
    "target",
)


def _row(title: str, amount: str, removed: float | None, reading: Reading, mark: str = "") -> list[str]:
    fresh = f"{reading.fresh:.2f} ± {reading.spread or 0:.2f}" if reading.fresh is not None else ""
    return [
        title,
        amount,
        "" if removed is None else f"{removed:.1%}",
        _show(reading.retention, ".1%"),
        _show(reading.general_change, "+.1%"),
        _show(reading.forget, ".3f"),
        _show(reading.recited, ".0%"),
        fresh,
        mark,
    ]


def _show(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _interpolate(curve: Sequence[tuple[float, float]], at: float) -> float | None:
    """Return y at x = `at` on a curve of points sorted by x; None outside."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= at <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None
