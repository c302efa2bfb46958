"""Tables that were measured in parts, on several machines, put into one: what is new takes the place of what it measures anew.

Pairs are trained from seeds, so a line measured elsewhere, on a processor of the same kind, stands beside the others as if it
had been measured with them; its seconds do not.
"""

from __future__ import annotations

import re
from itertools import pairwise

ROWS = re.compile(r"^\|")
RULE = re.compile(r"^\|[-|]+\|$")


def merged(old: str, new: str, cells: bool = True) -> str:
    """Return the new section with the tables, rows and cells of the old one that it lacks.

    A table is known by the line of text above it, rows by their first cell, a column by its place. Overviews come first, and
    stand by kind; then the tables of each kind, in which new rows stand behind the old ones. Where several rows have the same
    first cell, all new ones take the place of all old ones.

    Args:
        old: a section that was written before; may be empty.
        new: one that would be written now.
        cells: an empty cell of a new row that has one predecessor keeps what stood there.
    """
    before, after = tables(old), tables(new)
    titles = sorted(before | after, key=lambda title: (_is_of_a_kind(title), title[:3]))
    every = [
        f"{title}\n\n{_joined(before.get(title, []), after.get(title, []), not _is_of_a_kind(title), cells)}"
        for title in titles
    ]
    return "\n\n".join(part for part in (_head(new) or _head(old), *every) if part)


def _head(section: str) -> str:
    """Return the text before the first table's title."""
    return next((part for part in section.strip().split("\n\n") if not ROWS.match(part) and not _is_title(part)), "")


def _is_of_a_kind(title: str) -> bool:
    return title.startswith("**")


def _is_title(part: str) -> bool:
    return part.rstrip().endswith(":") and "\n" not in part.strip()


def tables(section: str) -> dict[str, list[list[str]]]:
    """Return title → rows of cells, the head first and without the rule below it."""
    found, parts = dict[str, list[list[str]]](), section.strip().split("\n\n")
    for title, body in pairwise(parts):
        if _is_title(title) and ROWS.match(body):
            lines = [line for line in body.splitlines() if not RULE.match(line)]
            found[title.strip()] = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return found


def _joined(old: list[list[str]], new: list[list[str]], ordered: bool, cells: bool) -> str:
    """Write one table of both; `ordered` by the first cell. One that lacks the last columns of the other is filled up."""
    head = (new or old)[0]
    if old and old[0][: len(head)] == head:
        head = old[0]
    old, new = ([[*row, *[""] * (len(head) - len(row))] for row in some] if _begins(head, some) else [] for some in (old, new))
    groups = _groups(old[1:])
    for name, rows in _groups(new[1:]).items():
        earlier = groups.get(name, [])
        alone = cells and len(rows) == len(earlier) == 1
        groups[name] = [[cell or was for cell, was in zip(rows[0], earlier[0], strict=True)]] if alone else rows
    names = sorted(groups, key=str.casefold) if ordered else list(groups)
    text = [f"| {' | '.join(row)} |" for row in (head, *(line for name in names for line in groups[name]))]
    return "\n".join([text[0], "|" + "---|" * len(head), *text[1:]])


def _begins(head: list[str], table: list[list[str]]) -> bool:
    """Tell whether a table has the columns that a head begins with."""
    return bool(table) and head[: len(table[0])] == table[0]


def _groups(rows: list[list[str]]) -> dict[str, list[list[str]]]:
    """Return rows by their first cell."""
    found = dict[str, list[list[str]]]()
    for row in rows:
        found.setdefault(row[0], []).append(row)
    return found
