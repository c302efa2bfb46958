"""A tree of elements and the one place where it becomes text: nothing can reach the page without being escaped there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from liborth_cli.console import clean

VOID = {"meta", "br", "wbr", "hr", "link"}
RAW = {"script", "style"}
ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"})
# A new line before these keeps the source readable and two certificates comparable line by line.
LINES = {
    "meta", "title", "style", "script", "body", "header", "main", "nav", "section", "footer", "h2", "p", "ul", "li", "dl",
    "dt", "figure", "figcaption", "table", "thead", "tbody", "tr", "div", "svg", "g", "path", "text",
}  # fmt: skip


@dataclass(frozen=True)
class Element:
    """One element, not yet text.

    Attributes:
        tag: its name.
        children: elements and plain strings.
        attributes: values by HTML or SVG name; None and False leave one out, True writes it bare.
    """

    tag: str
    children: tuple[Node, ...]
    attributes: dict[str, str | float | bool | None]


Node = Element | str


def element(tag: str, /, *children: Node | Iterable[Node | None] | None, **attributes: Any) -> Element:
    """Make an element.

    Args:
        tag: its name.
        *children: elements, plain strings, None (left out), or iterables of these.
        **attributes: by name, with `_` for `-` and a trailing `_` for names that Python keeps (`class_`).
    """
    nodes: list[Node] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, (str, Element)):
            nodes.append(child)
        else:
            nodes.extend(node for node in child if node is not None)
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    return Element(tag, tuple(nodes), named)


def render(node: Node) -> str:
    """Write a tree as HTML. The only function that emits markup.

    Raises:
        ValueError: for what the page's policy forbids or escaping cannot make safe: a style or event attribute, a link that
            leaves the page, a script or style sheet that contains markup.
    """
    if isinstance(node, str):
        return clean(node).translate(ENTITIES)
    start = f"\n<{node.tag}" if node.tag in LINES else f"<{node.tag}"
    opening = start + "".join(_attribute(name, value) for name, value in node.attributes.items()) + ">"
    if node.tag in VOID:
        return opening
    if node.tag in RAW:
        content = "".join(child for child in node.children if isinstance(child, str))
        if re.search(r"</|<!--|<script", content, re.IGNORECASE):
            raise ValueError(f"<{node.tag}> holds markup")
    else:
        content = "".join(map(render, node.children))
    return f"{opening}{content}</{node.tag}>"


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    if name == "style" or name.startswith("on"):
        raise ValueError(f"the page's policy forbids the attribute {name}")
    if name in ("href", "src") and not str(value).startswith("#"):
        raise ValueError(f"{name}={value!r} leaves the page")
    if value is True:
        return f" {name}"
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else clean(value).translate(ENTITIES)
    return f' {name}="{text}"'


def data_block(document: Any, identity: str) -> Element:
    """Embed a JSON document as a data block that no parser can mistake for markup.

    Args:
        document: anything `json` can write.
        identity: the element's id.
    """
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return element("script", text, id=identity, type="application/json")
