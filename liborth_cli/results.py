"""What the commands return in Python: records that a notebook shows as tables, and how far a command is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from liborth_cli import manifest
    from liborth_cli.console import JsonObject, Table
    from liborth_cli.verify.result import Certificate


@dataclass(frozen=True)
class Step:
    """How far a command is.

    Attributes:
        stage: what it is doing.
        done: how much of it is done.
        total: how much there is.
        unit: what is counted; bytes when empty.
    """

    stage: str
    done: int
    total: int
    unit: str

    @property
    def share(self) -> float:
        """The share that is done, from 0 to 1."""
        return self.done / self.total if self.total else 1.0


Watch = Callable[[Step], None]
"""Is told how far a command is, often."""


@dataclass(frozen=True)
class Made:
    """What a command wrote.

    Attributes:
        out: the directory.
        manifest: what was done, to what.
        notes: what the command said.
    """

    out: Path
    manifest: manifest.Manifest
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        asked = self.manifest.document.get("parameters")
        rows = [(name, value) for name, value in sorted(asked.items()) if value] if isinstance(asked, Mapping) else []
        totals = getattr(self.manifest, "totals", None)
        rows += [(name, f"{value:.2%}") for name in ("kept", "removed") if (value := getattr(totals, name, None)) is not None]
        return html_of(f"{self.manifest.kind}: {self.out}", ("", ""), rows, self.notes)


@dataclass(frozen=True)
class Planned:
    """What a command would do (`dry_run`), or measured without writing a checkpoint (`probe`).

    Attributes:
        text: as the command says it.
        document: the same as a JSON object.
        notes: what else it said.
    """

    text: str
    document: JsonObject
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.text)}</pre>"


@dataclass(frozen=True)
class Verified:
    """What `verify` found.

    Attributes:
        certificate: every number, with intervals.
        notes: what the command said.
    """

    certificate: Certificate
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing is broken and every requirement is met."""
        return self.certificate.passed

    def _repr_html_(self) -> str:
        from liborth_cli.verify.table import MET

        found = self.certificate
        rows = [(r.text, MET[r.met], r.measured.text) for r in found.requirements]
        title = f"{found.outcome.value}: {' '.join(found.sentences)}"
        return html_of(title, ("requirement", "met", "measured"), rows, self.notes)


@dataclass(frozen=True)
class Cleaned:
    """What `clean` did.

    Attributes:
        out: the checkpoint without the memory; None when the verdict is not "passed".
        outcome: "passed", "failed" or "undecided".
        sentences: what was found, the worst first.
        report: the page; private, as its directory is.
        certificate: every number, with intervals; likewise.
        commands: what was carried out, as it is typed.
        unlisted: rows like the private ones that were not listed, and went as well; None where the model was not asked.
        notes: what the command said.
    """

    out: Path | None
    outcome: str
    sentences: tuple[str, ...]
    report: Path
    certificate: Path
    commands: tuple[str, ...]
    unlisted: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the checkpoint was written."""
        return self.out is not None

    def _repr_html_(self) -> str:
        rows: list[tuple[str, object]] = [("checkpoint", self.out or "not written"), ("report", self.report)]
        rows += [("carried out", command) for command in self.commands]
        return html_of(f"{self.outcome}: {' '.join(self.sentences)}", ("", ""), rows, self.notes)


@dataclass(frozen=True)
class Replayed:
    """What `replay` found.

    Attributes:
        out: what was made again.
        same: whether every weight file is the same, byte for byte.
        sentence: what is, and what is not.
        command: what was carried out, as it is typed.
        notes: what the command said.
    """

    out: Path
    same: bool
    sentence: str
    command: str
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        rows = [("again", self.out), ("same", "yes" if self.same else "NO"), ("carried out", self.command)]
        return html_of(self.sentence, ("", ""), rows, self.notes)


@dataclass(frozen=True)
class Described:
    """What a path is.

    Attributes:
        document: as a JSON object.
        tables: the same for a person.
    """

    document: JsonObject
    tables: tuple[Table, ...]

    def _repr_html_(self) -> str:
        return "".join(html_of(table.title, table.columns, table.rows) for table in self.tables)


def html_of(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], notes: Sequence[str] = ()) -> str:
    """Render a title, a table and what was said."""
    head = "".join(f"<th>{escape(name.lstrip('>'))}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    said = "".join(f"<p><small>{escape(note)}</small></p>" for note in notes)
    return f"<p><b>{escape(title)}</b></p><table><tr>{head}</tr>{body}</table>{said}"
