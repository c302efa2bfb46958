"""An axis: from numbers to places on the page, where its ticks are, and how numbers are written for people."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LARGEST = 1e300  # beyond this a span may overflow
STEPS = (1, 2, 5, 10)
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MISSING = "–"


def number(value: float | None, digits: int = 4) -> str:
    """Write a number with so many significant digits; whole numbers are written out, None and NaN become a dash."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e9:
        return grouped(f"{int(value):,}")
    if 1e-4 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return grouped(trim(f"{value:.{decimals}f}"))
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return grouped(f"{trim(mantissa)}e{int(exponent)}")


def grouped(digits: str) -> str:
    """Write groups of digits apart by a thin space, and minus as a minus."""
    return digits.replace(",", "\u202f").replace("-", "−")


def trim(digits: str) -> str:
    """Drop zeros at the end of a decimal fraction."""
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def interval_text(low: float | None, high: float | None) -> str:
    """Write the two ends of an interval."""
    return f"{number(low)} to {number(high)}"


@dataclass(frozen=True)
class Scale:
    """A straight or logarithmic axis.

    Attributes:
        low: lower end; its base-10 logarithm on a logarithmic axis.
        high: upper end, likewise.
        start: where `low` is, in drawing units.
        end: where `high` is.
        log: whether it is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float | None) -> float | None:
        """Return where a number is, or None when it is nowhere on this axis."""
        place = _transform(value, self.log)
        return None if place is None else self._position(place)

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Choose about `most` round numbers inside the axis; return position and label of each."""
        if not self.log:
            return [(self._position(value), label) for value, label in _round_numbers(self.low, self.high, most)]
        slack = 1e-9 * (self.high - self.low)
        first, last = math.ceil(self.low - slack), math.floor(self.high + slack)
        if last - first >= 2:
            stride = math.ceil((last - first + 1) / most)
            return [(self._position(e), _power(e)) for e in range(first, last + 1) if e % stride == 0]
        places = [(math.log10(m) + e, m, e) for e in range(first - 1, last + 1) for m in (1, 2, 5)]
        inside = [p for p in places if self.low - slack <= p[0] <= self.high + slack]
        if len(inside) >= 2:
            return [(self._position(place), _power(e, m)) for place, m, e in inside]
        # Less than half a decade: a logarithmic axis is nearly straight here, so plain round numbers are the best ticks.
        marks = _round_numbers(10**self.low, 10**self.high, most - 1)
        return [(self._position(math.log10(value)), label) for value, label in marks if value > 0]

    def _position(self, place: float) -> float:
        return self.start + (place - self.low) / (self.high - self.low) * (self.end - self.start)


def fit(values: Iterable[float | None], start: float, end: float, log: bool = False, pad: float = 0.05) -> Scale:
    """Lay an axis over numbers.

    Args:
        values: everything that must be visible; what has no place on the axis is ignored.
        start: where the axis begins, in drawing units.
        end: where it ends.
        log: logarithmic.
        pad: empty share at both ends, except where a straight axis begins or ends at zero.
    """
    places = [place for value in values if (place := _transform(value, log)) is not None] or [0.0, 1.0]
    low, high = min(places), max(places)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        spread = 0.5 if log else abs(low) * 0.1 or 1.0
        return Scale(low - spread, high + spread, start, end, log)
    margins = [0.0 if edge == 0 and not log else (high - low) * pad for edge in (low, high)]
    return Scale(low - margins[0], high + margins[1], start, end, log)


def _transform(value: float | None, log: bool) -> float | None:
    """Return a number as the axis measures it, or None when it has no place there (not finite, or not positive)."""
    if value is None or not math.isfinite(value) or abs(value) > LARGEST or (log and value <= 0):
        return None
    return math.log10(value) if log else float(value)


def _power(exponent: int, mantissa: int = 1) -> str:
    """Write mantissa × 10^exponent as the tick of a logarithmic axis."""
    if -3 <= exponent <= 3:
        return number(mantissa * 10.0**exponent, 1)
    ten = "10" + str(exponent).translate(SUPERSCRIPTS)
    return ten if mantissa == 1 else f"{mantissa}×{ten}"


def _round_numbers(low: float, high: float, most: int) -> list[tuple[float, str]]:
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in STEPS if m * size >= raw * (1 - 1e-9))
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    slack = step * 1e-9
    indices = range(math.ceil((low - slack) / step), math.floor((high + slack) / step) + 1)
    if max(abs(low), abs(high)) >= 1e6 or decimals > 6:
        return [(i * step, number(i * step, 3) if i else "0") for i in indices]
    return [(i * step, grouped(f"{i * step:,.{decimals}f}")) for i in indices]
