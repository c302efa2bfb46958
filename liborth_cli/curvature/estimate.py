"""A whole estimate: rows through the model, sums to disk group by group, factors in place at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from liborth_cli import manifest
from liborth_cli.checkpoint import config, private
from liborth_cli.checkpoint.adapter import open_model
from liborth_cli.checkpoint.blockscaled import decoded
from liborth_cli.checkpoint.hashing import BackgroundHasher
from liborth_cli.checkpoint.hub import Source, resolve
from liborth_cli.checkpoint.joint import Joint, agree_on_inputs, dealt_hashing, hashes_of_all
from liborth_cli.checkpoint.journal import Unit
from liborth_cli.checkpoint.outputs import Kind, Place, check_outputs, check_space
from liborth_cli.checkpoint.reader import Checkpoint, named_shards
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.checkpoint.writer import Written
from liborth_cli.console import Console, Progress
from liborth_cli.curvature import factors
from liborth_cli.curvature.collect import FactorCollector, MomentCollector
from liborth_cli.curvature.factors import GRADIENT_COVARIANCE, INPUT_COVARIANCE, VECTORS, Sums
from liborth_cli.curvature.plan import CurvatureOptions, Plan, Resources, disk_bytes, plan, sum_bytes
from liborth_cli.curvature.reduce import Counts, Reducer, Then, agreed, dealt_batches
from liborth_cli.curvature.selection import Target, choose
from liborth_cli.curvature.state import Keeper, Sofar, Walked
from liborth_cli.errors import BadInput, LiborthError, OutOfResources, UsageError
from liborth_cli.machine import Run, process_bytes
from liborth_cli.ranks import ALONE, World
from liborth_cli.stream import work
from liborth_cli.stream.batches import Batch, groups
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.host import Beside, Carrier
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.relay import BLOCKS, Relay, Turns
from liborth_cli.stream.store import open_store
from liborth_cli.stream.tap import activation_dtype, arithmetic
from liborth_cli.stream.texts import DataFile, Row, RowReader, data_hash, summary
from liborth_cli.stream.trial import try_out
from liborth_cli.stream.walk import Course, Losses, Reached, stage_of, walk_exact, walk_resident, walk_streamed
from liborth_cli.stream.weights import Point

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
DEFAULT_LENGTH = 1024
SUMS_END, ROWS_END = ".safetensors", "-rows.safetensors"


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


@dataclass(frozen=True)
class Outline:
    """What an estimate would do; see `Plan` for how."""

    rows: int
    tokens: int
    groups: int
    matrices: int
    disk_bytes: int
    state_bytes: int
    memory_bytes: int
    seconds: float
    plan: Plan
    left_out: dict[str, str]


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


class Estimator:
    """A planned estimate of one model's curvature; `write` carries it out.

    Attributes:
        point: the weights.
        model: the model.
        rows: what it reads.
        options: what is computed.
        chosen: stage → sites and their targets.
        left_out: stored tensors without factors, with the reason.
        plan: how the work is cut up.
        turns: which rank has which blocks; None where rows are dealt.
    """

    def __init__(
        self, point: Point, model: BlockModel, rows: Sequence[Row], options: CurvatureOptions, resources: Resources, run: Run
    ) -> None:
        """Plan everything from shapes.

        Raises:
            OutOfResources: when the memory does not hold one block and one row.
            UsageError: when the options do not fit the model.
        """
        self.point, self.model, self.rows, self.options, self.run = point, model, rows, options, run
        self.chosen, self.left_out = choose(model, options.tensors, options.per_head, options.full_head)
        self.targets = {stage: [t for _, ts in sites for t in ts] for stage, sites in self.chosen.items()}
        self.resources = _checked(options, resources, run.parallel, model.vocabulary)
        lengths = [row.tokens for row in rows]
        planned = partial(plan, model, self.targets, options, self.resources, lengths)
        self.plan = agreed(run.world, planned, "data" if options.fisher == "exact" else run.parallel)
        self.turns = Turns(len(model.blocks), run.world.rank, run.world.size) if self.plan.layers else None
        if not self.plan.group_tokens:
            if model.device.type != "cpu":
                raise OutOfResources(
                    f"{model.device}: one block and one row of {max(lengths):,} tokens need about {self.plan.needed / 1e9:.2f} "
                    "GB there, more than is free; choose fewer matrices with --tensors, or compute with --device cpu"
                )
            raise OutOfResources(
                f"--memory: one block and one row of {max(lengths):,} tokens need about "
                f"{(self.plan.needed + process_bytes()) / 1e9:.2f} GB in all, more than allowed; raise it, keep block inputs "
                "on disk with --scratch, or choose fewer matrices with --tensors"
            )
        self.groups = list(groups(rows, self.plan.group_tokens))

    @property
    def disk_bytes(self) -> int:
        """Upper bound of what will be written, intermediate sums included."""
        positions = sum(row.tokens for row in self.rows)
        sums = sum(sum_bytes(t, self.options, positions) for group in self.targets.values() for t in group)
        return disk_bytes(self.targets, self.options, positions) + (sums if len(self.groups) > 1 else 0) + (1 << 20)

    @property
    def state_bytes(self) -> int:
        """Upper bound of what is kept on the disk for --resume while a group is under way."""
        if self.run.world.size > 1:
            return 0
        most = max(sum(row.tokens for row in group) for group in self.groups)
        if self.plan.blockwise:
            return most * self.model.hidden * activation_dtype(self.model.dtype).itemsize * (len(self.model.blocks) + 1)
        return sum(sum_bytes(t, self.options, most) for group in self.targets.values() for t in group)

    @property
    def memory_bytes(self) -> int:
        """What the process needs, about."""
        waiting = 0 if self.resources.scratch is not None else self.state_bytes
        return process_bytes() + self.plan.needed + (waiting if self.plan.blockwise else 0)

    @property
    def seconds(self) -> float:
        """How long it should take: products with weights, sums of a·aᵀ and g·gᵀ, and reading."""
        tokens, options = sum(row.tokens for row in self.rows), self.options
        walked = work.multiplied(self.model) * (1 + work.BACK + work.AGAIN * self.plan.blockwise) * len(options.passes)
        sums = 0.0
        for site, targets in (pair for pairs in self.chosen.values() for pair in pairs):
            square = site.d_in**2 + sum(t.d_out**2 for t in targets)
            whole = site.d_in * sum(t.d_out for t in targets)
            if site.kind == "linear" and not options.per_token:
                sums += square * (1 + (options.moments == "marginal")) / 2 + whole * options.diagonal
            if site.kind == "linear" and options.moments == "exact":
                sums += square + whole
        passes = len(self.options.passes) * (2 if self.plan.blockwise else 1)
        labels = self.model.vocabulary if options.fisher == "exact" else 1
        return (
            tokens * (walked + sums) * labels / work.rate(self.run.device) / self.run.world.size
            + work.reading(self.model, passes * (len(self.groups) if self.plan.blockwise else 1))
            + self.disk_bytes / work.DISK_RATE
        )

    def reducer(self, then: Then) -> Reducer:
        """Say which rank gets the sums of which stage: they are as large as its factors, and bases take cubes."""

        def cost(target: Target) -> float:
            bases = target.d_in**3 + target.d_out**3 if self.options.bases else 0
            return sum_bytes(target, self.options, 0) + bases / 100

        costs = {stage: sum(map(cost, self.targets[stage])) for stage in self.model.stages}
        return Reducer(self.run.world, costs, then, gather=self.run.gather, turns=self.turns)

    def relay(self, some: Sequence[Batch], scratch: Path | None, number: int = 0) -> Relay:
        """Return where the inputs of this rank's blocks wait; `number` tells walks apart that go side by side."""
        turns, world = self.turns or Turns(len(self.model.blocks)), self.run.world if self.turns else ALONE
        sizes = [batch.tokens * self.model.hidden * activation_dtype(self.model.dtype).itemsize for batch in some]
        return Relay(open_store(scratch, sizes, turns.slots), turns, world, BLOCKS + 2 * number)

    def dealt(self, group: int) -> list[Batch]:
        """Return the batches of a group of rows that go through this rank."""
        seed = self.options.seed if self.options.fisher == "sampled" else None
        return dealt_batches(self.run.world, self.groups[group], self.plan, seed, self.run.device)

    @property
    def outline(self) -> Outline:
        """What `write` would do."""
        tokens, count = sum(row.tokens for row in self.rows), sum(map(len, self.targets.values()))
        return Outline(
            len(self.rows),
            tokens=tokens,
            groups=len(self.groups),
            matrices=count,
            disk_bytes=self.disk_bytes,
            state_bytes=self.state_bytes,
            memory_bytes=self.memory_bytes,
            seconds=self.seconds,
            plan=self.plan,
            left_out=self.left_out,
        )

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
        inputs = _Inputs(sides, world, hasher)
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
            walks = _Passes(self, transaction, folder, inputs, console.note)
            steps = len(self.options.passes) * (2 * len(self.model.blocks) if self.plan.blockwise else 1)
            with console.progress(
                "curvature", sum(row.tokens for row in self.rows) * steps // world.size, unit="tokens", per=steps
            ) as progress:
                records = walks.run(progress, steps // len(self.options.passes))
            hashes = inputs.hashes()
            if transaction is None or data is None:
                return None
            described = {name: manifest.Input.of(*side, hashes) for name, side in sides.items()}
            document = self.describe(records, described, data)
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

    def describe(
        self, records: Sequence[GroupRecord], inputs: dict[str, manifest.Input], data: manifest.Data
    ) -> manifest.Curvature:
        """Say what was computed, from what.

        Args:
            records: of every pass over the data.
            inputs: the checkpoints.
            data: the rows.

        Raises:
            BadInput: when no matrix was used in a way that is understood.
        """
        shared, tokens = records[0].shared, records[0].tokens
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
                loss=records[0].loss / max(records[0].loss_tokens, 1),
                loss_tokens=records[0].loss_tokens,
            ),
            machine=manifest.Machine.of(self.run).model_copy(update={"resident": self.plan.resident}),
            private=data.identity is not None,
        )


