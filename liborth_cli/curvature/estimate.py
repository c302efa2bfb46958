"""A whole estimate: rows through the model, sums to disk group by group, factors in place at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from liborth_cli import manifest
from liborth_cli.checkpoint import config, private
from liborth_cli.checkpoint.adapter import open_model
from liborth_cli.checkpoint.blockscaled import decoded
from liborth_cli.checkpoint.hashing import BackgroundHasher
from liborth_cli.checkpoint.hub import Source, resolve
from liborth_cli.checkpoint.joint import Joint, agree_on_inputs
from liborth_cli.checkpoint.outputs import Kind, Place, check_outputs, check_space
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.console import Console
from liborth_cli.curvature import factors
from liborth_cli.curvature.passes import ROWS_END, SUMS_END, Inputs, Passes, group_name
from liborth_cli.curvature.plan import CurvatureOptions, Resources
from liborth_cli.curvature.planned import Outline, Planned
from liborth_cli.curvature.selection import Factored
from liborth_cli.curvature.state import Found
from liborth_cli.errors import BadInput, UsageError
from liborth_cli.machine import Run, slowed
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.tap import arithmetic
from liborth_cli.stream.texts import DataFile, RowReader, data_hash, summary
from liborth_cli.stream.trial import try_out
from liborth_cli.stream.walk import stage_of
from liborth_cli.stream.weights import Point

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class CurvatureRequest:
    """What is read, what is computed and where the result goes.

    Attributes:
        model: the fine-tuned checkpoint, as the user names it.
        data: the --data arguments.
        out: directory to create.
        options: what is computed.
        resources: what may be used.
        reference: the checkpoint before fine-tuning, or None.
        secret: the data is to be forgotten: its rows are taken one by one, and no hash of them is kept.
        dry_run: only plan.
    """

    model: str
    data: tuple[str, ...]
    out: Path
    options: CurvatureOptions
    resources: Resources
    reference: str | None = None
    secret: bool = False
    dry_run: bool = False


def estimate(request: CurvatureRequest, run: Run, console: Console) -> manifest.Curvature | Outline | None:
    """Estimate the factors of a model.

    Args:
        request: what is read, what is computed and where the result goes.
        run: device, threads, resume and force.
        console: where progress goes.

    Returns:
        The manifest that was written, None on every rank but the first; or for a dry run what would be done.

    Raises:
        LiborthError: the leaf says which; `request.out` is then absent or what it was before.
    """
    options, scratch = request.options, request.resources.scratch
    files = [DataFile.parse(text, secret=request.secret) for text in request.data]
    source, other = resolve(request.model), resolve(request.reference) if request.reference else None
    if scratch is not None and not scratch.is_dir():
        raise BadInput(f"--scratch {scratch}: no such directory")
    with ExitStack() as stack:
        base = decoded(stack.enter_context(Checkpoint.open(other.path))) if other else None
        finetuned = decoded(stack.enter_context(open_model(source.path, base)))
        point = Point(finetuned, base, options.at)
        model = BlockModel(_as_itself(point, console), DTYPES[options.dtype], run.device)
        stack.callback(model.close)
        if options.seq_len is not None and model.context is not None and options.seq_len > model.context:
            raise UsageError(f"--seq-len {options.seq_len}: longer than the model's context of {model.context:,} tokens")
        length = options.seq_len or min(model.context or DEFAULT_LENGTH, DEFAULT_LENGTH)
        said: list[str] = []
        encoder = TextEncoder.beside(*point.checkpoint.folders)
        rows = RowReader(encoder, model.vocabulary, length, options.truncate, said.append).read(files, options.tokens)
        job = Estimator(point, model, rows, options, request.resources, run)
        if not request.dry_run and run.world.first:
            places = [Place(request.out), *([Place(scratch, "--scratch", Kind.SCRATCH)] if scratch else [])]
            check_outputs(places, [source.path, other.path if other else None, *(file.path for file in files)], run.force)
            check_space(request.out, job.disk_bytes)
        for line in said:
            console.note(line)
        if slow := slowed(model.dtype, run.device):
            console.warn(slow)
        return job.outline if request.dry_run else job.write(request.out, files, (source, other), console)


def _as_itself(point: Point, console: Console) -> Point:
    """Return what is run: at the reference itself the reference under its own configuration, where that means something else.

    Between the two, and where names differ so that factors would not find their matrices, it is the fine-tuned one's.
    """
    base, alone = point.reference, point.t == 0.0 and point.same_names
    so = "the reference runs under its own" if alone else "the path runs under the fine-tuned one's"
    differ = config.warning(base, point.finetuned, so) if base is not None else None
    if differ:
        console.warn(differ)
    return Point(base) if base is not None and differ and alone else point


class Estimator(Planned):
    """A planned estimate, and what carries it out: `write`."""

    def write(
        self, out: Path, files: Sequence[DataFile], sources: tuple[Source, Source | None], console: Console
    ) -> manifest.Curvature | None:
        """Carry the plan out.

        Args:
            out: directory to create, readable by its owner alone.
            files: where the rows came from.
            sources: where the model and the reference came from.
            console: where progress goes.

        Returns:
            The manifest that was written; None on every rank but the first.

        Raises:
            LiborthError: the leaf says which; `out` is then absent or what it was before.
        """
        sides = {"model": (self.point.finetuned, sources[0])}
        if self.point.reference is not None and sources[1] is not None:
            sides["reference"] = (self.point.reference, sources[1])
        world, hasher = self.run.world, BackgroundHasher()
        agree_on_inputs(world, [side for side, _ in sides.values()])
        world.agree("other options", repr(self.options))
        world.agree("other rows", data_hash(self.rows))
        if world.size > 1 and self.run.gather and "moments" in self.options.passes:
            raise UsageError("--moments exact reads factors that other ranks have written: leave out --gather")
        inputs = Inputs(sides, world, hasher)
        with arithmetic(self.model.dtype, self.model.device):
            try_out(self.model, self.plan.resident and self.turns is None)
            if self.plan.resident and self.turns is not None:
                self.model.load_all([stage_of(level, len(self.model.blocks)) for level in self.turns.levels])
        data = self.data(files, out.parent) if world.first else None
        with ExitStack() as stack:
            transaction = folder = None
            if data is not None:
                fingerprint = self._fingerprint(data)
                transaction = Transaction(out, fingerprint, self.run.force, self.run.resume, mode=0o700)
                folder = stack.enter_context(transaction).partial
                transaction.check_inputs(inputs.one)
                if transaction.anew:
                    console.note(transaction.anew)
            if not self.run.gather:
                folder = stack.enter_context(Joint(world, transaction, (out, out), (self._names(), ()), gather=False)).partial
            walks = Passes(self, transaction, folder, inputs, console.note)
            steps = len(self.options.passes) * (2 * len(self.model.blocks) if self.plan.blockwise else 1)
            with console.progress("curvature", self.tokens * steps // world.size, unit="tokens", per=steps) as progress:
                records = walks.run(progress, steps // len(self.options.passes))
            hashes = inputs.hashes()
            if transaction is None or data is None:
                return None
            described = {name: manifest.Input.of(*side, hashes) for name, side in sides.items()}
            document = self.describe(records[0], described, data)
            outputs = [file for record in records for file in record.stages.values()]
            document = factors.finish(transaction.partial, outputs, document)
            transaction.commit(manifest.dump(document))
        return document

    def _names(self) -> list[str]:
        """Return the name of every file that a rank may write."""
        each = [(name, stage) for name in self.options.passes for stage in self.model.stages]
        parts = [group_name(name, k, stage) for name, stage in each for k in range(len(self.groups))]
        return [
            *(factors.final_name(name, stage) for name, stage in each),
            *(f"{part}{ending}" for part in parts for ending in (SUMS_END, ROWS_END)),
        ]

    def data(self, files: Sequence[DataFile], folder: Path) -> manifest.Data:
        """Say what was read: with its hash where that tells nothing, else under a name that only `folder`'s key can make."""
        secret = self.options.is_private or any(file.secret for file in files)
        identity = private.identity(folder, data_hash(self.rows).encode()) if secret else None
        return summary(files, self.rows, secret).model_copy(update={"identity": identity})

    def _fingerprint(self, data: manifest.Data) -> str:
        """Hash everything that decides the numbers, for --resume."""
        sides = [side for side in (self.point.finetuned, self.point.reference) if side is not None]
        inputs = [[s.identity for s in side.shards.values()] for side in sides]
        cut = [len(self.groups), self.plan.resident, str(self.run.device), self.run.kernels]
        rows = data.sha256 or data.identity
        maker = manifest.Maker(kind="curvature").model_dump()
        seen = json.dumps([inputs, asdict(self.options), rows, cut, maker], sort_keys=True)
        return hashlib.sha256(seen.encode()).hexdigest()

    def describe(self, found: Found, inputs: dict[str, manifest.Input], data: manifest.Data) -> manifest.Curvature:
        """Say what was computed, from what.

        Args:
            found: by the pass over the factors.
            inputs: the checkpoints.
            data: the rows.

        Raises:
            BadInput: when no matrix was used in a way that is understood.
        """
        shared, tokens = found.shared, found.tokens
        targets = [target for stage in self.model.stages for target in self.targets[stage]]
        layers = {
            target.name: layer_of(target, shared[target.name], tokens[target.name], position)
            for position, target in enumerate(targets)
            if target.name in shared
        }
        if not layers:
            raise BadInput(f"{type(self.model.model).__name__}: none of its matrices is used in a way that is understood")
        unseen = {t.name: "used in a way that is not understood, or by no token" for t in targets if t.name not in layers}
        return manifest.Curvature(
            parameters=manifest.CurvatureParameters(
                **{key: value for key, value in asdict(self.options).items() if key != "group_tokens"}
            ),
            inputs=inputs,
            model_sha256=_model_hash(inputs, self.options.at),
            data=[data],
            layers=layers,
            left_out={**self.left_out, **unseen},
            totals=manifest.FactorTotals(
                tokens=sum(row.weight * row.tokens for row in self.rows),
                loss=found.loss / max(found.loss_tokens, 1),
                loss_tokens=found.loss_tokens,
            ),
            machine=manifest.Machine.of(self.run).model_copy(update={"resident": self.plan.resident}),
            private=data.identity is not None,
        )


def layer_of(target: Factored, owner: str, tokens: float, position: int) -> manifest.FactorLayer:
    """Say what a layer is: its matrix, whose input it shares, how many tokens it saw, and its place in the model."""
    return manifest.FactorLayer(
        tensor=target.tensor,
        matrix=target.matrix,
        d_out=target.d_out,
        d_in=target.d_in,
        transposed=target.transposed,
        kind=target.kind,
        input=owner,
        tokens=tokens,
        position=position,
    )


def _model_hash(inputs: Mapping[str, manifest.Input], at: float) -> str:
    """Hash which weights the factors belong to: the files of the model, and of the reference when the point is not at 1."""
    known: Iterable[tuple[str, manifest.Input]] = inputs.items()
    seen = {name: sorted(f.sha256 for f in side.files.values()) for name, side in known if name == "model" or at != 1.0}
    return hashlib.sha256(json.dumps([seen, at], sort_keys=True).encode()).hexdigest()
