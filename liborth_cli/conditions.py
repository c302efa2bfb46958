"""Conditions on measured quantities: the one grammar of `--target` and `--require`.

    retention>=0.995, canary.extraction==0, general<=+1%, forget>=fresh-0.5*spread

Conditions are joined by commas. Each is a quantity (with the check that measures it before a dot, where there is one), one of
`<= >= == < >`, and a bound: a number, a percentage, or a sum of numbers and multiples of levels that are measured too. What
can be asked of is given by the caller as `Quantity` objects. A condition is held against a whole interval: both ends must meet
it, and what was not measured meets nothing.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import combinations

from liborth_cli.errors import UsageError, closest, cut

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
WORDS = {"<=": "at most", ">=": "at least", "==": "exactly", "<": "below", ">": "above"}
UPWARDS, DOWNWARDS = (">=", ">"), ("<=", "<", "==")
LARGEST_SHARE = 1.5
"""A share above this was meant as a percentage."""
_CONDITION = re.compile(r"(?:([A-Za-z][\w-]*)\.)?([A-Za-z][\w-]*)(<=|>=|==|=<|=>|<|>|=)([^<>=]+)")
_TERM = re.compile(r"([+-]?)(?:((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?:(%)|\*?([a-z_]+))?|([a-z_]+))")
_SHOWN = 60


@dataclass(frozen=True)
class Quantity:
    """Something that a condition can ask of.

    Attributes:
        comparisons: those that make sense.
        share: it is a share: 0.995 or 99.5 %, and 99.5 without a % is a slip.
        percent: a bound may be written with a %.
        levels: measured levels that a bound may refer to.
    """

    comparisons: tuple[str, ...] = tuple(COMPARISONS)
    share: bool = False
    percent: bool = True
    levels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bound:
    """What a quantity is held against: number + Σ factor · level.

    Attributes:
        number: the constant part; 0.01 where 1 % was written.
        levels: factors of measured levels, by name.
        signed: written with a sign or a %, which for some quantities means a change against a reference.
    """

    number: float = 0.0
    levels: Mapping[str, float] = field(default_factory=dict)
    signed: bool = False

    def value(self, measured: Mapping[str, float | None]) -> float:
        """Return the bound, given what was measured of its levels; NaN when one of them was not."""
        total = self.number
        for name, factor in self.levels.items():
            level = measured.get(name)
            total += math.nan if level is None else factor * level
        return total


@dataclass(frozen=True)
class Condition:
    """One condition.

    Attributes:
        text: as the user wrote it, without spaces.
        scope: the check that was named before the dot, or "".
        name: of the quantity.
        comparison: a key of COMPARISONS.
        bound: what it is held against.
    """

    text: str
    scope: str
    name: str
    comparison: str
    bound: Bound

    def met(self, low: float | None, high: float | None = None, levels: Mapping[str, float | None] | None = None) -> bool:
        """Tell whether a whole interval meets it.

        Args:
            low: lower end, or the value where there is no interval; None and NaN meet nothing.
            high: upper end; None is `low`.
            levels: what was measured of the levels that the bound refers to.
        """
        bound = self.bound.value(levels or {})
        if low is None or math.isnan(bound):
            return False
        if self.bound.levels:
            # A bound that was computed is not held against its own rounding.
            bound += {"<=": 1e-12, ">=": -1e-12}.get(self.comparison, 0.0)
        compare = COMPARISONS[self.comparison]
        return all(not math.isnan(end) and compare(end, bound) for end in (low, low if high is None else high))

    @property
    def words(self) -> str:
        """The comparison and the bound in words: "at least 0.99"."""
        return f"{WORDS[self.comparison]} {re.split('[<>=]+', self.text, maxsplit=1)[1]}"


def parse(text: str, option: str, quantities: Mapping[str, Quantity], scopes: Collection[str] = ()) -> tuple[Condition, ...]:
    """Read conditions.

    Args:
        text: what the user wrote.
        option: where, for messages: "--target".
        quantities: what can be asked of, by name.
        scopes: what may stand before a dot.

    Returns:
        At least one condition, in the order of the text.

    Raises:
        UsageError: when there is none, one cannot be read, asks of what nothing measures, or two contradict each other or say
            the same thing twice.
    """
    parts = [part for piece in text.split(",") if (part := re.sub(r"\s*([<>=*+-]+)\s*", r"\1", piece).strip())]
    if not parts:
        raise UsageError(f"{option}: no condition in it; write it like {_example(quantities)}, or leave the option out")
    found = tuple(_condition(part, option, quantities, scopes) for part in parts)
    for one, other in combinations(found, 2):
        _check_pair(one, other, option)
    return found


def _condition(part: str, option: str, quantities: Mapping[str, Quantity], scopes: Collection[str]) -> Condition:
    line = " ".join(part.split())
    shown = cut(line, _SHOWN)
    read = _CONDITION.fullmatch(part)
    if not read:
        raise UsageError(f"{option}: {shown!r}: write a quantity, one of <= >= == < >, and a bound: {_example(quantities)}")
    scope, name, comparison = read[1] or "", read[2].replace("-", "_"), read[3]
    if scope and scope not in scopes:
        raise UsageError(f"{option}: {shown}: there is no check {scope[:_SHOWN]!r}; {closest(scope, scopes)}")
    if name not in quantities:
        raise UsageError(f"{option}: {shown}: nothing measures {name[:_SHOWN]!r}; {closest(name, quantities)}")
    quantity = quantities[name]
    if comparison not in quantity.comparisons:
        raise UsageError(f"{option}: {shown}: {name} takes {' or '.join(quantity.comparisons)}, not {comparison}")
    bound = _bound(read[4], quantity)
    if bound is None:
        wanted = f"a number or a sum of {', '.join(quantity.levels)}" if quantity.levels else "a number"
        raise UsageError(f"{option}: {shown}: what follows {comparison} is not {wanted}; write it like {_example(quantities)}")
    if quantity.share and not 0 <= bound.number <= LARGEST_SHARE:
        raise UsageError(f"{option}: {shown}: {name} is a share, such as 0.995 or 99.5%")
    return Condition(part, scope, name, comparison, bound)


def _bound(text: str, quantity: Quantity) -> Bound | None:
    """Read a bound; None when it is none."""
    number, levels, signed, position = 0.0, dict[str, float](), False, 0
    while position < len(text):
        term = _TERM.match(text, position)
        if term is None or (position and not term[1]):
            return None
        sign, digits, percent, level = term[1], term[2], term[3], term[4] or term[5]
        whole = term.end() - position == len(text)
        value = (-1.0 if sign == "-" else 1.0) * float(digits or 1) / (100 if percent else 1)
        if (
            not math.isfinite(value)
            or (percent and not (whole and quantity.percent))
            or (level and level not in quantity.levels)
        ):
            return None
        if level:
            levels[level] = levels.get(level, 0.0) + value
        else:
            number += value
        signed = whole and bool(sign or percent)
        position = term.end()
    return Bound(number, levels, signed and not levels)


def _check_pair(one: Condition, other: Condition, option: str) -> None:
    """Refuse two conditions on one quantity that bound the same side of it, or leave nothing between them."""
    if (one.name, one.scope) != (other.name, other.scope) or one.bound.signed != other.bound.signed:
        return
    if "==" in (one.comparison, other.comparison) or one.comparison[0] == other.comparison[0]:
        raise UsageError(
            f"{option}: {one.text[:_SHOWN]} and {other.text[:_SHOWN]} say two things of {one.name}: give one of them"
        )
    least, most = (one.bound, other.bound) if one.comparison[0] == ">" else (other.bound, one.bound)
    names = {*least.levels, *most.levels}
    # Levels are losses and their spreads, never negative: with no larger factor anywhere, `most` lies below `least`.
    gaps = [most.number - least.number, *(most.levels.get(n, 0.0) - least.levels.get(n, 0.0) for n in names)]
    if all(gap <= 0 for gap in gaps) and any(gap < 0 for gap in gaps):
        raise UsageError(f"{option}: {one.text[:_SHOWN]} and {other.text[:_SHOWN]} contradict each other")


def _example(quantities: Mapping[str, Quantity]) -> str:
    """Make an example out of what there is."""
    share = [name for name, quantity in quantities.items() if quantity.share and ">=" in quantity.comparisons]
    name = "retention" if "retention" in quantities else (share or list(quantities))[0]
    return f"{name}>=0.99"