class GroupRecord(Unit):
    """What the journal holds of a group: the sums of all groups so far.

    Attributes:
        stages: stage → the file of its sums.
        rows: stage → the files of tokens kept one by one, one a group; the last group has them in its sums' file.
        tokens: layer → how many tokens it saw, weighted.
        shared: layer → the layer under whose name its A is kept.
        loss: summed over all loss-carrying tokens.
        loss_tokens: how many those are.
    """

    stages: dict[str, manifest.File]
    rows: dict[str, list[manifest.File]]
    tokens: dict[str, float]
    shared: dict[str, str]
    loss: float
    loss_tokens: int


@dataclass(frozen=True)
class _Stored:
    """The files of one stage and group: its sums, and its tokens where those are in a file of their own."""

    sums: manifest.File | None
    rows: manifest.File | None = None


class _Passes:
    """The walks over the data of one estimate, one group of rows after the other, each journalled when it is done."""

    def __init__(
        self,
        job: Estimator,
        transaction: Transaction | None,
        folder: Path | None,
        inputs: _Inputs,
        tell: Callable[[str], None],
    ) -> None:
        self._job, self._transaction, self._inputs = job, transaction, inputs
        self._folder = folder or Path()
        alone = transaction if job.run.world.size == 1 else None  # sums of several ranks are in several memories
        self._keeper = Keeper(alone, self._known, job.disk_bytes, tell)
        done = [dict(unit.line) for unit in transaction.finished.values()] if transaction else []
        self._finished = {unit.unit: unit for unit in map(Unit.model_validate, job.run.world.broadcast(done))}

    def run(self, progress: Progress, steps: int) -> list[GroupRecord]:
        """Return the record of the last group of each pass: files, tokens and owners of layers, losses."""
        records: list[GroupRecord] = []
        for name in self._job.options.passes:
            records.append(self._pass(name, records[0] if records else None, progress, steps))
        return records

    def _pass(self, name: str, first: GroupRecord | None, progress: Progress, steps: int) -> GroupRecord:
        """Walk over all groups.

        Args:
            name: "factors", or "moments".
            first: the record of the pass over the factors, when it is over.
            progress: told of tokens.
            steps: how often it is told of each.
        """
        job, finished, collector = self._job, self._finished, self._collector(first)
        done = max((k + 1 for k in range(len(job.groups)) if f"{name}/{k}" in finished), default=0)
        record = finished[f"{name}/{done - 1}"].become(GroupRecord) if done else None
        if record is not None and isinstance(collector, FactorCollector):
            collector.tokens.update(self._counted_here(record))
            collector.shared.update(record.shared)
        progress.skip(steps * sum(row.tokens for group in job.groups[:done] for row in group))
        for k in range(done, len(job.groups)):
            record = self._group(f"{name}/{k}", collector, first, record, progress)
        assert record is not None
        return record

    def _group(
        self,
        unit: str,
        collector: FactorCollector | MomentCollector,
        first: GroupRecord | None,
        earlier: GroupRecord | None,
        progress: Progress,
    ) -> GroupRecord:
        """Walk one group, write the sums of all groups so far (the means, when it is the last), and journal them."""
        job, folder, (name, _, number) = self._job, self._folder, unit.partition("/")
        k, last = int(number), int(number) == len(job.groups) - 1
        some = job.dealt(k)
        before, rows = (earlier.stages, earlier.rows) if earlier else ({}, {})

        def store(stage: str, sums: Sums, tokens: dict[str, float], carrier: Carrier) -> _Stored:
            ahead = [folder / file.name for file in rows.get(stage, [])]
            if stage in before:
                sums = factors.add(folder / before[stage].name, sums)
            if last:
                sums = factors.packed(factors.average(sums, tokens, job.options.bases and first is None))
                file = factors.final_name(name, stage)
                return _Stored(factors.write(folder / file, sums, carrier, ahead) if sums or ahead else None)
            kept, file = factors.rows_of(sums), group_name(name, k, stage)
            return _Stored(
                factors.write(folder / f"{file}{SUMS_END}", sums, carrier) if sums else None,
                factors.write(folder / f"{file}{ROWS_END}", kept, carrier) if kept else None,
            )

        beside, losses = Beside[_Stored](job.model.device, job.plan.waiting), Losses()

        def whole(stage: str, sums: Sums, counts: Counts) -> None:
            beside.ask(stage, partial(store, stage, sums, counts if first is None else first.tokens))

        with beside, job.reducer(whole) as reducer:

            def finished(stage: str) -> None:
                mine = {target.name for target in job.targets[stage]}
                seen = {layer: count for layer, count in collector.tokens.items() if layer in mine}
                reducer.give(stage, collector.take(stage), seen)

            def sofar() -> Sofar:
                kept = beside.collect()
                sums = {stage: one.sums for stage, one in kept.items() if one.sums is not None}
                tokens = {stage: one.rows for stage, one in kept.items() if one.rows is not None}
                shared = dict(collector.shared) if isinstance(collector, FactorCollector) else {}
                return Sofar(sums, tokens, dict(collector.tokens), shared, losses.total, losses.tokens)

            state = self._keeper.begin(unit, some)
            if state is not None:
                losses.total, losses.tokens = state.loss, state.loss_tokens
                collector.tokens.update(state.tokens)
                if isinstance(collector, FactorCollector):
                    collector.shared.update(state.shared)
                for stage in job.model.stages:
                    if stage in state.stages or stage in state.rows:
                        one = _Stored(state.stages.get(stage), state.rows.get(stage))
                        beside.ask(stage, lambda _, one=one: one)
            with arithmetic(job.model.dtype, job.model.device):
                walk = _Walk(job, some, collector, finished, progress, losses)
                walk.run(self._keeper, state, sofar)
            reducer.wait()
            stored = beside.collect()
        part = GroupRecord(
            unit=unit,
            stages={stage: one.sums for stage, one in stored.items() if one.sums is not None},
            rows={} if last else {s: [*rows.get(s, []), *([one.rows] if one.rows else [])] for s, one in stored.items()},
            tokens=dict(collector.tokens),
            shared=dict(collector.shared) if isinstance(collector, FactorCollector) else {},
            loss=losses.total,
            loss_tokens=losses.tokens,
        )
        parts = [GroupRecord.model_validate(one) for one in job.run.world.share(part.model_dump())]
        record = _merged(parts, list(job.model.stages), earlier).model_copy(update={"inputs": self._known()})
        if self._transaction is None:
            return record
        self._transaction.finish(record)
        # Only now: a kill before the journal line leaves the earlier sums to resume from.
        done = [file for some in rows.values() for file in some] if last else []
        for old in (*before.values(), *done):
            (folder / old.name).unlink(missing_ok=True)
        self._keeper.clear()
        return record

    def _known(self) -> dict[str, str]:
        """Return the hashes of the inputs, by their names in the journal."""
        hashes = self._inputs.hashes()
        return {name: hashes[path].sha256 for name, path in self._inputs.paths.items()}

    def _counted_here(self, record: GroupRecord) -> dict[str, float]:
        """Return the tokens so far of those layers that this rank goes on counting; the others count from nought."""
        job, rank, turns = self._job, self._job.run.world.rank, self._job.turns
        owners = {stage: turns.owner(level) if turns else 0 for level, stage in enumerate(job.model.stages, -1)}
        names = {target.name for stage in job.model.stages if owners[stage] == rank for target in job.targets[stage]}
        return {layer: count for layer, count in record.tokens.items() if layer in names}

    def _collector(self, first: GroupRecord | None) -> FactorCollector | MomentCollector:
        job, wide = self._job, torch.float64 if self._job.options.dtype == "float64" else torch.float32
        if first is None:
            return FactorCollector(job.chosen, job.run.device, job.options, wide)
        stages = {target.name: stage for stage, targets in job.targets.items() for target in targets}

        def basis(layer: str) -> tuple[torch.Tensor, torch.Tensor]:
            file = self._folder / first.stages[stages[layer]].name
            keys = [VECTORS + INPUT_COVARIANCE + first.shared[layer], VECTORS + GRADIENT_COVARIANCE + layer]
            found = factors.read(file, keys)
            return found[keys[0]].to(job.run.device, wide), found[keys[1]].to(job.run.device, wide)

        return MomentCollector(job.chosen, job.run.device, basis, wide)


