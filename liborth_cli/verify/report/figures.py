"""Figures as the page's template needs them: which class each takes, and every cell already written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from liborth_cli.chart.axes import grouped, number, trim
from liborth_cli.verify.result import Figure, Heatmap, Plot, Table

STEPS = 10  # shades in style.css: h0 … h10 above zero, n1 … n10 below
PANEL = 34  # rows of one panel; a taller grid stands in several, side by side where there is room
NARROW = 8  # columns of a grid that fit beside another figure
ROWS = 500  # of a longer table the page shows the first; the downloads have them all
TALL = 18  # a longer table scrolls inside its own box on a screen
HALF = 540  # pixels: what a table may take when another figure stands beside it
CHARACTER, GAP = 7.6, 22  # pixels: of a letter, and between columns


@dataclass(frozen=True)
class Place:
    """Where a figure stands on the page.

    Attributes:
        figure: what to show.
        index: its number on the page, and in the data block.
        width: "wide", "alone" (a plot with its words beside it) or "".
    """

    figure: Figure
    index: int
    width: str

    @property
    def kind(self) -> str:
        """The figure's kind: "plot", "heatmap" or "table"."""
        return type(self.figure).__name__.lower()


def places(figures: Sequence[Figure], start: int) -> list[Place]:
    """Lay figures out two in a row; a plot left alone in its row gets its words beside it.

    Args:
        figures: of one check.
        start: the number of the first.
    """
    found, left = [], True
    for i, figure in enumerate(figures):
        wide = _is_wide(figure)
        last = i + 1 == len(figures) or _is_wide(figures[i + 1])
        alone = isinstance(figure, Plot) and left and last
        found.append(Place(figure, start + i, "wide" if wide else "alone" if alone else ""))
        left = wide or not left
    return found


def _is_wide(figure: Figure) -> bool:
    if isinstance(figure, Heatmap):
        return len(figure.rows) > PANEL or len(figure.columns) > NARROW
    return isinstance(figure, Table) and _pixels(figure) > HALF


def _pixels(table: Table) -> float:
    """Guess the width of a table, from its longest words and cells."""
    cells = zip(*table.rows[:ROWS], strict=True) if table.rows else [()] * len(table.columns)
    widths = [
        max([len(word) + 2 for word in name.split()] + [len(v) if isinstance(v, str) else 7 for v in column], default=2)
        for name, column in zip(table.columns, cells, strict=True)
    ]
    return sum(CHARACTER * width + GAP for width in widths)


@dataclass(frozen=True)
class Shades:
    """Which shade a number of a grid gets.

    Attributes:
        low: the number with the lightest shade on white paper.
        high: the number with the strongest.
        below: some number is negative.
    """

    low: float
    high: float
    below: bool = False

    @classmethod
    def over(cls, heatmap: Heatmap) -> Shades:
        """Choose the range: from zero, so that shades compare as the numbers do, unless all are far away from it."""
        numbers = [v for row in heatmap.values for v in row if v is not None and math.isfinite(v)] or [0.0]
        low, high = min(numbers), max(numbers)
        if low < 0:
            return cls(0.0, max(-low, high), below=True)
        return cls(low if low > high / 2 else 0.0, high)

    def name(self, value: float | None) -> str:
        """Return the class of a cell, or ""."""
        if value is None or math.isnan(value):
            return ""
        span = self.high - self.low
        share = (abs(value) - self.low) / span if span > 0 else 0.0
        step = round(STEPS * min(1.0, max(0.0, share)))
        return f"n{step}" if value < 0 and step else f"h{step}"

    @property
    def legend(self) -> tuple[str, list[str], str]:
        """The lowest number, the classes between it and the highest, and the highest."""
        names = [f"n{step}" for step in range(STEPS, 0, -1)] if self.below else []
        names += [f"h{step}" for step in range(STEPS + 1)]
        return number(-self.high if self.below else self.low, 3), names, number(self.high, 3)


def panels(heatmap: Heatmap) -> list[list[tuple[str, tuple[float | None, ...]]]]:
    """Cut a grid into as many panels of equal height as it needs: the name and the values of each row."""
    rows = list(zip(heatmap.rows, heatmap.values, strict=False))
    height = math.ceil(len(rows) / max(1, math.ceil(len(rows) / PANEL))) or 1
    return [rows[start : start + height] for start in range(0, len(rows), height)]


def breakable(name: str) -> list[str]:
    """Cut a long dotted name where a line may break: after its dots and underscores."""
    return re.findall(r"[^._]+[._]*|[._]+", name) if len(name) > 6 else [name]


def short_number(value: float | None) -> str:
    """Write a number in three significant digits, short enough for the cell of a grid."""
    if value is None or not math.isfinite(value):
        return number(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        decimals = 2 if value == 0 else min(3, max(0, 2 - math.floor(math.log10(abs(value)))))
        return grouped(f"{value:.{decimals}f}")
    mantissa, exponent = f"{value:.0e}".split("e")
    return grouped(f"{mantissa}e{int(exponent)}")


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: as it is shown.
        right: aligned to the right.
        code: a hash or the name of a tensor, in a fixed pitch.
    """

    text: str
    right: bool
    code: bool = False


def cells(table: Table) -> list[list[Cell]]:
    """Write the first rows of a table; the numbers of a column get the decimals they need, so that points stand aligned."""
    right = [name.startswith(">") for name in table.columns]
    columns = list(zip(*table.rows, strict=True)) or [()] * len(right)
    decimals = [_decimals(column) if numeric else None for column, numeric in zip(columns, right, strict=True)]
    return [[_cell(*one) for one in zip(row, right, decimals, strict=True)] for row in table.rows[:ROWS]]


def _cell(value: str | float | None, right: bool, decimals: int | None) -> Cell:
    if isinstance(value, bool):
        value = "yes" if value else "no"
    if isinstance(value, str):
        hexadecimal = len(value) >= 8 and all(c in "0123456789abcdef" for c in value.lower())
        return Cell(value, right, hexadecimal or (" " not in value and value.count(".") >= 2))
    if not right or decimals is None or value is None or not math.isfinite(value):
        return Cell(number(value), right)
    return Cell(grouped(f"{value:,.{decimals}f}"), right)


def _decimals(values: Iterable[object]) -> int | None:
    """Return how many decimals a column needs; None where its numbers differ too much in size to be written alike."""
    sizes = [abs(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v) and v]
    if not sizes or max(sizes) >= 1e6 or min(sizes) < 1e-4 or all(size == int(size) for size in sizes):
        return None
    most = max(0, 3 - math.floor(math.log10(max(sizes))))
    if min(sizes) < 10.0 ** (1 - most):
        return None
    return max(len(trim(f"{size:.{most}f}").partition(".")[2]) for size in sizes)
