"""How numbers are written for people."""

from __future__ import annotations

import math
from collections.abc import Iterable

from liborth_cli.verify.result import Metric

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MISSING = "–"


def number(value: float | None, digits: int = 4) -> str:
    """Write a number with so many significant digits; whole numbers are written out.

    Args:
        value: the number; None and NaN become a dash.
        digits: significant digits.
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}".replace(",", "\u202f").replace("-", "−")
    if 1e-4 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return _trim(f"{value:.{decimals}f}").replace("-", "−")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{_trim(mantissa)}e{int(exponent)}".replace("-", "−")


def cell(value: float | None) -> str:
    """Write a number in three significant digits, short enough for the cell of a grid."""
    if value is None or not math.isfinite(value):
        return number(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        decimals = 2 if value == 0 else min(3, max(0, 2 - math.floor(math.log10(abs(value)))))
        return f"{value:.{decimals}f}".replace("-", "−")
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def decimals(values: Iterable[object]) -> int | None:
    """Choose how many decimals a column of numbers needs, so that its points stand below each other.

    Args:
        values: the cells; what is no finite number is ignored.

    Returns:
        Decimals, or None where the numbers differ too much in size to be written alike.
    """
    sizes = [abs(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v) and v]
    if not sizes or max(sizes) >= 1e6 or min(sizes) < 1e-4 or all(size == int(size) for size in sizes):
        return None
    most = max(0, 3 - math.floor(math.log10(max(sizes))))
    if min(sizes) < 10.0 ** (1 - most):
        return None
    return max(len(_trim(f"{size:.{most}f}").partition(".")[2]) for size in sizes)


def fixed(value: float | None, places: int | None) -> str:
    """Write a number with so many decimals, or as `number` does."""
    if places is None or value is None or not math.isfinite(value):
        return number(value)
    return f"{value:,.{places}f}".replace(",", "\u202f").replace("-", "−")


def power(exponent: int, mantissa: int = 1) -> str:
    """Write mantissa × 10^exponent as the tick of a logarithmic axis."""
    if -3 <= exponent <= 3:
        return number(mantissa * 10.0**exponent, 1)
    ten = "10" + str(exponent).translate(SUPERSCRIPTS)
    return ten if mantissa == 1 else f"{mantissa}×{ten}"


def interval(metric: Metric) -> str:
    """Write the interval of a metric, or say that there is none."""
    if metric.low == metric.high == metric.value:
        return "exact"
    return between(metric.low, metric.high)


def between(low: float | None, high: float | None) -> str:
    """Write the two ends of an interval."""
    return f"{number(low)} to {number(high)}"


def count(many: int, thing: str) -> str:
    """Write a number of things: "1 row", "24 rows"."""
    return f"{number(many)} {thing}{'' if many == 1 else 's'}"


def _trim(mantissa: str) -> str:
    return mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