@dataclass(frozen=True)
class _Walk:
    """One walk over a group's batches, in the way that the plan says, from where a stopped run had got to."""

    job: Estimator
    batches: list[Batch]
    collector: FactorCollector | MomentCollector
    finished: Callable[[str], None]
    progress: Progress
    losses: Losses

    def run(self, keeper: Keeper, state: Walked | None, sofar: Callable[[], Sofar]) -> None:
        """Go through all of it.

        Args:
            keeper: keeps the state now and then.
            state: what it kept of a stopped run, or None.
            sofar: returns what was found until now.
        """
        if self.job.options.fisher == "exact" or not self.job.plan.blockwise:
            self._batch_by_batch(keeper, state, sofar)
        else:
            self._block_by_block(keeper, state, sofar)

    def _batch_by_batch(self, keeper: Keeper, state: Walked | None, sofar: Callable[[], Sofar]) -> None:
        def reached(place: Reached) -> None:
            if keeper.is_due and place.level < len(self.batches):
                keeper.keep_sums(place.level, self.collector.state(), sofar())

        if state is not None:
            self.collector.resume(keeper.sums(state))
            self.progress.skip(sum(state.batches[: state.done]))
        walk = walk_exact if self.job.options.fisher == "exact" else walk_resident
        begin = Reached(state.done if state else 0)
        walk(self.job.model, self.batches, self.collector, Course(self.losses, self.progress.advance, begin, reached))
        for stage in self.job.model.stages:
            self.finished(stage)

    def _block_by_block(self, keeper: Keeper, state: Walked | None, sofar: Callable[[], Sofar]) -> None:
        job, begin = self.job, Reached()
        relay = job.relay(self.batches, job.resources.scratch)

        def reached(place: Reached) -> None:
            if keeper.is_due:
                keeper.keep_slots(place, relay.store, sofar())

        if state is not None:
            begin = Reached(state.done, state.back)
            keeper.fill(relay.store, state)
            self.progress.skip(begin.blocks_walked(len(job.model.blocks)) * sum(state.batches))
        course = Course(self.losses, self.progress.advance, begin, reached)
        walk_streamed(job.model, self.batches, self.collector, relay, self.finished, course)


