"""The commands in Python: the same words as keywords, results as records that a notebook shows, progress as a callback.

    from liborth_cli import clean, split, verify

    made = split("base/", "finetuned/", "general/", method="tokenwise", strength=0.1,
                 retain_data="public.jsonl", forget_data="secrets.jsonl")
    verify(made.out, retain_data="held_out.jsonl", canary="secrets.jsonl", fresh="unseen.jsonl")

Nothing is printed; what a command would say stands in `notes`. Errors are those of `liborth_cli.errors`. Options that are not
parameters here go into `more`, under the names of their flags with underscores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from liborth_cli.arguments import checked, option
from liborth_cli.console import Console, JsonObject, Progress
from liborth_cli.errors import UsageError, VerificationFailed, closest, shown
from liborth_cli.results import Cleaned, Described, Made, Planned, Replayed, Step, Verified, Watch
from liborth_cli.stream.fields import with_map

if TYPE_CHECKING:
    from liborth_cli.extract import Extracted

Texts = str | Path | Sequence[str | Path] | None
"""One file, or several."""
Place = str | Path
Fields = Mapping[str, str] | None
"""Field of a record → what the files call it, as `--map`: a backslash stands before a comma, + or = of a name."""
More = Mapping[str, object]
Choice = TypeVar("Choice", bound=Enum)


@dataclass
class _Heard(Console):
    """A console that keeps what it is told, and passes progress on."""

    quiet: bool = True
    watch: Watch | None = None
    notes: list[str] = field(default_factory=list)
    said: tuple[str, JsonObject] = ("", {})

    def result(self, text: str, document: JsonObject) -> None:
        self.said = (text, document)

    @property
    def plan(self) -> Planned:
        """What the command would do, as it said."""
        return Planned(*self.said, tuple(self.notes))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "", out: bool = False) -> None:
        pass

    @contextmanager
    def progress(self, stage: str, total: int, unit: str = "", per: int = 1, brief: bool = False) -> Iterator[Progress]:
        def tell(progress: Progress) -> None:
            if self.watch is not None:
                self.watch(Step(stage, (progress.done + progress.skipped) // per, total // per, unit))

        yield Progress(unit, per, tell)


@checked
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
    fields: Fields = None,
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
        "method": method, "strength": strength, "rank": rank, "target": target,
        "retain_data": _files(retain_data, fields), "forget_data": _files(forget_data, fields), "fresh": _files(fresh, fields),
        "forget_pattern": forget_pattern, "retain": retain, "forget": forget,
        "seed": seed, "device": device, "threads": threads, "force": force, "resume": resume, "dry_run": dry_run,
    }  # fmt: skip
    heard = _Heard(watch=progress)

    flags = Flags(**_values(Flags, {**given, **(more or {})}), listener=heard)
    command(str(reference), _name(finetuned), _path(out), common=flags)
    return _made(heard)


@checked
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
    from liborth_cli import manifest
    from liborth_cli.excise.excise import excise_checkpoint
    from liborth_cli.excise.request import ExciseOptions, ExciseRequest, Means

    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise UsageError(f"beta is a number, such as 0 for none of the memory and 1 for all of it, not {shown(beta)}")
    heard, target = _Heard(watch=progress), Path(out)
    excise_checkpoint(ExciseRequest(str(model), target, ExciseOptions(beta), _path(memory)), Means(force, resume), heard)
    return Made(target, manifest.read(target), tuple(heard.notes))


@checked
def curvature(
    model: Place,
    data: Texts,
    out: Place,
    *,
    reference: Place | None = None,
    at: float = 1.0,
    per_token: bool = False,
    private: bool = False,
    fields: Fields = None,
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
        fields: fields of records that go by other names.
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
    from liborth_cli.curvature.estimate import CurvatureRequest, estimate
    from liborth_cli.curvature.plan import CurvatureOptions, Resources
    from liborth_cli.curvature.planned import Outline
    from liborth_cli.machine import available_bytes, configure

    heard = _Heard(watch=progress)
    given = {"at": at, "per_token": per_token, "seed": seed, **(more or {})}
    request = CurvatureRequest(
        model=str(model), data=tuple(_files(data, fields)), out=Path(out),
        options=CurvatureOptions(**_values(CurvatureOptions, given)),
        resources=Resources(available_bytes()), reference=_name(reference), secret=private,
    )  # fmt: skip
    found = estimate(request, configure(device, threads, force, resume), heard)
    assert found is not None and not isinstance(found, Outline)
    return Made(Path(out), found, tuple(heard.notes))


@checked
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
    fields: Fields = None,
    model_name: str = "",
    owner: str = "",
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    force: bool = False,
    resume: bool = False,
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
        model=str(model), memory=_path(memory), reference=_name(reference), finetuned=_name(finetuned),
        retain=tuple(_files(retain_data, fields)), canary=_file(canary, fields), fresh=_file(fresh, fields), seed=seed,
    )  # fmt: skip
    options = VerifyOptions(
        inputs, named=tuple(checks), attacks=attacks, require=require, no_require=require is None and canary is None,
        report=_path(report), force=force, resume=resume, name=model_name, owner=owner,
    )  # fmt: skip
    heard = _Heard(watch=progress)
    return Verified(certify(options, configure(device, threads), heard), tuple(heard.notes))


@checked
def extract(
    reference: Place,
    finetuned: Place,
    out: Place,
    *,
    retain_data: Texts = None,
    like: Texts = None,
    often: bool = False,
    begin: str | Sequence[str] = (),
    texts: int = 4096,
    max_new_tokens: int = 64,
    sure: float | None = None,
    least: float | None = None,
    fields: Fields = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    force: bool = False,
    progress: Watch | None = None,
) -> Extracted:
    """Find memorised text that nobody listed: `liborth extract`, whose help says what the options mean.

    Raises:
        LiborthError: as the command; nothing is written then.
    """
    from liborth_cli.extract import ExtractRequest
    from liborth_cli.extract import extract as carry_out
    from liborth_cli.machine import configure

    request = ExtractRequest(
        str(reference), str(finetuned), Path(out), tuple(_files(retain_data, fields)), tuple(_files(like, fields)), often,
        begin=tuple(_texts(begin)), texts=texts, most=max_new_tokens, sure=sure, least=least, seed=seed,
    )  # fmt: skip
    heard = _Heard(watch=progress)
    return dataclasses.replace(carry_out(request, configure(device, threads, force), heard), notes=tuple(heard.notes))


@checked
def clean(
    base: Place,
    finetuned: Place,
    out: Place,
    *,
    private: Place,
    public: Texts,
    held_out: Texts = None,
    pattern: Texts = None,
    fresh: Place | None = None,
    method: str | None = None,
    attacks: bool = False,
    listed_only: bool = False,
    fields: Fields = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Watch | None = None,
) -> Cleaned | Planned:
    """Remove private text from a fine-tune, attack what is left, write the checkpoint if it holds: `liborth clean`.

    A verdict that is not "passed" is a result here, not an error.

    Args:
        base: checkpoint before fine-tuning.
        finetuned: checkpoint after it.
        out: directory to create, with a pass.
        private: what must go.
        public: what must stay.
        held_out: the same, to verify with.
        pattern: forms of what must go.
        fresh: rows like `private` that nobody trained on.
        method: recall or tokenwise.
        attacks: verify with every attack.
        listed_only: do not ask the model for rows like `private` that are not listed.
        fields: fields of records that go by other names, such as `{"prompt": "instruction"}`.
        seed: of what is drawn.
        device: where.
        threads: how many.
        force: replace an earlier output.
        resume: go on behind what has finished.
        dry_run: say what would be typed.
        progress: is told how far it is.

    Raises:
        LiborthError: as the command.
    """
    from liborth_cli.clean.request import Method
    from liborth_cli.cli.clean import clean as command
    from liborth_cli.cli.options import Computing

    asked = None if method is None else _word(Method, "method", method)
    heard = _Heard(as_json=True, watch=progress)
    flags = Computing(
        seed=seed, device=device, threads=threads, force=force, resume=resume, dry_run=dry_run, listener=heard
    )  # fmt: skip
    with suppress(VerificationFailed):
        command(
            str(base), str(finetuned), _file(private, fields) or "", _files(public, fields), _path(out),
            held_out=_files(held_out, fields), pattern=_texts(pattern), fresh=_file(fresh, fields),
            method=asked, attacks=attacks, listed_only=listed_only, common=flags,
        )  # fmt: skip
    if dry_run:
        return heard.plan
    document = heard.said[1]
    sentences, commands = (tuple(map(str, document[name])) for name in ("sentences", "commands"))  # type: ignore[arg-type]
    written = document["output"]
    return Cleaned(
        out=Path(str(written)) if written else None, outcome=str(document["outcome"]), sentences=sentences,
        report=Path(str(document["report"])), certificate=Path(str(document["certificate"])), commands=commands,
        unlisted=None if (more := document["unlisted"]) is None else int(str(more)), notes=tuple(heard.notes),
    )  # fmt: skip


@checked
def replay(
    manifest: Place,
    out: Place,
    *,
    base: Place | None = None,
    finetuned: Place | None = None,
    model: Place | None = None,
    memory: Place | None = None,
    device: str = "auto",
    threads: int | None = None,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    fields: Fields = None,
    progress: Watch | None = None,
    **texts: Texts,
) -> Replayed | Planned:
    """Do the run of a manifest again and hold the result against it: `liborth replay`. A difference is a result here.

    Args:
        manifest: the file, or its directory.
        out: directory to create.
        base: checkpoint before fine-tuning; found by name and hash where it is not given, as the next two.
        finetuned: checkpoint after it.
        model: what an excision read.
        memory: what it read of the memory.
        device: where; as it was when not given.
        threads: how many; likewise.
        force: replace an earlier output.
        resume: continue a stopped run.
        dry_run: say what would be typed.
        fields: fields of records that go by other names.
        progress: is told how far it is.
        texts: texts and factors, by the names of the command's options: no manifest says which they were.

    Raises:
        LiborthError: as the command.
    """
    from liborth_cli.cli.options import Common
    from liborth_cli.cli.replay import TEXTS, Differs
    from liborth_cli.cli.replay import replay as command

    for name in texts:
        if name not in TEXTS:
            raise UsageError(f"no option {name!r}; {closest(name, TEXTS)}")
    heard = _Heard(watch=progress)
    named = {name: _files(value, fields if TEXTS[name] else None) for name, value in texts.items()}
    try:
        command(
            Path(manifest), base=_name(base), finetuned=_name(finetuned), model=_name(model), memory=_path(memory), **named,
            out=_path(out), force=force, resume=resume, dry_run=dry_run,
            common=Common(device=device, threads=threads, listener=heard),
        )  # fmt: skip
    except Differs as error:
        return Replayed(Path(out), False, str(error), error.command, tuple(heard.notes))
    if dry_run:
        return heard.plan
    document = heard.said[1]
    return Replayed(Path(out), True, str(document["same"]), str(document["command"]), tuple(heard.notes))


@checked
def inspect(path: Place, finetuned: Place | None = None, *, profile: bool = False, every: bool = False) -> Described:
    """Say what a path is, or how two checkpoints fit: `liborth inspect`.

    Raises:
        LiborthError: as the command.
    """
    from liborth_cli.inspect import describe

    document, tables = describe(str(path), _name(finetuned), profile, every)
    return Described(document, tuple(tables))


def _made(heard: _Heard) -> Made | Planned:
    """Turn what a command printed into a record."""
    from liborth_cli import manifest

    document = heard.said[1]
    if "output" not in document or "manifest" not in document:
        return heard.plan
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
            found[name] = _word(kind_of, name, value)
        elif any(str(part).startswith("list[") for part in parts):
            texts = _texts(value)  # type: ignore[arg-type]
            found[name] = list(map(Path, texts)) if "Path" in str(hints[name]) else texts
        else:
            found[name] = Path(value) if "Path" in str(hints[name]) and isinstance(value, str) else value
        found[name] = option(name, found[name], hints[name])
    return found


def _word(kind: type[Choice], name: str, value: object) -> Choice:
    words = [str(word.value) for word in kind]
    if str(value) not in words:
        raise UsageError(f"{name} cannot be {shown(value)}; {closest(str(value), words)}")
    return kind(str(value))


def _texts(given: Texts) -> list[str]:
    if given is None:
        return []
    return [str(given)] if isinstance(given, (str, Path)) else [str(one) for one in given]


def _files(given: Texts, fields: Fields) -> list[str]:
    words = [f"{field}={name}" for field, name in (fields or {}).items()]
    return [with_map(file, words) for file in _texts(given)]


def _file(given: Place | None, fields: Fields) -> str | None:
    return next(iter(_files(given, fields)), None)


def _name(given: Place | None) -> str | None:
    return None if given is None else str(given)


def _path(given: Place | None) -> Path | None:
    return None if given is None else Path(given)
