"""Sums of several ranks: each stage's are brought to one owner, which alone writes them, while the walk goes on to the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import torch

from liborth_cli.curvature.factors import TOKENS, Sums
from liborth_cli.curvature.plan import Plan
from liborth_cli.ranks import World
from liborth_cli.stream.batches import Batch, batches
from liborth_cli.stream.relay import Turns
from liborth_cli.stream.texts import Row

COUNT = "count/"
"""Beside the sums of a layer: how many tokens it saw."""
Counts = dict[str, float]
Then = Callable[[str, Sums, Counts], None]


class Reducer:
    """Brings the sums of every stage to their owner, one stage behind the walk; used in a `with`.

    No sum is sent to more than one rank, and none is kept twice.

    Attributes:
        owners: stage → the rank that gets its sums.
    """

    def __init__(
        self, world: World, stages: Mapping[str, float], then: Then, gather: bool = False, turns: Turns | None = None
    ) -> None:
        """Deal the stages.

        Args:
            world: the ranks.
            stages: stage → what its sums take, from the first to the last.
            then: called on the owner alone, with a stage, its sums, and layer → tokens that it saw; by one thread at a time.
            gather: rank 0 owns all of them, for no other rank's disk is seen.
            turns: who has all sums of a stage already, for blocks are dealt; None: every rank has a part of every stage.
        """
        dealt = world.assign(list(stages), lambda stage: stages[stage])
        owners = {stage: rank for rank, some in enumerate(dealt) for stage in some}
        made = {stage: turns.owner(level) for level, stage in enumerate(stages, -1)} if turns is not None else {}
        self.owners = dict.fromkeys(stages, 0) if gather else made or owners
        self._world, self._then, self._made, self._lock = world, then, made, threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reduce") if world.size > 1 else None
        self._running: Future[None] | None = None
        if self._pool is not None and made and gather and world.first:
            self._running = self._pool.submit(self._collect, [(stage, made[stage]) for stage in reversed(made) if made[stage]])

    def give(self, stage: str, sums: Sums, counts: Mapping[str, float]) -> None:
        """Hand in the sums of a stage: of every stage every rank, in the same order; where blocks are dealt, whose it is.

        Args:
            stage: its name.
            sums: this rank's part; taken.
            counts: layer → tokens that it saw here.
        """
        if self._pool is None or (self._made and self.owners[stage] == self._world.rank):
            self._finish(stage, sums, dict(counts))
            return
        self.wait()
        every = {**sums, **{COUNT + layer: torch.tensor(count, dtype=torch.float64) for layer, count in counts.items()}}
        if self._made:
            self._running = self._pool.submit(self._world.tensors.send_sums, every, self.owners[stage])
        else:
            self._running = self._pool.submit(self._add, stage, every)

    def wait(self) -> None:
        """Wait until what was given is where it belongs."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def __enter__(self) -> Reducer:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait, unless the work has failed."""
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def _add(self, stage: str, part: Sums) -> None:
        owner = self.owners[stage]
        whole = self._world.reduce_to(owner, part, TOKENS)
        if owner == self._world.rank:
            self._counted(stage, whole)

    def _collect(self, theirs: Sequence[tuple[str, int]]) -> None:
        """Take whole sums from the ranks that have them, in the order in which the walk makes them."""
        for stage, rank in theirs:
            self._counted(stage, dict(self._world.tensors.receive_sums(rank)))

    def _counted(self, stage: str, whole: Sums) -> None:
        counts = {name.removeprefix(COUNT): float(whole.pop(name)) for name in list(whole) if name.startswith(COUNT)}
        self._finish(stage, whole, counts)

    def _finish(self, stage: str, whole: Sums, counts: Counts) -> None:
        with self._lock:
            self._then(stage, whole, counts)


def agreed(world: World, planned: Callable[[int], Plan], parallel: str) -> Plan:
    """Return the plan that all ranks can follow: rows are dealt, or blocks where that alone fits or saves streaming.

    Args:
        world: the ranks.
        planned: number of ranks that blocks are dealt to → this rank's plan.
        parallel: "data", "layers" or "auto".
    """
    if world.size == 1:
        return planned(1)
    ways = {"data": 1, "layers": world.size}
    data, layers = (_of_all(world, planned(ways[way])) if parallel in (way, "auto") else None for way in ways)
    if data is None or (layers is not None and (not data.group_tokens or layers.resident > data.resident)):
        assert layers is not None
        return layers
    return data


def _of_all(world: World, plan: Plan) -> Plan:
    """Return the plan of the rank that has the least memory; where rows are dealt, with the groups of all of them together."""
    least = min(world.share([plan.resident, plan.group_tokens, plan.batch_tokens, plan.waiting, plan.blockwise]))
    resident, group, batch, waiting, blockwise = least
    return replace(
        plan,
        resident=resident,
        group_tokens=min(group * (1 if plan.layers else world.size), 1 << 62),
        batch_tokens=batch,
        waiting=waiting,
        blockwise=blockwise,
    )


def dealt_batches(world: World, rows: Sequence[Row], plan: Plan, seed: int | None, device: torch.device) -> list[Batch]:
    """Return this rank's batches of a group, all of them where blocks are dealt; a short group is cut finer: each has work."""
    tokens = plan.batch_tokens
    if world.size > 1:
        tokens = min(tokens, max(sum(row.tokens for row in rows) // (2 * world.size), 1))
    every = batches(rows, tokens, seed, device)
    return every if plan.layers else world.assign(every, lambda batch: batch.tokens)[world.rank]
