"""The lines of a journal and the owner file, as records: a stopped run's word is taken only as far as it can be read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints, ValidationError

from liborth_cli.checkpoint.documents import NotJson, parse
from liborth_cli.console import JsonObject
from liborth_cli.manifest import Count, File, Record, Text

Identity = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Place = tuple[Count, Count]
"""Device and inode."""


class Owner(Record):
    """The owner file of a claimed directory: the random id of the run that works in it."""

    id: Identity


class Head(Record):
    """The first line: whose journal it is, what decides the output's bytes, and where private files go."""

    owner: Identity
    plan: Text
    private: Annotated[str, Field(max_length=1 << 16)]


class Unit(Record):
    """A finished part: its files, and the hash of every input they were made from; the rest is the caller's."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    unit: Text
    files: list[File]
    private: Annotated[list[File], Field(default_factory=list)]
    inputs: dict[Text, Text]

    @property
    def record(self) -> JsonObject:
        """The line as it was written, without the name of the unit."""
        return self.model_dump(mode="json", exclude={"unit"}, exclude_unset=True)


class Commit(Record):
    """The last line: all files are there, and these directories are about to become the outputs."""

    commit: Annotated[list[Place], Field(min_length=1, max_length=2)]


class Lines:
    """What a journal says, up to the first line that a crash cut short or that cannot be read.

    Attributes:
        head: its first line; None when there is none.
        units: the finished parts.
        commit: the directories of a commit that had begun, or None.
        count: how many lines were understood.
    """

    def __init__(self, raw: bytes) -> None:
        """Read the lines of a journal."""
        self.head: Head | None = None
        self.units: list[Unit] = []
        self.commit: list[Place] | None = None
        self.count = 0
        for text in raw.splitlines():
            try:
                document, self.commit = parse(text), None
                if self.head is None:
                    self.head = Head.model_validate(document)
                elif "commit" in document:
                    self.commit = Commit.model_validate_json(text).commit
                elif "inputs" in document and "files" in document:  # what does not name both is made again
                    self.units.append(Unit.model_validate(document))
            except (NotJson, ValidationError, TypeError):
                break
            self.count += 1


def owner_of(raw: bytes | None) -> str | None:
    """Return the id in an owner file; None when it is not a sound one."""
    try:
        return Owner.model_validate(parse(raw or b"")).id
    except (NotJson, ValidationError):
        return None


def render(lines: Iterable[JsonObject]) -> bytes:
    """Write lines as they are read above."""
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
