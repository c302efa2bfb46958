"""What a dose search measured, as a table, as a document, and in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from liborth_cli.console import Console, Json, JsonObject
from liborth_cli.dose.measure import ATTACK_STEPS, Reading
from liborth_cli.dose.sweep import TWO_SIDED, Candidate, Found
from liborth_cli.dose.target import Target

EQUAL = 0.95
"""Skill kept at which two sides are compared, where both reach it."""
LARGE = 1.5
"""Energy of the memory part, in units of the update's, from which a candidate is warned of."""
TOLD_APART, BACK = 0.4, 0.5
"""`leak`, and nats of `relearn`, above which a chosen candidate is warned of: what `verify` requires by itself."""
CAPTION = (
    "Losses in nats a token; general against the fine-tuned checkpoint; never trained: the candidate's own loss on such rows. "
    "Told apart: |2·AUC − 1| of secrets against those rows. "
    f"Relearning: {ATTACK_STEPS} steps on half of the secrets, how far the other half gets below the controls, and recited."
)


@dataclass
class Frontier:
    """Everything that was measured.

    Attributes:
        before: the reference.
        after: the fine-tuned checkpoint.
        found: one a sweep.
        controls: random edits.
        target: what was asked for, or None.
        chosen: the candidate that is written, or None.
        rows: on which rows, in words.
        no_attack: why relearning was not tried, or "".
        notes: what was done before anything was measured, as sentences.
        reasons: why it was chosen, or what was missed, as sentences.
    """

    before: Reading
    after: Reading
    found: list[Found] = field(default_factory=list)
    controls: list[Candidate] = field(default_factory=list)
    target: Target | None = None
    chosen: Candidate | None = None
    rows: str = ""
    no_attack: str = ""
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> JsonObject:
        """Return a JSON object."""
        document: dict[str, Json] = {
            "reference": self.before.to_json(),
            "finetuned": self.after.to_json(),
            "frontier": [candidate.to_json() for one in self.found for candidate in one.candidates],
            "controls": [candidate.to_json() for candidate in self.controls],
            "sentences": self.sentences(),
        }
        if self.target is not None:
            document["target"] = {"text": self.target.text, "conditions": [c.text for c in self.target.conditions]}
            document["found"] = self.chosen.to_json() if self.chosen else None
        return document

    def show(self, console: Console, out: bool) -> None:
        """Print the table, and what follows from it; on stdout when it is the result (`out`)."""
        rows = [_row("reference", "", None, self.before), _row("fine-tuned", "", 0.0, self.after)]
        for candidate in [*(candidate for one in self.found for candidate in one.candidates), *self.controls]:
            mark = ""
            if self.target is not None:
                mark = "chosen" if candidate == self.chosen else "meets it" if self.target.met(candidate.reading) else ""
            rows.append(_row(candidate.title, str(candidate.amount), candidate.removed, candidate.reading, mark))
        console.table(COLUMNS, rows, CAPTION, out=out)
        for line in self.sentences():
            if out and not console.as_json:
                console.result(line, {})
            else:
                console.note(line)

    def judge(self, best: Found | None, asked: Sequence[Found]) -> None:
        """Take the best sweep of a target, and say why: or how close those came that were asked for."""
        target = self.target
        assert target is not None
        if best is None or best.best is None:
            for one in asked:
                near = min(one.candidates, key=lambda c: (len(target.missed(c.reading)), -(c.reading.forget or 0.0)))
                missed = " and ".join(target.missed(near.reading))
                self.reasons.append(f"{near.title} {near.amount} comes closest, and misses {missed}")
            return
        self.chosen = best.best
        self.reasons.append(f"chosen: {_kept(best.best)}")
        for one in self.found:
            if one is not best:
                title = one.sweep.title
                self.reasons.append(f"{_kept(one.best)}, meets the target too" if one.best else f"{title} does not meet it")
        self.reasons += [
            f"warning: {control.title} {control.amount} meets the target as well: what was measured does not tell them apart"
            for control in self.controls
            if not target.missed(control.reading, lambda condition: condition.name != "relearn")
        ]

    def sentences(self) -> list[str]:
        """Say what was found: warnings, the choice, the side of memory, and what a target does not promise."""
        lines = [
            f"warning: {worst.title} {worst.amount} moves {worst.removed:.3g} times the energy of the update: its basis is not "
            "orthogonal, and retain factors of few tokens let it grow; no random edit is that large"
            for one in self.found
            if (worst := max(one.candidates, key=lambda candidate: candidate.removed)).removed > LARGE
        ]
        lines += [*self.notes, *([self.rows] if self.rows else []), *self.reasons, *self._polarity()]
        if self.target is not None and self.chosen is not None:
            lines += [*self._remains(self.chosen.reading), self.target.limits()]
        return lines

    def _remains(self, reading: Reading) -> list[str]:
        """Say of the chosen candidate what can still be told, and what comes back."""
        lines = []
        if reading.leak is not None:
            seen = f"secrets and never-trained rows differ in loss: told apart {reading.leak:.2f} (0: not at all, 1: always)"
            lines.append(self._warned(seen, "leak", reading.leak > TOLD_APART))
        elif reading.forget is not None:
            lines.append("whether the secrets can be told from never-trained rows was not measured: too few rows of one kind")
        if reading.relearn is not None and reading.relearned is not None:
            seen = (
                f"relearning: after {ATTACK_STEPS} steps on half of the secrets the other half is {reading.relearn:+.2f} nats "
                f"closer than the control, and {reading.relearned:.0%} of them are recited"
            )
            lines.append(self._warned(seen, "relearn", reading.relearn > BACK or reading.relearned > 0))
        elif reading.forget is not None:
            lines.append(f"relearning was not tried: {self.no_attack}")
        return lines

    def _warned(self, seen: str, name: str, bad: bool) -> str:
        hint = "" if self.target is None or name in self.target.names else f"; ask for {name}<=…"
        return f"warning: {seen}{hint}" if bad else seen

    def _polarity(self) -> list[str]:
        """Say, for methods whose memory side is in dispute, on which side it was found."""
        lines = []
        for method in TWO_SIDED:
            sides = {one.sweep.side: one for one in self.found if one.sweep.method == method}
            if len(sides) < 2:
                continue
            curves = {side: self._curve(one) for side, one in sides.items()}
            at = max(EQUAL, *(min((kept for kept, _ in curve), default=1.0) for curve in curves.values()))
            low, high = (_interpolate(curves[side], at) for side in ("tail", "top"))
            if low is None or high is None:
                continue
            lines.append(
                f"{method}: at {at:.1%} of the skill, removing low curvature takes the secrets to {low:.2f} nats and removing "
                f"high curvature to {high:.2f}: memory lies on the {'low' if low > high else 'high'} side"
            )
        return lines

    def _curve(self, one: Found) -> list[tuple[float, float]]:
        readings = [self.after, *(candidate.reading for candidate in one.candidates)]
        return sorted((r.retention, r.forget) for r in readings if r.retention is not None and r.forget is not None)


