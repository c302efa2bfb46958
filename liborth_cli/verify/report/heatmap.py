"""Shows a grid of numbers as a table whose cells are shaded: the numbers stay readable, also aloud and without colour."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from liborth_cli.verify.report.markup import Element, Node, element
from liborth_cli.verify.report.numbers import cell, number
from liborth_cli.verify.result import Heatmap

STEPS = 10  # shades in style.css: h0 … h10 above zero, n1 … n10 below
PANEL = 34  # rows of one panel; a taller grid stands in several, side by side where there is room
NARROW = 8  # columns that fit beside another figure


@dataclass(frozen=True)
class Shades:
    """Which shade a number gets.

    Attributes:
        low: the number with the lightest shade on white paper.
        high: the number with the strongest.
    """

    low: float
    high: float

    @classmethod
    def over(cls, heatmap: Heatmap) -> Shades:
        """Choose the range: from zero, so that shades compare as the numbers do, unless all are far away from it."""
        numbers = [v for row in heatmap.values for v in row if v is not None and math.isfinite(v)] or [0.0]
        low, high = min(numbers), max(numbers)
        if low < 0:
            return cls(0.0, max(-low, high))
        return cls(low if low > high / 2 else 0.0, high)

    def name(self, value: float | None) -> str | None:
        """Return the class of a cell."""
        if value is None or math.isnan(value):
            return None
        span = self.high - self.low
        share = (abs(value) - self.low) / span if span > 0 else 0.0
        step = round(STEPS * min(1.0, max(0.0, share)))
        return f"n{step}" if value < 0 and step else f"h{step}"


def grid(heatmap: Heatmap, labelled_by: str) -> Element:
    """Lay the grid out, in as many panels as it needs.

    Args:
        heatmap: the numbers.
        labelled_by: ids of the heading and the alternative text.
    """
    shades = Shades.over(heatmap)
    many = max(1, math.ceil(len(heatmap.rows) / PANEL))
    height = math.ceil(len(heatmap.rows) / many) or 1
    starts = range(0, len(heatmap.rows), height)
    panels = [_panel(heatmap, start, start + height, shades, labelled_by if many == 1 else None) for start in starts]
    broad = " broad" if len(heatmap.columns) > NARROW else ""
    return element("div", panels, class_=f"panels{broad}", role="region", aria_labelledby=labelled_by, tabindex=0)


def legend(heatmap: Heatmap) -> Element:
    """Show the shades with the numbers at their ends."""
    shades = Shades.over(heatmap)
    negative = any(v is not None and v < 0 for row in heatmap.values for v in row)
    names = [f"n{step}" for step in range(STEPS, 0, -1)] if negative else []
    names += [f"h{step}" for step in range(STEPS + 1)]
    width = 180 / len(names)
    boxes = [element("rect", x=i * width, width=width + 0.3, height=10, class_=name) for i, name in enumerate(names)]
    bar = element("svg", boxes, class_="shades", viewBox="0 0 180 10", width=180, height=10, aria_hidden="true")
    ends = number(-shades.high if negative else shades.low, 3), number(shades.high, 3)
    return element("p", ends[0], bar, ends[1], element("span", heatmap.unit, class_="unit"), class_="legend")


def wide(heatmap: Heatmap) -> bool:
    """Say whether the grid needs the whole width of the page."""
    return len(heatmap.rows) > PANEL or len(heatmap.columns) > NARROW


def breakable(name: str) -> list[Node]:
    """Let a long dotted name break after its dots and underscores only."""
    pieces = re.findall(r"[^._]+[._]*|[._]+", name) if len(name) > 6 else [name]
    return [part for piece in pieces for part in (piece, element("wbr"))][:-1]


def _panel(heatmap: Heatmap, start: int, stop: int, shades: Shades, labelled_by: str | None) -> Element:
    names = heatmap.rows[start:stop]
    head = element("tr", element("td"), [element("th", breakable(name), scope="col") for name in heatmap.columns])
    rows = []
    for name, values in zip(names, heatmap.values[start:stop], strict=False):
        cells = [element("td", cell(value), class_=shades.name(value)) for value in values]
        rows.append(element("tr", element("th", name, scope="row"), cells))
    label = None if labelled_by else f"{heatmap.title}, {names[0]} to {names[-1]}"
    body = element("thead", head), element("tbody", rows)
    return element("table", body, class_="heat", aria_labelledby=labelled_by, aria_label=label)
