"""From what the user named to a `Subject`: checkpoints, their history, rows and one model for all of them."""

from __future__ import annotations

import functools
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from liborth_cli import manifest
from liborth_cli.checkpoint.adapter import open_model
from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.private import find_memory
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.views import Grown, Reattached
from liborth_cli.console import Console
from liborth_cli.errors import LiborthError, UsageError, VerificationFailed
from liborth_cli.machine import Run
from liborth_cli.measure.scores import Evaluator, SlidingEvaluator
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point, Weights
from liborth_cli.verify.inputs import NAMES, Located, history, locate, read_model
from liborth_cli.verify.outputs import differences
from liborth_cli.verify.rows import UNLIMITED, read_pairs, read_text
from liborth_cli.verify.subject import Subject

NARROW = 128
"""Width of the residual stream below which threads wait for each other longer than they work."""
WINDOW = 1024
"""Longest window of running text; the context where that is shorter."""


@dataclass(frozen=True)
class Request:
    """What the user named.

    Attributes:
        model: what is verified: a checkpoint, "-" for stdin, None for the current directory.
        memory: its memory, when it is not beside it.
        reference: W_r, or None to look where the manifest says.
        finetuned: W_f, likewise.
        retain: files of the skill.
        canary: file of what must be gone, or None.
        fresh: file of rows like it that were never trained on, or None.
        seed: for everything random.
        show_text: whether texts may be printed.
        slide: score rows longer than the context in sliding windows.
        weights: "auto", "stream" or "resident".
        options: of the checks, by name.
    """

    model: str | None = None
    memory: Path | None = None
    reference: str | None = None
    finetuned: str | None = None
    retain: tuple[str, ...] = ()
    canary: str | None = None
    fresh: str | None = None
    seed: int = 0
    show_text: bool = False
    slide: bool = False
    weights: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)


def open_subject(request: Request, run: Run, console: Console, stack: ExitStack) -> Subject:
    """Open everything the request names, and nothing it does not need.

    Args:
        request: what the user named.
        run: device and threads.
        console: where progress goes.
        stack: closes what was opened.

    Raises:
        LiborthError: when something named is missing, damaged, or does not belong.
    """
    source = read_model(request.model)
    document = history(source)
    try:
        general = stack.enter_context(Checkpoint.open(source.path))
        memory = _memory(source, request.memory, general, stack)
    except LiborthError as error:
        _blame_damage(source, document, error)
        raise
    subject = Subject(
        source=source, general=general, memory=memory, reference=None, finetuned=None, manifest=document,
        retain=[], canaries=[], fresh=[], evaluators={}, states={}, seed=request.seed, show_text=request.show_text,
        run=run, console=console, options=dict(request.options),
    )  # fmt: skip
    _open_inputs(subject, request, stack)
    _name_states(subject)
    _read_rows(subject, request, stack)
    return subject


def _memory(source: Source, place: Path | None, general: Checkpoint, stack: ExitStack) -> Memory | None:
    found = find_memory(source.path, place)
    if found is None:
        return None
    memory = stack.enter_context(Memory.open(found))
    memory.check_fits(general)
    return memory


def _blame_damage(source: Source, document: dict[str, Any] | None, error: LiborthError) -> None:
    """When files cannot be opened because they changed since the split, say that: it is what verification is for."""
    found = differences(source.path, document) if document is not None and source.path.is_dir() else []
    if found:
        raise VerificationFailed(f"{'; '.join(found[:3])} ({error})") from None


def _open_inputs(subject: Subject, request: Request, stack: ExitStack) -> None:
    for side, given in (("reference", request.reference), ("finetuned", request.finetuned)):
        found: Located = locate(side, subject.manifest, given, subject.source)
        subject.options[f"{side}_hashes"] = found.hashes
        if found.source is not None:
            setattr(subject, side, stack.enter_context(open_model(found.source.path, subject.reference)))
        elif found.why:
            subject.missing[side] = found.why
            if "changed" in found.why:
                subject.console.warn(f"{NAMES[side]}: {found.why}")
    if subject.finetuned is None and subject.memory is not None:
        try:
            if subject.memory.grown:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="liborth-"))
                subject.grown = Grown(subject.general, subject.memory, 1.0, Path(folder))
            subject.finetuned = Reattached(subject.general, subject.memory)
        except UsageError as error:
            subject.missing["finetuned"] = str(error)


