"""`liborth split` from request to result: open, plan, write, tell."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from liborth_cli.checkpoint.adapter import is_adapter, open_model
from liborth_cli.checkpoint.blockscaled import decoded
from liborth_cli.checkpoint.hashing import BackgroundHasher
from liborth_cli.checkpoint.hub import Source, resolve
from liborth_cli.checkpoint.outputs import Place, check_outputs, check_space
from liborth_cli.checkpoint.pair import meet
from liborth_cli.checkpoint.private import private_place
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.signing import check_key
from liborth_cli.checkpoint.views import Origin
from liborth_cli.console import Console, JsonObject
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.together import Together
from liborth_cli.errors import PairMismatch, UsageError
from liborth_cli.machine import Run
from liborth_cli.manifest import Dose, TextOptions
from liborth_cli.split.edits import EditSet
from liborth_cli.split.options import SplitOptions
from liborth_cli.split.plan import Splitter
from liborth_cli.split.report import Measuring, dry_run_document, dry_run_table, report
from liborth_cli.split.write import Destination, write_split


@dataclass(frozen=True)
class SplitRequest:
    """A split as it is asked for.

    Attributes:
        reference: checkpoint before fine-tuning; None divides the weights of the one checkpoint.
        finetuned: checkpoint after fine-tuning.
        options: what to do.
        out: directory to create; None names one after the checkpoint and the method.
        memory_out: directory to create for what is private; None: `OUT.private`.
        retain: factor set of the data to keep good at.
        forget: factor sets of what must go.
        reads: other files that are read and must not be written over.
        partial_reference: the reference may lack layers that the fine-tuned checkpoint has.
        dry_run: only say what would be done.
        writes: whether a checkpoint is written at all.
        key: of OpenSSH, to sign the manifest with; None: unsigned.
    """

    reference: str | None
    finetuned: str
    options: SplitOptions
    out: Path
    memory_out: Path | None = None
    retain: Path | None = None
    forget: tuple[Path, ...] = ()
    reads: tuple[Path, ...] = ()
    partial_reference: bool = False
    dry_run: bool = False
    writes: bool = True
    key: Path | None = None


@dataclass
class Opened:
    """What is divided, and which factors of it there are.

    Attributes:
        reference: W_r; an `Origin` where there is none.
        finetuned: W_f.
        sources: where both came from.
        retain: factors of the retain data, or None.
        forget: factors of the forget data, one for each set or point.
        edit: what steps moved, or None.
    """

    reference: Checkpoint
    finetuned: Checkpoint
    sources: tuple[Source | None, Source]
    retain: FactorSet | None = None
    forget: list[FactorSet] = field(default_factory=list)
    edit: EditSet | None = None

    @property
    def alone(self) -> bool:
        """Whether the one checkpoint itself is divided."""
        return self.sources[0] is None

    def take(self, kind: str, factors: FactorSet) -> None:
        """Add a factor set that was measured: "retain" or "forget"."""
        if kind == "retain":
            self.retain = factors
        else:
            self.forget.append(factors)


@dataclass
class Advice:
    """What was found out about an opened pair before it is divided.

    Attributes:
        options: what to do.
        result: printed in place of a split, as text and as a JSON object; None goes on.
        dose: what was measured to find the amount, for the manifest; None: nothing was.
        together: the walk in which factors are measured that are not stored; None when they are all there.
        texts: how texts were read, for the manifest; None: none were.
        measuring: what a dry run would measure first; None: nothing.
    """

    options: SplitOptions
    result: tuple[str, JsonObject] | None = None
    dose: Dose | None = None
    together: Together | None = None
    texts: TextOptions | None = None
    measuring: Measuring | None = None


Adviser = Callable[[Opened, Run, ExitStack], Advice]
"""Measures what the options leave open, and adds factor sets that it makes (`dose`)."""


def split_checkpoint(
    request: SplitRequest, run: Run, console: Console, hasher: BackgroundHasher | None = None, adviser: Adviser | None = None
) -> tuple[str, JsonObject]:
    """Divide a checkpoint into general and memory.

    Args:
        request: what is asked.
        run: device, threads, force and resume.
        console: where progress, notes and warnings go.
        hasher: one that is already reading the inputs.
        adviser: is asked before anything is planned.

    Returns:
        The result, as text and as a JSON object: the output and its manifest, the plan, or what the adviser says instead.

    Raises:
        LiborthError: the leaf says which; the output is then absent or what it was before.
    """
    source, other = resolve(request.finetuned), resolve(request.reference) if request.reference else None
    request.options.check(alone=other is None)
    inputs = [*(s.path for s in (other, source) if s), request.retain, *request.forget, *request.reads]
    places = [Place(request.out), Place(private_place(request.out, request.memory_out), "--memory-out", keeper=request.out)]
    if request.writes and not request.dry_run and (run.world.first or run.gather):
        check_outputs(places, inputs, run.force)
        check_key(request.key)
    with ExitStack() as stack:
        base = stack.enter_context(Checkpoint.open(other.path)) if other else None
        if base is None and is_adapter(source.path):
            raise UsageError(f"{source.path}: an adapter alone is no update; name its base first: liborth split BASE ADAPTER")
        new = stack.enter_context(open_model(source.path, base))
        if request.options.requantise:
            base, new = decoded(base) if base else None, decoded(new)
            if not new.scales:
                raise UsageError(f"--requantise: {source.path} has no fp8 layer with block scales (weight_scale_inv)")
        old = base or Origin(new)
        if base and not request.partial_reference:
            check_whole(base, new)
        opened = Opened(old, new, (other, source))
        opened.retain = stack.enter_context(FactorSet.open(request.retain)) if request.retain else None
        opened.forget = [stack.enter_context(FactorSet.open(path)) for path in request.forget]
        advice = adviser(opened, run, stack) if adviser else Advice(request.options)
        if advice.result is not None:
            return advice.result
        plan = Splitter(old, new, advice.options, opened.retain, opened.forget, opened.edit)
        for warning in plan.warnings:
            console.warn(warning)
        if request.dry_run:
            return dry_run_table(plan, advice.measuring), dry_run_document(plan, advice.measuring)
        if run.world.first:
            check_space(request.out, plan.disk_bytes(advice.together is not None))
        if "auto_map" in new.config:
            console.warn("config.json asks for the repository's own code (auto_map), which is not copied")
        if source.path.is_dir() and not new.config:
            console.warn(f"{source.path}: no config.json beside the weights, and none beside the output: no library loads it")
        destination = Destination(request.out, opened.sources, request.memory_out, advice.dose, request.key, advice.texts)
        split = write_split(plan, destination, run, console, hasher, together=advice.together)
    if split is None:  # the first rank tells
        return "", {}
    report(split, run, console)
    return str(request.out), {"output": str(request.out), "manifest": split.document}


def check_whole(reference: Checkpoint, finetuned: Checkpoint) -> None:
    """Refuse a reference that is part of a checkpoint: what it lacks would count as added, and none of it be divided.

    Tensors that a fine-tune really adds (a head, tokens, an adapter) are few, and of a kind that the reference has nowhere.

    Raises:
        PairMismatch: when it lacks layers of a kind that it has, or most of the fine-tuned weights.
    """

    def kind(name: str) -> str:
        return re.sub(r"\d+", "*", name)

    met = meet(reference.tensors, finetuned.tensors)
    lacking = [t for t in finetuned.tensors.values() if t.name not in met]
    kinds = {kind(name) for name in met}
    siblings = [t.name for t in lacking if "*" in kind(t.name) and kind(t.name) in kinds]
    if siblings or 2 * sum(t.nbytes for t in lacking) > finetuned.nbytes:
        first = (siblings or [t.name for t in lacking])[0]
        raise PairMismatch(
            f"{reference.path}: lacks {len(lacking)} of {len(finetuned.tensors)} tensors (first: {first}); a single shard? "
            "Give the whole checkpoint's directory; if the fine-tuned one really has more layers, say --added skill or memory"
        )
