"""From what the user named to a `Subject`: checkpoints, their history, and rows."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from liborth_cli import manifest
from liborth_cli.checkpoint import config
from liborth_cli.checkpoint.adapter import open_model
from liborth_cli.checkpoint.blockscaled import decoded
from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.hashing import BackgroundHasher
from liborth_cli.checkpoint.hub import Source, resolve
from liborth_cli.checkpoint.private import find_memory
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.views import Grown, Reattached
from liborth_cli.console import Console
from liborth_cli.errors import BadInput, LiborthError, UsageError, VerificationFailed
from liborth_cli.machine import Run
from liborth_cli.stream.texts import Row, data_hash
from liborth_cli.stream.weights import Point, Weights
from liborth_cli.verify.locate import NAMES, Located, history, locate, read_model
from liborth_cli.verify.outputs import differences, expected
from liborth_cli.verify.result import Origin, Provenance, RowsSeen
from liborth_cli.verify.rows import Reader, RowSet, same_text
from liborth_cli.verify.subject import Need, Networks, States, Subject

SHORT = 4
"""Tokens of the row that shows whether a model runs here."""


@dataclass(frozen=True)
class Inputs:
    """What the user named.

    Attributes:
        model: what is verified: a checkpoint, "-" for stdin, None for the current directory.
        memory: its memory, when it is not beside it.
        reference: W_r, or None to look where the manifest says.
        finetuned: W_f, likewise.
        retrained: a model that learnt the skill and never saw the canaries, or None.
        retain: files of the skill.
        canary: file of what must be gone, or None.
        fresh: file of rows like it that were never trained on, or None.
        seed: for everything random.
        show_text: whether texts may be printed.
        slide: score rows longer than the context in sliding windows.
        resident: keep all weights in memory; None decides by what is free.
    """

    model: str | None = None
    memory: Path | None = None
    reference: str | None = None
    finetuned: str | None = None
    retrained: str | None = None
    retain: tuple[str, ...] = ()
    canary: str | None = None
    fresh: str | None = None
    seed: int = 0
    show_text: bool = False
    slide: bool = False
    resident: bool | None = None


def open_subject(inputs: Inputs, run: Run, console: Console, stack: ExitStack, *, probe: bool = True) -> Subject:
    """Open everything that was named, and nothing that is not needed.

    Args:
        inputs: what the user named.
        run: device and threads.
        console: where progress and warnings go.
        stack: closes what was opened.
        probe: run a short row through the model, where there are rows.

    Raises:
        LiborthError: when something named is missing, damaged, or does not belong.
    """
    source = read_model(inputs.model)
    document = history(source)
    try:
        general = decoded(stack.enter_context(Checkpoint.open(source.path)))
        memory = _memory(source, inputs.memory, general, stack)
    except LiborthError as error:
        if document is not None:
            _blame_damage(source, inputs.memory, document, error)
        raise
    found, unavailable = dict[str, Checkpoint | None](), dict[Need, str]()
    located: dict[str, Located] = {}
    for side, given, need in (
        ("reference", inputs.reference, Need.REFERENCE), ("finetuned", inputs.finetuned, Need.FINETUNED | Need.WHOLE),
    ):  # fmt: skip
        one = located[side] = locate(side, document, given, source, console)
        opened = stack.enter_context(open_model(one.source.path, found.get("reference"))) if one.source else None
        found[side] = decoded(opened) if opened else None
        if one.source is None and one.why:
            unavailable[need] = one.why
        if one.changed:
            console.warn(f"{NAMES[side]}: {one.why}")
    finetuned, grown = found["finetuned"], None
    if finetuned is None and memory is not None:
        try:
            if memory.grown:
                grown = Grown(general, memory, 1.0, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="liborth-"))))
            else:
                finetuned = decoded(Reattached(general, memory))
        except UsageError as error:
            unavailable[Need.FINETUNED | Need.WHOLE] = str(error)
    weights = _weights(general, found["reference"], finetuned, grown)
    networks = Networks(run)
    stack.callback(networks.close)
    reader = Reader(_folder(source), lambda: networks.of(weights["general"]), inputs.slide, console.note)
    data = _read(inputs, reader, console)
    weights |= _as_itself(general, found["reference"], data, console)
    if inputs.retrained is not None:
        weights["retrained"] = _retrained(inputs.retrained, found["reference"], data, stack)
    states = States(weights, data, networks, inputs.resident, grown, console)
    if data and probe:  # a model that cannot be run is found before the files are hashed, and not by the first check
        states.score_rows([Row(np.zeros(SHORT, np.int64), np.ones(SHORT - 1, bool), 1.0, "a short row")], weights["general"])
    return Subject(
        source=source, general=general, states=states, reader=reader, run=run, console=console, memory=memory,
        reference=found["reference"], finetuned=finetuned, grown=grown, manifest=document, data=data, seed=inputs.seed,
        show_text=inputs.show_text, unavailable=unavailable, hashes={side: one.hashes for side, one in located.items()},
        hasher=BackgroundHasher(),
    )  # fmt: skip


def provenance(subject: Subject) -> Provenance:
    """Say what was verified with what: versions, hashes of models and public data, seed.

    Files of secrets are named without a hash: whoever can count finds a short secret from it (docs/decisions/0023).
    """
    told = subject.manifest.document if subject.manifest is not None else None
    return Provenance(
        **manifest.Maker(kind="verify").model_dump(),
        seed=subject.seed,
        model=Origin(subject.source.title, subject.source.commit),
        inputs={side: dict(hashes) for side, hashes in subject.hashes.items()},
        split=told and {key: told.get(key) for key in ("kind", "liborth", "parameters", "inputs", "outputs")},
        data={
            name: RowsSeen(
                list(some.files),
                rows=len(some),
                different=some.different,
                loss_tokens=int(sum(row.keep.sum() for row in some.rows)),
                sha256=data_hash(some.rows) if name == "retain" else None,
            )
            for name, some in subject.data.items()
        },
    )


def _memory(source: Source, given: Path | None, general: Checkpoint, stack: ExitStack) -> Memory | None:
    place = find_memory(source.path, given)
    if place is None:
        return None
    memory = stack.enter_context(Memory.open(place))
    memory.check_fits(general)
    return memory


def _blame_damage(source: Source, given: Path | None, document: manifest.Manifest, error: LiborthError) -> None:
    """When files cannot be opened because they changed since the split, say that: it is what verification is for."""
    found = differences(expected(_folder(source), document, find_memory(source.path, given)))
    if found:
        raise VerificationFailed(f"{'; '.join(found[:3])} ({error})") from None


def _weights(
    general: Checkpoint, reference: Checkpoint | None, finetuned: Checkpoint | None, grown: Grown | None
) -> dict[str, Weights]:
    """Name W_g, W_f and W_r; rows that the reference does not have are the fine-tuned ones."""
    found: dict[str, Weights] = {"general": Point(general)}
    if finetuned is not None or grown is not None:
        found["finetuned"] = Point(finetuned or grown or general)
    if reference is not None:
        found["reference"] = Point(finetuned or general, reference, 0.0)
    return found


def _as_itself(
    general: Checkpoint, reference: Checkpoint | None, data: dict[str, RowSet], console: Console
) -> dict[str, Weights]:
    """Where the reference's configuration gives its weights another meaning, let it run under its own."""
    keys = [found.key for found in config.differences(reference, general)] if reference is not None else []
    if reference is None or not keys:
        return {}
    words = f"the configurations of the reference and of the model differ in {', '.join(keys[:5])}"
    words += f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    config.check_bounds(reference)
    vocabulary = reference.config.get("vocab_size") or 0
    if vocabulary and any(row.ids.max() >= vocabulary for some in data.values() for row in some.rows):
        console.warn(f"{words}, and the rows hold tokens that the reference does not know: it is run under the model's own")
        return {}
    console.warn(f"{words}: each is run under its own, and lines between them under the model's")
    return {"reference": Point(reference)}


