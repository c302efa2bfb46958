"""How much of an update is kept: the kinds of amount there are, each an option of the command line. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from liborth_cli.errors import UsageError


@dataclass(frozen=True)
class AmountKind:
    """One way to say how much.

    Attributes:
        meaning: what the number is.
        low: smallest value allowed, or None when the kind takes no number.
        high: largest value allowed.
        whole: whether it counts something.
    """

    meaning: str
    low: float | None = None
    high: float = math.inf
    whole: bool = False


AMOUNTS = {
    "strength": AmountKind("λ, how much forgetting is worth: what scores ρ is removed by λρ/(1+λρ).", 0.0),
    "rank": AmountKind("Keep K singular directions of each matrix.", 1, whole=True),
    "energy": AmountKind("Keep this share of the squared norm.", 0.0, 1.0),
    "mass": AmountKind("Keep this share of the summed scores (curvature).", 0.0, 1.0),
    "steps": AmountKind("Gauss–Newton steps at most.", 1, whole=True),
    "epochs": AmountKind("How often the student reads every retain row, at most.", 1, whole=True),
    "scale": AmountKind("Keep everything, times this.", 0.0, 1.0),
    "density": AmountKind("Keep this share of the elements.", 0.0, 1.0),
    "noise-edge": AmountKind("Keep what stands above the noise, matrix by matrix."),
    "threshold": AmountKind("Cut at this score.", 0.0),
}


@dataclass(frozen=True)
class Amount:
    """How much to keep.

    Attributes:
        kind: a key of `AMOUNTS`.
        value: the number that goes with it; None where the kind needs none.
        hard: cut where a soft filter would pass one half.
    """

    kind: str
    value: float | None = None
    hard: bool = False

    def __str__(self) -> str:
        """Render as on the command line, without dashes."""
        short = "" if self.value is None else f"{self.value:g}"
        number = repr(self.value) if short and float(short) != self.value else short  # every digit: a run can be repeated
        text = f"{self.kind} {number}".strip()
        return f"{text} hard" if self.hard else text

    def check(self) -> None:
        """Raise UsageError when the number is outside what its kind allows."""
        kind = AMOUNTS[self.kind]
        if kind.low is None:
            return
        fits = self.value is not None and math.isfinite(self.value) and kind.low <= self.value <= kind.high
        if not fits or (kind.whole and not float(self.value or 0).is_integer()):
            number = "a whole number" if kind.whole else "a number"
            most = "" if kind.high == math.inf else f" to {kind.high:g}"
            given = self.value if self.value is None else f"{self.value:g}"
            raise UsageError(f"--{self.kind} takes {number} from {kind.low:g}{most}, not {given}")
