"""Tables: those of a check, and the ones the page itself makes. A script makes the first kind sortable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from liborth_cli.verify.report.markup import Element, Node, element
from liborth_cli.verify.report.numbers import decimals, fixed, number
from liborth_cli.verify.result import Table

ROWS = 500  # of a longer table the page shows the first; the downloads have them all
TALL = 18  # a longer table scrolls inside its own box on a screen
HALF = 540  # pixels: what a table may take when another figure stands beside it
CHARACTER, GAP = 7.6, 22  # pixels: of a letter, and between columns


def sortable(table: Table, labelled_by: str) -> Element:
    """Lay out the table of a check.

    Args:
        table: the rows; columns whose name begins with ">" hold numbers.
        labelled_by: id of the heading.
    """
    numeric = [name.startswith(">") for name in table.columns]
    head = [
        element("th", name.removeprefix(">"), scope="col", class_="number" if right else None)
        for name, right in zip(table.columns, numeric, strict=True)
    ]
    places = [decimals(cells) if right else None for right, cells in zip(numeric, zip(*table.rows, strict=True), strict=False)]
    columns = list(zip(numeric, places or [None] * len(numeric), strict=True))
    rows = [
        element("tr", [_cell(value, *column) for value, column in zip(row, columns, strict=True)]) for row in table.rows[:ROWS]
    ]
    body = element("thead", element("tr", head)), element("tbody", rows)
    inner = element("table", body, class_="sortable", aria_labelledby=labelled_by)
    return scrolling(inner, labelled_by, tall=len(rows) > TALL)


def plain(columns: Sequence[str], rows: Iterable[Sequence[Node | list[Node]]], label: str) -> Element:
    """Lay out a table of the page itself.

    Args:
        columns: headings; ">" in front aligns a column to the right.
        rows: cells, already elements or text; the first of a row is its heading.
        label: what the table is, for who cannot see it.
    """
    classes = ["number" if name.startswith(">") else None for name in columns]
    names = [name.removeprefix(">") for name in columns]
    # Roles are spelled out because the style sheet stacks these tables on narrow screens, which would take them away.
    head = [element("th", n, scope="col", role="columnheader", class_=c) for n, c in zip(names, classes, strict=True)]
    body = []
    for first, *others in rows:
        cells = [
            element("td", value, class_=c, role="cell", data_label=n)
            for value, c, n in zip(others, classes[1:], names[1:], strict=True)
        ]
        body.append(element("tr", element("th", first, scope="row", role="rowheader"), cells, role="row"))
    return element(
        "table",
        element("thead", element("tr", head, role="row"), role="rowgroup"),
        element("tbody", body, role="rowgroup"),
        class_="plain stacking",
        aria_label=label,
        role="table",
    )


def scrolling(content: Element, labelled_by: str, tall: bool) -> Element:
    """Put what may be too wide, or too tall, into a box of its own that the keyboard can scroll."""
    return element(
        "div", content, class_="scroll tall" if tall else "scroll", role="region", aria_labelledby=labelled_by, tabindex=0
    )


def wide(table: Table) -> bool:
    """Say whether the table needs the whole width of the page: a guess, from its longest words and cells."""
    cells = zip(*table.rows[:ROWS], strict=True) if table.rows else [()] * len(table.columns)
    widths = [
        max([len(word) + 2 for word in name.split()] + [_length(value) for value in column], default=2)
        for name, column in zip(table.columns, cells, strict=True)
    ]
    return sum(CHARACTER * width + GAP for width in widths) > HALF


def _length(value: str | float | None) -> int:
    return len(value) if isinstance(value, str) else 7


def _cell(value: str | float | None, right: bool, places: int | None) -> Element:
    if isinstance(value, bool):
        value = "yes" if value else "no"
    if isinstance(value, (int, float)):
        return element("td", fixed(value, places) if right else number(value), class_="number" if right else None)
    if value is None:
        return element("td", "–", class_="number" if right else None)
    return element("td", element("code", value) if _is_code(value) else value, class_="number" if right else None)


def _is_code(text: str) -> bool:
    """Hashes and tensor names are set in a fixed pitch."""
    hexadecimal = len(text) >= 8 and all(c in "0123456789abcdef" for c in text.lower())
    dotted = " " not in text and text.count(".") >= 2
    return hexadecimal or dotted