def _retrained(name: str, reference: Checkpoint | None, data: dict[str, RowSet], stack: ExitStack) -> Weights:
    """Open the model that never saw the canaries; it must know the tokens of the rows."""
    checkpoint = stack.enter_context(open_model(resolve(name).path, reference))
    vocabulary = checkpoint.config.get("vocab_size") or 0
    if vocabulary and any(row.ids.max() >= vocabulary for some in data.values() for row in some.rows):
        raise BadInput(
            f"--retrained {name}: the rows hold tokens that it does not know; it must have the model's own tokenizer"
        )
    return Point(checkpoint)


def _read(inputs: Inputs, reader: Reader, console: Console) -> dict[str, RowSet]:
    """Read the rows that were named."""
    data = dict[str, RowSet]()
    if inputs.retain:
        data["retain"] = reader.text(inputs.retain, "--retain-data")
    for name, file, option in (("canaries", inputs.canary, "--canary"), ("fresh", inputs.fresh, "--fresh")):
        if file is not None:
            data[name] = reader.pairs(file, option)
    for name, some in data.items():
        if some.different < len(some):
            console.warn(f"{name}: {len(some)} rows, and {some.different} different ones; copies do not count as evidence")
    rows = {name: some.rows for name, some in data.items()}
    if "canaries" in rows:
        if same := same_text(rows.get("fresh", ()), rows["canaries"], reader.encoder):
            raise BadInput(f"--fresh: {same[0].where} is a canary ({same[1].where}): fresh rows were never trained on")
        if same := same_text(rows.get("retain", ()), rows["canaries"], reader.encoder):
            console.warn(f"--retain-data: {same[0].where} is a canary ({same[1].where}): keeping it is not skill")
    return data


def _folder(source: Source) -> Path:
    return source.path if source.path.is_dir() else source.path.parent
