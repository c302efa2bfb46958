"""Whether the rows that were given can decide a requirement, told before anything runs.

Suppose nothing is left: canaries and fresh rows are draws of one kind. Few rows have wide intervals, and a requirement that
must hold over the whole interval is then missed by a model without a fault. How often it is met is known from the numbers of
rows alone. For areas under the ROC curve it does not depend on what the losses are (Mann and Whitney 1947): with n canaries and
m fresh rows the area is about normal around one half, with variance (n + m + 1)/12nm, and the bootstrap's interval has that
width. Where each canary is ranked among values of its own, its rank is uniform: among `CANDIDATES` the
mean of n has variance (1 + 2/CANDIDATES)/12n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from liborth_cli.conditions import Condition
from liborth_cli.verify.statistics import LEVEL, NORMAL, stretch

Chance = Callable[[Condition, int, int], float]
"""How often a condition is met when nothing is left, by the numbers of canaries and of fresh rows."""

ENOUGH = 0.8
"""Chance from which rows can decide, as is usual for the power of a test."""
MOST, CANDIDATES = 100_000, 16
STEPS = 50
"""Halvings that find a number between two."""


def weakness(condition: Condition, chance: Chance, canaries: int, fresh: int) -> str:
    """Say that these rows can hardly decide a requirement, and how many could; "" when they can, or no number could.

    Args:
        condition: what is required.
        chance: of the check that measures it.
        canaries: different ones.
        fresh: likewise.
    """
    if chance not in ALONE and not fresh:
        return ""
    here, enough = chance(condition, canaries, fresh), _needed(partial(chance, condition))
    if here >= ENOUGH or not enough:
        return ""
    beside, more = ("" if chance in ALONE else f" beside {count} fresh rows" for count in (fresh, enough))
    return (
        f"{canaries} canaries{beside} {'cannot' if here < 1 - LEVEL else 'can hardly'} decide {condition.text}: a model with "
        f"nothing left meets it with {here:.0%} of such rows; {enough} canaries{more} would do ({ENOUGH:.0%})"
    )


def area(condition: Condition, canaries: int, fresh: int) -> float:
    """Return the chance for an area under the ROC curve, which is one half when nothing is left."""
    return _beside(condition, canaries, fresh, folded=False)


def twice_off(condition: Condition, canaries: int, fresh: int) -> float:
    """Return the chance for abs(2·AUC − 1)."""
    return _beside(condition, canaries, fresh, folded=True)


def own_area(condition: Condition, canaries: int, fresh: int) -> float:
    """Return the chance for the mean rank, from 0 to 1, of canaries, each among `CANDIDATES` values of its own or more."""
    return _chance(condition, _own(canaries), canaries, folded=False)


def own_twice_off(condition: Condition, canaries: int, fresh: int) -> float:
    """Return the chance for abs(2·rank − 1)."""
    return _chance(condition, _own(canaries), canaries, folded=True)


def none_found(condition: Condition, canaries: int, fresh: int) -> float:
    """Return the chance for a share of the canaries, with its exact interval, when none of them is found."""
    return float(canaries > 0 and condition.met(0.0, 1 - ((1 - LEVEL) / 2) ** (1 / canaries)))


ALONE = (none_found, own_area, own_twice_off)
"""What fresh rows do not matter for."""


def _own(canaries: int) -> float:
    return math.sqrt((1 + 2 / CANDIDATES) / (12 * max(canaries, 1)))


def _needed(chance: Callable[[int, int], float]) -> int:
    """Return the smallest number of canaries, and as many fresh rows, that can decide; 0 when none can."""
    low, high = 1, MOST
    if chance(high, high) < ENOUGH:
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle, middle) >= ENOUGH else (middle, high)
    return high


def _beside(condition: Condition, canaries: int, fresh: int, folded: bool) -> float:
    """Return how often an area over canaries and fresh rows meets a condition."""
    if min(canaries, fresh) < 2:
        return 0.0
    spread = math.sqrt((canaries + fresh + 1) / (12 * canaries * fresh))
    return _chance(condition, spread, min(canaries, fresh), folded)


def _chance(condition: Condition, spread: float, groups: int, folded: bool) -> float:
    """Return how often a number around one half and its whole interval meet a condition.

    Args:
        condition: on it, or on how far twice of it is off one.
        spread: its standard deviation.
        groups: different rows whose luck it hangs on.
        folded: the second.
    """
    if groups < 2:
        return 0.0
    from scipy.special import ndtr

    wider = stretch(groups)

    def met(off: float) -> bool:
        """Tell whether an area so many deviations from one half meets it."""
        centre, reach = 0.5 + off * spread, wider * NORMAL * spread
        if folded:
            value = abs(2 * centre - 1)
            return condition.met(value) and condition.met(min(value + wider * _above(value, 2 * spread), 1.0))
        return condition.met(centre) and condition.met(max(centre - reach, 0.0), min(centre + reach, 1.0))

    return float(ndtr(_edge(met, 8.0)) - ndtr(-_edge(lambda off: met(-off), 8.0))) if met(0.0) else 0.0


def _above(value: float, spread: float) -> float:
    """Return how far above `value` the upper end of the interval of abs(x) lies, x normal around `value`."""
    from scipy.special import ndtr

    def below(x: float) -> bool:
        return ndtr((x - value) / spread) - ndtr((-x - value) / spread) < (1 + LEVEL) / 2

    return max(_edge(below, value + 6 * spread) - value, 0.0)


def _edge(holds: Callable[[float], bool], high: float) -> float:
    """Return up to where something holds that holds at 0: a number up to `high`."""
    low = 0.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
