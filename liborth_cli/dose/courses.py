"""The ways a dose can grow: a method, the side that is memory, and the one amount that is turned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from liborth_cli.methods import METHODS, Amount

KIND = {"strength": "strength", "mass": "mass", "rank": "rank", "energy": "energy", "scale": "scale"}
"""Amounts that can be turned, by the names of docs/methods.md; a method's first one among them is."""
GRID: dict[str, tuple[float, ...]] = {
    "strength": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0),
    "share": (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7),
}
"""Where a course is looked at first. A share is what is taken away, or moved to memory."""
LARGEST_RANK = 128
TWO_SIDED = ("kfac", "ekfac")
"""Methods whose memory side is in dispute: both are looked at."""


@dataclass(frozen=True)
class Course:
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

    @property
    def title(self) -> str:
        """For tables: the method, and its memory side where that is in dispute."""
        low = {"tail": "low", "top": "high"}[self.side]
        return f"{self.method}, {low} is memory" if self.method in TWO_SIDED else self.method

    def amount(self, dose: float) -> Amount:
        """Return the amount that stands for a dose."""
        if self.kind == "rank":
            return Amount("rank", round(dose))
        if self.kind == "strength":
            return Amount("strength", dose, self.hard)
        # What leads is kept when memory is the tail, and removed when it is the top.
        return Amount(self.kind, dose if self.side == "top" else 1 - dose)

    def between(self, weaker: float, stronger: float) -> float | None:
        """Return the dose half way between two, in equal ratios; None when there is none."""
        middle = (weaker * stronger) ** 0.5
        middle = float(round(middle)) if self.kind == "rank" else float(f"{middle:.3g}")
        return middle if min(weaker, stronger) < middle < max(weaker, stronger) else None


def course(method: str, side: str | None, largest: int, hard: bool = False) -> Course:
    """Return the course of one method.

    Args:
        method: a key of METHODS.
        side: which end is memory; None leaves it to the method.
        largest: the shorter side of the largest matrix.
        hard: cut, where the method has a choice.
    """
    kind = next(kind for kind in METHODS[method].amounts if kind in KIND)
    if kind == "rank":
        top = min(LARGEST_RANK, max(largest // 2, 1))
        grid = tuple(float(2**i) for i in range(top.bit_length() - 1, -1, -1))
    else:
        grid = GRID.get(kind, GRID["share"])
    return Course(method, side or METHODS[method].memory_side, kind, grid, hard)


def courses(methods: Sequence[str], side: str | None, largest: int, hard: bool = False) -> list[Course]:
    """Return the courses of some methods: both sides of those whose side is in dispute, unless one is asked for."""
    found = []
    for method in methods:
        sides = ("tail", "top") if method in TWO_SIDED and side is None else (side,)
        found += [course(method, s, largest, hard and "threshold" in METHODS[method].amounts) for s in sides]
    return found


def allowed(held: Sequence[str]) -> list[str]:
    """Return the methods that what is there suffices for; `random` is a control and never among them.

    Args:
        held: "retain", "forget", "moments", "diagonal": what is there or can be measured.
    """
    return [name for name, method in METHODS.items() if name != "random" and set(method.needs) <= set(held)]
