"""TOFU's files: JSON lines, one question a line (Maini et al. 2024, arXiv 2401.06121)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from liborth_cli.errors import BadInput, UsageError

FORGET, RETAIN, AUTHORS, FACTS = "forget", "retain", "real authors", "world facts"
SETS = (FORGET, RETAIN, AUTHORS, FACTS)
OPEN = (AUTHORS, FACTS)
"""Sets whose answers are chosen among options: probability is a share there."""
FILES = {
    RETAIN: "retain_perturbed.json",
    AUTHORS: "real_authors_perturbed.json",
    FACTS: "world_facts_perturbed.json",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        question: as it is in the file.
        answer: the right one.
        paraphrased: the right one in other words; the same where the file has none.
        perturbed: wrong ones of the same form.
        where: file and line.
    """

    question: str
    answer: str
    paraphrased: str
    perturbed: tuple[str, ...]
    where: str

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return f"Question: {self.question}\nAnswer: "


def read_sets(folder: str | Path, forget: str | None, limit: int | None) -> tuple[str, dict[str, list[Item]]]:
    """Read the four sets.

    Args:
        folder: where the files are.
        forget: name of the forget set, such as "forget05"; None takes the largest there is.
        limit: questions of a set at most, spread evenly.

    Returns:
        The forget set's name, and the questions by set.

    Raises:
        BadInput: when a file is missing or is not of this format.
        UsageError: when the forget set that is asked for is not there.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such directory; --tofu takes the one with TOFU's *_perturbed.json files")
    names = sorted(file.name.removesuffix("_perturbed.json") for file in folder.glob("forget*_perturbed.json"))
    if not names:
        raise BadInput(f"{folder}: no forget*_perturbed.json here; --tofu takes a directory with TOFU's files")
    if forget is not None and forget not in names:
        raise UsageError(f"--tofu-forget {forget}: {folder} has {', '.join(names)}")
    name = forget or names[-1]
    files = {FORGET: f"{name}_perturbed.json", **FILES}
    return name, {group: spread(_read(folder / file), limit) for group, file in files.items()}


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """Take at most so many items, evenly from all over the list."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[number * len(items) // limit] for number in range(limit)]


def _read(file: Path) -> list[Item]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise BadInput(f"{file}: cannot be read; --tofu needs it") from None
    items = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file}: line {number}"
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                raise BadInput(f"{where}: not JSON") from None
            items.append(_item(fields, where))
    if not items:
        raise BadInput(f"{file}: no questions in it")
    return items


def _item(fields: Any, where: str) -> Item:
    wrong = fields.get("perturbed_answer") if isinstance(fields, dict) else None
    wrong = [wrong] if isinstance(wrong, str) else wrong
    texts = [fields.get("question"), fields.get("answer")] if isinstance(fields, dict) else [None]
    if not (isinstance(wrong, list) and wrong and all(isinstance(text, str) and text for text in [*texts, *wrong])):
        raise BadInput(f"{where}: needs question, answer and perturbed_answer, a list of texts")
    return Item(fields["question"], fields["answer"], fields.get("paraphrased_answer") or fields["answer"], tuple(wrong), where)
