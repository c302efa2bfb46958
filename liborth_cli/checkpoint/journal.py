"""The lines of a journal and the owner file, as records: a stopped run's word is taken only as far as it can be read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Self, TypeVar

from pydantic import ConfigDict, Field, StringConstraints, ValidationError

from liborth_cli.checkpoint.documents import NotJson, fit, parse
from liborth_cli.checkpoint.files import Written
from liborth_cli.console import JsonObject
from liborth_cli.manifest import Count, File, Record, Text

Identity = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Place = tuple[Count, Count]
"""Device and inode."""
Known = TypeVar("Known", bound="Unit")


class Owner(Record):
    """The owner file of a claimed directory: the random id of the run that works in it."""

    id: Identity


class Head(Record):
    """The first line: whose journal it is, what decides the output's bytes, and where private files go."""

    owner: Identity
    plan: Text
    private: Annotated[str, Field(max_length=1 << 16)]


class Unit(Record):
    """A finished part; a command that has more to remember of it derives a record from this.

    Attributes:
        unit: its name.
        files: what it wrote into the partial directory.
        private: what it wrote into the private one.
        inputs: sha256 of every input file they were made from and that the plan does not name by its hash, under a name that
            stays the same.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    unit: Text
    files: list[File] = Field(default_factory=list)
    private: list[File] = Field(default_factory=list)
    inputs: dict[Text, Text] = Field(default_factory=dict)

    @classmethod
    def of(
        cls, unit: str, files: Iterable[Written] = (), private: Iterable[Written] = (), inputs: Mapping[str, str] | None = None
    ) -> Self:
        """Make it of what writers wrote."""
        made = [[File.of(file) for file in some] for some in (files, private)]
        return cls(unit=unit, files=made[0], private=made[1], inputs=dict(inputs or {}))

    def become(self, kind: type[Known]) -> Known:
        """Return it as the record that a command wrote.

        Raises:
            BadInput: when the journal's line was changed since.
        """
        return self if isinstance(self, kind) else fit(kind, self.model_dump(), f"journal: {self.unit}")

    @property
    def line(self) -> JsonObject:
        """It as it is written; a line without files or inputs is not believed, so both are there."""
        whole = self.model_dump(mode="json", include={"files", "private", "inputs"})
        return {**self.model_dump(mode="json", exclude_unset=True), **whole}


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