def _name_states(subject: Subject) -> None:
    """Name W_g, W_f and W_r; rows that the reference does not have are the fine-tuned ones."""
    states: dict[str, Weights] = {"general": Point(subject.general)}
    if subject.finetuned is not None:
        states["finetuned"] = Point(subject.finetuned)
    if subject.reference is not None:
        states["reference"] = Point(subject.finetuned or subject.general, subject.reference, 0.0)
    subject.states.update(states)


def _read_rows(subject: Subject, request: Request, stack: ExitStack) -> None:
    folder = subject.source.path if subject.source.path.is_dir() else subject.source.path.parent

    @functools.cache
    def network() -> BlockModel:
        model = BlockModel(subject.states["general"], torch.float32, subject.run.device)
        if model.hidden < NARROW:
            torch.set_num_threads(1)
        stack.callback(model.close)
        return model

    subject.network = network
    if not (request.retain or request.canary or request.fresh or request.options.get("samples")):
        return
    model = network()
    subject.encoder = encoder = TextEncoder.beside(folder)
    resident = {"auto": None, "stream": False, "resident": True}[request.weights]

    wide = BlockModel(Point(subject.grown), torch.float32, subject.run.device) if subject.grown else None
    if wide is not None:
        stack.callback(wide.close)

    def evaluator(model: BlockModel, rows: list[Row]) -> Evaluator:
        long = model.context is not None and any(row.tokens > model.context for row in rows)
        return SlidingEvaluator(model, rows, model.context or UNLIMITED, resident) if long else Evaluator(model, rows, resident)

    def add(name: str, rows: list[Row], titles: list[str]) -> None:
        subject.evaluators[name] = evaluator(model, rows)
        if wide is not None:
            subject.wide[name] = evaluator(wide, rows)
        subject.titles[name] = titles

    length = min(model.context or WINDOW, WINDOW)
    if request.retain:
        subject.retain = read_text(request.retain, "--retain-data", encoder, model.vocabulary, length)
        add("retain", subject.retain, [Path(name).name for name in request.retain])
    for name, file, option in (("canaries", request.canary, "--canary"), ("fresh", request.fresh, "--fresh")):
        if file is not None:
            rows = read_pairs(file, option, encoder, model.vocabulary, model.context, request.slide)
            setattr(subject, name, rows)
            add(name, rows, [Path(file).name])
    samples = request.options.get("samples")
    if samples:
        add("samples", read_text([str(samples)], "--samples", encoder, model.vocabulary, length), [Path(samples).name])


def provenance(subject: Subject, request: Request) -> dict[str, Any]:
    """Say what was verified with what: versions, hashes of models and public data, seed.

    Files of secrets are named without a hash: whoever can count finds a short secret from it (docs/decisions/0023).
    """
    from liborth_cli.stream.texts import data_hash

    seen = manifest.new("verify", seed=request.seed, model={"title": subject.source.title, "commit": subject.source.commit})
    seen["inputs"] = {side: subject.options[f"{side}_hashes"] for side in ("reference", "finetuned")}
    if subject.manifest is not None:
        seen["split"] = {key: subject.manifest.get(key) for key in ("kind", "liborth", "parameters", "inputs", "outputs")}
    seen["data"] = {
        name: {
            "files": titles,
            "rows": len(subject.evaluators[name].rows),
            "loss_tokens": int(sum(row.keep.sum() for row in subject.evaluators[name].rows)),
            **({"sha256": data_hash(subject.retain)} if name == "retain" else {}),
        }
        for name, titles in subject.titles.items()
    }
    return seen
