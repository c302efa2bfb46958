r"""Fields of records that go by other names: `prompt=instruction`, as `--map` takes it, and behind the name of a file.

A backslash stands before a comma, +, = or backslash that belongs to a name: `prompt=last\, first`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liborth_cli.errors import BadInput, UsageError, closest, shown

FIELDS = (
    "text", "prompt", "completion", "question", "answer", "instruction", "input", "output", "messages", "tools", "input_ids",
    "attention_mask", "labels", "loss_weight",
)  # fmt: skip
"""What a record may say."""
EMPTY: tuple[object, ...] = (None, "", [], {}, ())
"""What a field says that says nothing."""
_ESCAPED = r"\\[\\,+=]"
_NAMES = rf"(?:{_ESCAPED}|\\(?![\\,+=])|[^\\=])+"
_BEHIND = re.compile(rf"(.+)@(\w+={_NAMES}(?:,\w+={_NAMES})*)", re.DOTALL)


@dataclass(frozen=True)
class FieldMap:
    """What the fields of a file are called.

    Attributes:
        sources: field of a record → the file's own names for it; the texts of several are joined by line breaks.
    """

    sources: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @classmethod
    def parse(cls, words: Iterable[str], option: str = "--map") -> FieldMap:
        """Read `prompt=instruction`, `prompt=instruction+input`, or several behind one another with commas.

        Raises:
            UsageError: when a field is none, or is named twice.
        """
        found: dict[str, tuple[str, ...]] = {}
        for word in (part for one in words for part in _split(one, ",")):
            field, _, names = (part.strip() for part in word.partition("="))
            parts = tuple(re.sub(rf"({_ESCAPED})", lambda sign: sign[0][1], name).strip() for name in _split(names, "+"))
            if not all(parts):
                raise UsageError(f"{option} {shown(word)}: write FIELD=NAME, such as prompt=instruction")
            if field not in FIELDS:
                raise UsageError(f"{option} {shown(word)}: a record has no field {shown(field)}; {closest(field, FIELDS)}")
            if field in found:
                raise UsageError(f"{option} {shown(word)}: {field} is named twice; join two with +, as {field}=first+second")
            found[field] = parts
        return cls(tuple(found.items()))

    @classmethod
    def behind(cls, text: str) -> tuple[str, FieldMap]:
        """Return a file's name without what stands behind its @, and that: `rows.jsonl@prompt=instruction`.

        Raises:
            UsageError: as `parse`.
        """
        found = _BEHIND.fullmatch(text)
        if not found or Path(text).exists():
            return text, cls()
        return found[1], cls.parse([found[2]], "FILE@")

    def __str__(self) -> str:
        """As it is written behind the name of a file."""
        escaped = [(field, [re.sub(r"([\\,+=])", r"\\\1", name) for name in names]) for field, names in self.sources]
        return ",".join(f"{field}={'+'.join(names)}" for field, names in escaped)

    def __bool__(self) -> bool:
        """Whether any field has another name."""
        return bool(self.sources)

    @property
    def fields(self) -> frozenset[str]:
        """The fields of a record that are named."""
        return frozenset(field for field, _ in self.sources)

    def apply(self, record: Mapping[str, Any], where: str, known: Sequence[str] = ()) -> Mapping[str, Any]:
        """Return a record under our names; what a named field replaces is not read.

        Args:
            record: as the file has it.
            where: file and line, for messages.
            known: its names that may be repeated in a message.

        Raises:
            BadInput: when it has not what is named, or something that is no text would be joined.
        """
        taken = {name for _, names in self.sources for name in names}
        for name in sorted(taken - record.keys()):
            advice = closest(name, known, "" if known else "it has other fields, and no header may be missing")
            raise BadInput(f"{where}: --map: no field {shown(name, 40)}; {advice}")
        if "instruction" in taken and "input" not in taken and record.get("input") not in EMPTY:
            raise BadInput(f"{where}: --map leaves the field input out, and it is not empty: prompt=instruction+input reads it")
        made = {name: value for name, value in record.items() if name not in taken}
        return {**made, **{field: _joined([record[name] for name in names], where) for field, names in self.sources}}


AS_NAMED = FieldMap()
"""Every field has the name of ours."""


def with_map(file: str, words: Sequence[str]) -> str:
    """Put what `--map` says behind the name of a file that says nothing of its own."""
    return file if not words or FieldMap.behind(file)[1] else f"{file}@{FieldMap.parse(words)}"


def _split(text: str, sign: str) -> list[str]:
    """Split a text at a sign that no backslash stands before."""
    parts = [""]
    for piece in re.findall(rf"{_ESCAPED}|.", text, re.DOTALL):
        if piece == sign:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def _joined(values: Sequence[Any], where: str) -> Any:
    if len(values) == 1:
        return values[0]
    parts = [value for value in values if value not in EMPTY]
    if not all(isinstance(part, str) for part in parts):
        raise BadInput(f"{where}: --map joins texts with +, and a field is no text")
    return "\n".join(parts)
