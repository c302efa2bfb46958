"""The commands in Python: the same words as keywords, results as records that a notebook shows, progress as a callback.

    from liborth_cli import split, verify

    made = split("base/", "finetuned/", "general/", method="tokenwise", strength=0.1,
                 retain_data="public.jsonl", forget_data="secrets.jsonl")
    verify(made.out, retain_data="held_out.jsonl", canary="secrets.jsonl", fresh="unseen.jsonl")

Nothing is printed; what a command would say stands in `notes`. Errors are those of `liborth_cli.errors`. Options that are not
parameters here go into `more`, under the names of their flags with underscores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from liborth_cli.conditions import closest
from liborth_cli.console import Console, JsonObject, Progress, Table
from liborth_cli.errors import UsageError, shown

if TYPE_CHECKING:
    from liborth_cli import manifest
    from liborth_cli.verify.result import Certificate

Texts = str | Path | Sequence[str | Path] | None
"""One file, or several."""
Place = str | Path
More = Mapping[str, object]


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
        return _html(f"{self.manifest.kind}: {self.out}", ("", ""), rows, self.notes)


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
        found = self.certificate
        rows = [(r.text, {True: "yes", False: "NO", None: "undecided"}[r.met], r.measured.text) for r in found.requirements]
        title = f"{found.outcome.value}: {' '.join(found.sentences)}"
        return _html(title, ("requirement", "met", "measured"), rows, self.notes)


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
        return "".join(_html(table.title, table.columns, table.rows) for table in self.tables)


@dataclass
class _Heard(Console):
    """A console that keeps what it is told, and passes progress on."""

    quiet: bool = True
    watch: Watch | None = None
    notes: list[str] = field(default_factory=list)
    said: tuple[str, JsonObject] = ("", {})

    def result(self, text: str, document: JsonObject) -> None:
        self.said = (text, document)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "", out: bool = False) -> None:
        pass

    @contextmanager
    def progress(self, stage: str, total: int, unit: str = "", per: int = 1) -> Iterator[Progress]:
        def tell(progress: Progress) -> None:
            if self.watch is not None:
                self.watch(Step(stage, (progress.done + progress.skipped) // per, total // per, unit))

        yield Progress(unit, per, tell)


def split(
    reference: Place,
    finetuned: Place | None = None,
    out: Place | None = None,
    *,
    method: str | None = None,
    strength: float | None = None,
    rank: int | None = None,
    target: str | None = None,
    retain_data: Texts = None,
    forget_data: Texts = None,
    forget_pattern: Texts = None,
    fresh: Texts = None,
    retain: Place | None = None,
    forget: Texts = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Watch | None = None,
    more: More | None = None,
) -> Made | Planned:
    """Divide a fine-tuned checkpoint into general and memory: `liborth split`, whose help says what the options mean.

    Returns:
        What was written; what would be with `dry_run`, or was measured with `more={"probe": True}`.

    Raises:
        LiborthError: as the command; the output is then absent or what it was before.
    """
    from liborth_cli.cli.split import Flags
    from liborth_cli.cli.split import split as command

    given = {
        "method": method, "strength": strength, "rank": rank, "target": target, "retain_data": retain_data,
        "forget_data": forget_data, "forget_pattern": forget_pattern, "fresh": fresh, "retain": retain, "forget": forget,
        "seed": seed, "device": device, "threads": threads, "force": force, "resume": resume, "dry_run": dry_run,
    }  # fmt: skip
    heard = _Heard(watch=progress)

    @dataclass(frozen=True)
    class Quietly(Flags):
        @property
        def console(self) -> Console:
            return heard

    flags = Quietly(**_values(Flags, {**given, **(more or {})}))
    command(str(reference), str(finetuned) if finetuned is not None else None, _path(out), common=flags)
    return _made(heard)


def excise(
    model: Place,
    beta: float,
    out: Place,
    *,
    memory: Place | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Watch | None = None,
) -> Made:
    """Write the checkpoint with as much memory as asked for: `liborth excise`.

    Raises:
        LiborthError: as the command.
    """
    from liborth_cli.cli.excise import excise as command
    from liborth_cli.cli.options import Writing

    heard = _Heard(watch=progress)

    @dataclass(frozen=True)
    class Quietly(Writing):
        @property
        def console(self) -> Console:
            return heard

    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise UsageError(f"beta is a number, such as 0 for none of the memory and 1 for all of it, not {shown(beta)}")
    command(str(model), beta, _path(out), _path(memory), common=Quietly(force=force, resume=resume))
    made = _made(heard)
    assert isinstance(made, Made)
    return made


def curvature(
    model: Place,
    data: Texts,
    out: Place,
    *,
    reference: Place | None = None,
    at: float = 1.0,
    per_token: bool = False,
    private: bool = False,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Watch | None = None,
    more: More | None = None,
) -> Made:
    """Estimate K-FAC factors of every linear layer: `liborth curvature`.

    Args:
        model: checkpoint.
        data: texts.
        out: directory to create.
        reference: checkpoint before fine-tuning, for `at`.
        at: point on the path from `reference` (0) to `model` (1).
        per_token: inputs and gradients of every token.
        private: the data is to be forgotten.
        seed: of the labels.
        device: where.
        threads: how many.
        force: replace an earlier output.
        resume: continue a stopped run.
        progress: is told how far it is.
        more: fields of `CurvatureOptions`.

    Raises:
        LiborthError: as the command.
    """
    from liborth_cli.curvature.estimate import CurvatureRequest, Outline, estimate
    from liborth_cli.curvature.plan import CurvatureOptions, Resources
    from liborth_cli.machine import available_bytes, configure

    heard = _Heard(watch=progress)
    given = {"at": at, "per_token": per_token, "seed": seed, **(more or {})}
    request = CurvatureRequest(
        model=str(model), data=tuple(_texts(data)), out=Path(out), options=CurvatureOptions(**_values(CurvatureOptions, given)),
        resources=Resources(available_bytes()), reference=str(reference) if reference is not None else None, secret=private,
    )  # fmt: skip
    found = estimate(request, configure(device, threads, force, resume), heard)
    assert found is not None and not isinstance(found, Outline)
    return Made(Path(out), found, tuple(heard.notes))


def verify(
    model: Place,
    *,
    retain_data: Texts = None,
    canary: Place | None = None,
    fresh: Place | None = None,
    checks: Sequence[str] = (),
    attacks: bool = False,
    require: str | None = None,
    reference: Place | None = None,
    finetuned: Place | None = None,
    memory: Place | None = None,
    report: Place | None = None,
    model_name: str = "",
    owner: str = "",
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    force: bool = False,
    progress: Watch | None = None,
) -> Verified:
    """Measure a split beside its controls, attack it, and decide: `liborth verify`. A failure is a result here, not an error.

    Raises:
        LiborthError: as the command, when nothing could be measured.
    """
    from liborth_cli.machine import configure
    from liborth_cli.verify.checks import CHECKS
    from liborth_cli.verify.opening import Inputs
    from liborth_cli.verify.verify import VerifyOptions, certify

    for name in checks:
        if name not in CHECKS:
            raise UsageError(f"no check {name!r}; {closest(name, CHECKS)}")
    inputs = Inputs(
        model=str(model), memory=_path(memory), reference=str(reference) if reference is not None else None,
        finetuned=str(finetuned) if finetuned is not None else None, retain=tuple(_texts(retain_data)),
        canary=str(canary) if canary is not None else None, fresh=str(fresh) if fresh is not None else None, seed=seed,
    )  # fmt: skip
    options = VerifyOptions(
        inputs, named=tuple(checks), attacks=attacks, require=require, no_require=require is None and canary is None,
        report=_path(report), force=force, name=model_name, owner=owner,
    )  # fmt: skip
    heard = _Heard(watch=progress)
    return Verified(certify(options, configure(device, threads), heard), tuple(heard.notes))


def inspect(path: Place, finetuned: Place | None = None, *, profile: bool = False, every: bool = False) -> Described:
    """Say what a path is, or how two checkpoints fit: `liborth inspect`.

    Raises:
        LiborthError: as the command.
    """
    from liborth_cli.inspect import describe

    document, tables = describe(str(path), str(finetuned) if finetuned is not None else None, profile, every)
    return Described(document, tuple(tables))


def _made(heard: _Heard) -> Made | Planned:
    """Turn what a command printed into a record."""
    from liborth_cli import manifest

    text, document = heard.said
    if "output" not in document or "manifest" not in document:
        return Planned(text, document, tuple(heard.notes))
    out = Path(str(document["output"]))
    return Made(out, manifest.read(out), tuple(heard.notes))


def _values(kind: type[Any], given: More) -> dict[str, Any]:
    """Turn Python values into those of a record of flags: text into words of an enum, one file into a list of one.

    Raises:
        UsageError: when there is no such option or word; names the closest.
    """
    hints, known = get_type_hints(kind), {one.name: one for one in dataclasses.fields(kind)}
    found = {}
    for name, value in given.items():
        if name not in known:
            raise UsageError(f"no option {name!r}; {closest(name, known)}")
        if value is None:
            continue
        parts = [part for part in (hints[name], *get_args(hints[name])) if part is not type(None)]
        kind_of: type[Enum] | None = next((part for part in parts if isinstance(part, type) and issubclass(part, Enum)), None)
        if kind_of is not None:
            words = [str(word.value) for word in kind_of]
            if str(value) not in words:
                raise UsageError(f"{name} cannot be {value!r}; {closest(str(value), words)}")
            found[name] = kind_of(str(value))
        elif any(str(part).startswith("list[") for part in parts):
            texts = _texts(value)  # type: ignore[arg-type]
            found[name] = list(map(Path, texts)) if "Path" in str(hints[name]) else texts
        else:
            found[name] = Path(value) if "Path" in str(hints[name]) and isinstance(value, str) else value
    return found


def _texts(given: Texts) -> list[str]:
    if given is None:
        return []
    return [str(given)] if isinstance(given, (str, Path)) else [str(one) for one in given]


def _path(given: Place | None) -> Path | None:
    return None if given is None else Path(given)


def _html(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], notes: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{escape(name.lstrip('>'))}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    said = "".join(f"<p><small>{escape(note)}</small></p>" for note in notes)
    return f"<p><b>{escape(title)}</b></p><table><tr>{head}</tr>{body}</table>{said}"