COLUMNS = (
    "edit", "amount", ">energy removed", ">skill kept", ">general", ">forget loss", ">recited", ">never trained", ">told apart",
    ">relearning", "target",
)  # fmt: skip


def _row(title: str, amount: str, removed: float | None, reading: Reading, mark: str = "") -> list[str]:
    back = f"{reading.relearn:+.2f}, {reading.relearned:.0%}" if reading.relearn is not None else ""
    return [
        title, amount, _show(removed, ".1%"), _show(reading.retention, ".1%"), _show(reading.general_change, "+.1%"),
        _show(reading.forget, ".3f"), _show(reading.recited, ".0%"),
        f"{reading.fresh:.2f} ± {reading.spread or 0:.2f}" if reading.fresh is not None else "", _show(reading.leak, ".2f"),
        back, mark,
    ]  # fmt: skip


def _show(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _kept(candidate: Candidate) -> str:
    reading = candidate.reading
    if reading.retention is not None:
        return f"{candidate.title} {candidate.amount}, {reading.retention:.2%} of the skill"
    return f"{candidate.title} {candidate.amount}, {_show(reading.general_change, '+.2%')} general"


def _interpolate(curve: Sequence[tuple[float, float]], at: float) -> float | None:
    """Return y at x = `at` on a curve of points sorted by x; None outside."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= at <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None