def _checked(options: CurvatureOptions, resources: Resources, parallel: str, vocabulary: int) -> Resources:
    """Hold options against each other and the model; return the resources that they need.

    Raises:
        UsageError: when they do not fit.
    """
    if options.per_token and options.fisher == "exact":
        raise UsageError("--per-token keeps one gradient a token, and --fisher exact has one for every label")
    if options.per_token and options.bases:
        raise UsageError("--per-token keeps tokens in place of covariances: leave out --eigen and --moments exact")
    if options.fisher != "exact":
        return resources
    if vocabulary > options.exact_vocabulary:
        raise UsageError(
            "--fisher exact runs one backward pass for each position and label, and this model has "
            f"{vocabulary:,} labels; --fisher sampled estimates the same, or allow it with --exact-vocabulary {vocabulary}"
        )
    if resources.weights == "stream" or parallel == "layers":
        raise UsageError("--fisher exact needs the whole model in memory: its many backward passes share one forward pass")
    return replace(resources, weights="resident")


def layer_of(target: Target, owner: str, tokens: float, position: int) -> manifest.FactorLayer:
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


class _Inputs:
    """The files of weights that every sum is made from; each is hashed by one rank, beside the walk."""

    def __init__(self, sides: Mapping[str, tuple[Checkpoint, Source]], world: World, hasher: BackgroundHasher) -> None:
        shards = named_shards({name: side for name, (side, _) in sides.items()})
        self.paths = {name: shard.path for name, shard in shards.items()}
        self._world, self._hasher = world, hasher
        self._hashes: dict[Path, Written] = {}
        for name in dealt_hashing(world, self.paths):
            hasher.ask(self.paths[name])

    def one(self, name: str) -> str | None:
        """Return the hash of one file by its name in a record; None when there is none such."""
        return self._hasher.wait(self.paths[name]).sha256 if name in self.paths else None

    def hashes(self) -> dict[Path, Written]:
        """Return the hashes of all; every rank calls this at the same point."""
        if not self._hashes:
            self._hashes = hashes_of_all(self._world, self.paths, {}, self._hasher.wait)
        return self._hashes


