"""Lays out what the certificate rests on: versions, inputs, hashes, seed, command."""

from __future__ import annotations

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
