"""Lays out what the certificate rests on: versions, inputs, hashes, seed, command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from liborth_cli.verify.report.markup import Element, Node, element
from liborth_cli.verify.report.numbers import number

DEEP = 6  # levels; what lies deeper is in the JSON document


def listing(facts: dict[str, Any], depth: int = 0) -> Element:
    """Lay out nested facts as nested definition lists.

    Args:
        facts: strings, numbers, lists and dictionaries.
        depth: how deep this list is.
    """
    entries: list[Node] = []
    for name, value in facts.items():
        entries += [element("dt", str(name).replace("_", " ")), element("dd", _value(value, depth))]
    return element("dl", entries)


def _value(value: Any, depth: int) -> Node:
    if isinstance(value, dict) and value and depth < DEEP:
        return listing(value, depth + 1)
    if isinstance(value, (list, tuple)) and value and depth < DEEP:
        if columns := _shared_names(value):
            return _table(columns, value)
        return element("ul", [element("li", _value(item, depth + 1)) for item in value])
    if value is None or value in ({}, [], ()):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 6)
    if isinstance(value, int):
        return str(value)
    return element("code", str(value))


def _shared_names(items: Sequence[Any]) -> list[str]:
    """Return the names that flat records have in common, or nothing when the items are something else."""
    if len(items) < 2 or not all(isinstance(item, dict) and list(item) == list(items[0]) for item in items):
        return []
    flat = not any(isinstance(value, (dict, list, tuple)) for item in items for value in item.values())
    return list(items[0]) if flat else []


def _table(columns: list[str], items: Sequence[Any]) -> Element:
    head = element("tr", [element("th", str(name).replace("_", " "), scope="col") for name in columns])
    rows = [element("tr", [element("td", _value(item[name], DEEP)) for name in columns]) for item in items]
    return element("table", element("thead", head), element("tbody", rows), class_="facts")