def _merged(parts: Sequence[GroupRecord], stages: Sequence[str], earlier: GroupRecord | None) -> GroupRecord:
    """Put together what every rank has of a group; each stage was written by one of them."""
    tokens: dict[str, float] = {}
    for part in parts:
        for layer, count in part.tokens.items():
            tokens[layer] = tokens.get(layer, 0.0) + count
    files = {stage: file for part in parts for stage, file in part.stages.items()}
    rows = {stage: some for part in parts for stage, some in part.rows.items()}
    return GroupRecord(
        unit=parts[0].unit,
        files=[*(files[stage] for stage in stages if stage in files), *(file for some in rows.values() for file in some)],
        stages={stage: files[stage] for stage in stages if stage in files},
        rows={stage: rows[stage] for stage in stages if stage in rows},
        tokens=tokens,
        shared=shared_inputs(part.shared for part in parts),
        loss=sum(part.loss for part in parts) + (earlier.loss if earlier else 0.0),
        loss_tokens=sum(part.loss_tokens for part in parts) + (earlier.loss_tokens if earlier else 0),
    )


def shared_inputs(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Put together what ranks found of layers that see the same input: layer → the one that owns its covariance.

    Raises:
        LiborthError: when they found different owners.
    """
    owners: dict[str, str] = {}
    for part in parts:
        for layer, owner in part.items():
            if owners.setdefault(layer, owner) != owner:
                raise LiborthError(f"{layer!r} shares its input with different layers on different ranks; please report it")
    return owners


def group_name(name: str, number: int, stage: str) -> str:
    """Return the stem of the files of one group's sums and tokens."""
    return f"group-{name}-{number:06d}-{stage}"


def _model_hash(inputs: Mapping[str, manifest.Input], at: float) -> str:
    """Hash which weights the factors belong to: the files of the model, and of the reference when the point is not at 1."""
    known: Iterable[tuple[str, manifest.Input]] = inputs.items()
    seen = {name: sorted(f.sha256 for f in side.files.values()) for name, side in known if name == "model" or at != 1.0}
    return hashlib.sha256(json.dumps([seen, at], sort_keys=True).encode()).hexdigest()
