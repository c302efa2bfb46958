"""The model card that a user wrote beside a checkpoint: its licence, base model and language are carried over, and its text.

What it measured is not: those are results of another model. Neither are example prompts, which may be private.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from liborth_cli.checkpoint.documents import read_small
from liborth_cli.checkpoint.sidecars import homes
from liborth_cli.console import Json
from liborth_cli.errors import BadInput

FILE = "README.md"
MAX_BYTES = 200_000
OTHERS = ("model-index", "eval_results", "widget", "inference")
"""Keys of the head that say something of another model, or hold texts to try."""
FOLLOWS = "<!-- liborth: what follows is the card that came with the checkpoint -->"
TAG = "liborth"
FALLBACK = ("license", "license_name", "license_link", "language")
"""What the card of the model before fine-tuning says where the fine-tuned one's is silent."""


@dataclass(frozen=True)
class UserCard:
    """A card: the head that the hub reads, and the text.

    Attributes:
        head: by key, plain JSON.
        text: Markdown; "" where there is none, or where liborth wrote all of it.
        note: why the card of a user could not be carried over, or "".
    """

    head: Mapping[str, Json] = field(default_factory=dict)
    text: str = ""
    note: str = ""

    def over(self, other: UserCard) -> UserCard:
        """Return this card, with the licence and language of another where it says nothing of them."""
        found = {key: other.head[key] for key in FALLBACK if key in other.head}
        return self if "license" in self.head else UserCard({**found, **self.head}, self.text, self.note)


def read_card(place: Path) -> UserCard:
    """Read the card beside a checkpoint; an empty one where there is none that can be read.

    Args:
        place: the checkpoint's directory, or a file in it.
    """
    path = (place if place.is_dir() else place.parent) / FILE
    if not os.path.isfile(path):
        return UserCard()
    if path.is_symlink() and path.resolve().parent not in homes(path.parent):
        return UserCard(note=f"{path}: this card is not carried over: a link")
    try:
        head, text = cut(read_small(path, MAX_BYTES).decode())
    except (BadInput, ValueError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).rpartition(": ")[2]
        return UserCard(note=f"{path}: this card is not carried over: {why}")
    tags = head.get("tags")
    ours = isinstance(tags, list) and TAG in tags
    _, mark, after = text.partition(FOLLOWS)
    return UserCard({k: v for k, v in head.items() if k not in OTHERS}, (after if mark else "" if ours else text).strip())


def cut(text: str) -> tuple[dict[str, Json], str]:
    """Cut a card into its head and its text.

    Raises:
        ValueError: when the head is not YAML that JSON has words for; says why.
    """
    import yaml

    lines = text.lstrip("\ufeff").splitlines(keepends=True)
    if not lines or lines[0].strip() != "---":
        return {}, text
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        raise ValueError("its head has no end")
    try:
        head = yaml.safe_load("".join(lines[1:end])) or {}
        written = json.dumps(head, allow_nan=False, default=str)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise ValueError("its head is not YAML") from None
    if len(written) > MAX_BYTES or not isinstance(head, dict) or not all(isinstance(key, str) for key in head):
        raise ValueError("its head is no list of keys and values")
    return json.loads(written), "".join(lines[end + 1 :])
