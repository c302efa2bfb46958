"""The walks over the data of an estimate: each group of rows forward and backward, its sums to disk, a line in the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from liborth_cli import manifest
from liborth_cli.checkpoint.files import Written
from liborth_cli.checkpoint.hashing import BackgroundHasher
from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.joint import dealt_hashing, hashes_of_all
from liborth_cli.checkpoint.journal import Unit
from liborth_cli.checkpoint.reader import Checkpoint, named_shards
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.console import Progress
from liborth_cli.curvature import factors
from liborth_cli.curvature.collect import FactorCollector, MomentCollector
from liborth_cli.curvature.factors import GRADIENT_COVARIANCE, INPUT_COVARIANCE, VECTORS, Sums
from liborth_cli.curvature.planned import Planned
from liborth_cli.curvature.reduce import Counts
from liborth_cli.curvature.state import Found, Keeper, Walked
from liborth_cli.errors import LiborthError
from liborth_cli.heap import return_freed_memory
from liborth_cli.ranks import World
from liborth_cli.stream.batches import Batch
from liborth_cli.stream.host import Beside, Carrier
from liborth_cli.stream.tap import arithmetic
from liborth_cli.stream.walk import Course, Losses, Reached, walk_exact, walk_resident, walk_streamed

SUMS_END, ROWS_END = ".safetensors", "-rows.safetensors"


class GroupRecord(Found, Unit):
    """What the journal holds of a group: what all groups so far have found; the last has tokens in the files of its sums."""


@dataclass(frozen=True)
class _Stored:
    """The files of one stage and group: its sums, and its tokens where those are in a file of their own."""

    sums: manifest.File | None
    rows: list[manifest.File] = field(default_factory=list)


class Passes:
    """The walks over the data of one estimate, one group of rows after the other, each journalled when it is done."""

    def __init__(
        self,
        job: Planned,
        transaction: Transaction | None,
        folder: Path | None,
        inputs: Inputs,
        tell: Callable[[str], None],
    ) -> None:
        """Take the plan, and what a stopped run has finished; nothing is walked yet."""
        self._job, self._transaction, self._inputs = job, transaction, inputs
        self._folder = folder or Path()
        alone = transaction if job.run.world.size == 1 else None  # sums of several ranks are in several memories
        self._keeper = Keeper(alone, self._known, job.disk_bytes, tell)
        done = [dict(unit.line) for unit in transaction.finished.values()] if transaction else []
        self._finished = {unit.unit: unit for unit in map(Unit.model_validate, job.run.world.broadcast(done))}

    def run(self, progress: Progress, steps: int) -> list[GroupRecord]:
        """Return the record of the last group of each pass: files, tokens and owners of layers, losses."""
        records: list[GroupRecord] = []
        with self._keeper.pace.minding():
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
        if record is not None:
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
                [factors.write(folder / f"{file}{ROWS_END}", kept, carrier)] if kept else [],
            )

        beside, losses = Beside[_Stored](job.model.device, job.plan.waiting), Losses()

        def whole(stage: str, sums: Sums, counts: Counts) -> None:
            beside.ask(stage, partial(store, stage, sums, counts if first is None else first.tokens))

        with beside, job.reducer(whole) as reducer:

            def finished(stage: str) -> None:
                if job.plan.blockwise and job.model.device.type == "cpu":
                    return_freed_memory()  # of activations: what is made of the sums is mapped by itself
                mine = {target.name for target in job.targets[stage]}
                seen = {layer: count for layer, count in collector.tokens.items() if layer in mine}
                reducer.give(stage, collector.take(stage), seen)

            def sofar() -> Found:
                stored = beside.collect()
                return Found(
                    stages={stage: one.sums for stage, one in stored.items() if one.sums is not None},
                    rows={stage: one.rows for stage, one in stored.items()},
                    tokens=dict(collector.tokens),
                    shared=dict(collector.shared),
                    loss=losses.total,
                    loss_tokens=losses.tokens,
                )

            state = self._keeper.begin(unit, some)
            if state is not None:
                losses.total, losses.tokens = state.loss, state.loss_tokens
                collector.tokens.update(state.tokens)
                collector.shared.update(state.shared)
                for stage, files in state.rows.items():
                    one = _Stored(state.stages.get(stage), files)
                    beside.ask(stage, lambda _, one=one: one)
            with arithmetic(job.model.dtype, job.model.device):
                walk = _Walk(job, some, collector, finished, progress, losses)
                walk.run(self._keeper, state, sofar)
            reducer.wait()
            part = sofar()
        every = {} if last else {stage: [*rows.get(stage, []), *some] for stage, some in part.rows.items()}
        parts = job.run.world.share(part.model_copy(update={"rows": every}).model_dump())
        merged = _merged([Found.model_validate(one) for one in parts], list(job.model.stages), earlier)
        record = GroupRecord(unit=unit, files=merged.written, inputs=self._known(), **dict(merged))
        if self._transaction is None:
            return record
        self._transaction.finish(record)
        # Only now: a kill before the journal line leaves the earlier sums to resume from.
        done = [file for some in rows.values() for file in some] if last else []
        for old in (*before.values(), *done):
            (folder / old.name).unlink(missing_ok=True)
        self._keeper.end()
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

    job: Planned
    batches: list[Batch]
    collector: FactorCollector | MomentCollector
    finished: Callable[[str], None]
    progress: Progress
    losses: Losses

    def run(self, keeper: Keeper, state: Walked | None, sofar: Callable[[], Found]) -> None:
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

    def _batch_by_batch(self, keeper: Keeper, state: Walked | None, sofar: Callable[[], Found]) -> None:
        def reached(place: Reached) -> None:
            if keeper.is_due() and place.level < len(self.batches):
                keeper.keep_sums(place.level, self.collector.state(), sofar())

        if state is not None:
            self.collector.resume(keeper.sums(state))
            self.progress.skip(sum(state.batches[: state.done]))
        walk = walk_exact if self.job.options.fisher == "exact" else walk_resident
        begin = Reached(state.done if state else 0)
        walk(self.job.model, self.batches, self.collector, Course(self.losses, self.progress.advance, begin, reached))
        for stage in self.job.model.stages:
            self.finished(stage)

    def _block_by_block(self, keeper: Keeper, state: Walked | None, sofar: Callable[[], Found]) -> None:
        job, begin = self.job, Reached()
        relay = job.relay(self.batches, job.resources.scratch)

        def reached(place: Reached) -> None:
            if keeper.is_due():
                keeper.keep_slots(place, relay.store, sofar())

        if state is not None:
            begin = Reached(state.done, state.back)
            keeper.fill(relay.store, state)
            self.progress.skip(begin.blocks_walked(len(job.model.blocks)) * sum(state.batches))
        course = Course(self.losses, self.progress.advance, begin, reached)
        walk_streamed(job.model, self.batches, self.collector, relay, self.finished, course)


class Inputs:
    """The files of weights that every sum is made from; each is hashed by one rank, beside the walk."""

    def __init__(self, sides: Mapping[str, tuple[Checkpoint, Source]], world: World, hasher: BackgroundHasher) -> None:
        """Begin to hash what this rank hashes."""
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


def _merged(parts: Sequence[Found], stages: Sequence[str], earlier: Found | None) -> Found:
    """Put together what every rank has of a group; each stage was written by one of them."""
    tokens: dict[str, float] = {}
    for part in parts:
        for layer, count in part.tokens.items():
            tokens[layer] = tokens.get(layer, 0.0) + count
    files = {stage: file for part in parts for stage, file in part.stages.items()}
    rows = {stage: some for part in parts for stage, some in part.rows.items()}
    return Found(
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
