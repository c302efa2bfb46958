"""What `liborth curvature` does, once its options are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from liborth_cli.checkpoint.adapter import open_model
from liborth_cli.checkpoint.hub import resolve
from liborth_cli.checkpoint.outputs import Kind, Place, check_outputs, check_space
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import Console, size
from liborth_cli.curvature.estimate import DTYPES, Estimator
from liborth_cli.curvature.merge import merge
from liborth_cli.curvature.plan import CurvatureOptions, Resources
from liborth_cli.errors import BadInput, UsageError
from liborth_cli.machine import Run
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import DataFile, RowReader
from liborth_cli.stream.weights import Point

DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class Request:
    """What is read and where the result goes.

    Attributes:
        model: the fine-tuned checkpoint, as the user names it.
        data: the --data arguments.
        reference: the checkpoint before fine-tuning, or None.
        out: directory to create.
        dry_run: say what would be done, and write nothing.
    """

    model: str
    data: tuple[str, ...]
    reference: str | None
    out: Path
    dry_run: bool = False


def curvature(
    asked: Request,
    options: CurvatureOptions,
    resources: Resources,
    run: Run,
    console: Console,
) -> None:
    """Estimate the factors of a model and print where they are.

    Args:
        asked: what is read and where the result goes.
        options: what is computed.
        resources: what may be used.
        run: device, threads, resume and force.
        console: where progress and the result go.

    Raises:
        LiborthError: the leaf says which; `out` is then absent or what it was before.
    """
    files = [DataFile.parse(text) for text in asked.data]
    source, other = resolve(asked.model), resolve(asked.reference) if asked.reference else None
    out = asked.out
    if resources.scratch is not None and not resources.scratch.is_dir():
        raise BadInput(f"--scratch {resources.scratch}: no such directory")
    with ExitStack() as stack:
        base = stack.enter_context(Checkpoint.open(other.path)) if other else None
        finetuned = stack.enter_context(open_model(source.path, base))
        point = Point(finetuned, base, options.at)
        network = BlockModel(point, DTYPES[options.dtype], run.device)
        stack.callback(network.close)
        folder = source.path if source.path.is_dir() else source.path.parent
        said: list[str] = []
        length = _length(options.seq_len, network.context)
        reader = RowReader(TextEncoder.beside(folder), network.vocabulary, length, options.truncate, said.append)
        rows = reader.read(files, options.tokens)
        job = Estimator(point, network, rows, options, resources, run)
        if not asked.dry_run:
            outputs = [Place(out), *([Place(resources.scratch, "--scratch", Kind.SCRATCH)] if resources.scratch else [])]
            check_outputs(outputs, [source.path, other.path if other else None, *(file.path for file in files)], run.force)
            check_space(out, job.disk_bytes)
        for line in said:
            console.note(line)
        if asked.dry_run:
            console.result(*_plan(job))
            return
        document = job.write(out, files, (source, other), console)
    report(document, console)
    console.result(str(out), {"output": str(out), "manifest": document})


def merge_sets(paths: Sequence[str], out: Path, eigen: bool, run: Run, console: Console) -> None:
    """Add factor sets up and print where the result is.

    Raises:
        LiborthError: the leaf says which.
    """
    if len(paths) < 2:
        raise UsageError("--merge needs at least two factor sets")
    folders = [Path(path).expanduser() for path in paths]
    check_outputs([Place(out)], folders, run.force)
    document = merge(folders, out, eigen, run, console)
    report(document, console)
    console.result(str(out), {"output": str(out), "manifest": document})


def report(document: dict[str, Any], console: Console) -> None:
    """Say what was computed and what was left out, on stderr."""
    totals, layers = document["totals"], document["layers"]
    console.note(
        f"{len(layers)} matrices, {totals['tokens']:,.0f} tokens, mean loss {totals['loss']:.3f} nats over "
        f"{totals['loss_tokens']:,} predictions"
    )
    for name, layer in layers.items():
        if layer["kind"] == "embedding":
            console.note(f"{name}: an embedding; A is the diagonal of token frequencies")
        elif layer["kind"] == "head":
            console.note(f"{name}: the head; only the diagonal of G is kept (--full-head keeps all of it)")
    reasons: dict[str, list[str]] = {}
    for name, why in document["left_out"].items():
        reasons.setdefault(why, []).append(name)
    for why, names in sorted(reasons.items()):
        console.note(f"left out, {why}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}")


def _length(asked: int | None, context: int | None) -> int:
    if asked is not None and context is not None and asked > context:
        raise UsageError(f"--seq-len {asked}: longer than the model's context of {context:,} tokens")
    return asked or min(context or DEFAULT_LENGTH, DEFAULT_LENGTH)


def _plan(job: Estimator) -> tuple[str, dict[str, Any]]:
    count = sum(len(targets) for targets in job.targets.values())
    tokens = sum(row.tokens for row in job.rows)
    how = "with all weights in memory" if job.plan.resident else "one block of weights at a time"
    text = (
        f"would read {len(job.rows):,} rows with {tokens:,} tokens in {len(job.groups)} groups, {how}, "
        f"and write factors of {count} matrices, at most {size(job.disk_bytes)}"
    )
    return text, {
        "rows": len(job.rows),
        "tokens": tokens,
        "groups": len(job.groups),
        "disk_bytes": job.disk_bytes,
        "matrices": count,
        "plan": asdict(job.plan),
        "left_out": job.left_out,
    }
