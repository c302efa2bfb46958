"""Sums of several ranks: each stage's are brought to one owner, which alone writes them, while the walk goes on to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import torch

from liborth_cli.curvature.factors import TOKENS, Sums
from liborth_cli.curvature.plan import Plan
from liborth_cli.ranks import World
from liborth_cli.stream.batches import Batch, batches
from liborth_cli.stream.texts import Row

COUNT = "count/"
"""Beside the sums of a layer: how many tokens it saw."""
Counts = dict[str, float]
Then = Callable[[Sums, Counts], None]


class Reducer:
    """Adds up what every rank has of a stage, one stage behind the walk; used in a `with`.

    No sum is sent to more than one rank, and none is kept twice.

    Attributes:
        owners: stage → the rank that gets its sums.
    """

    def __init__(self, world: World, stages: Mapping[str, float], gather: bool = False) -> None:
        """Deal the stages.

        Args:
            world: the ranks.
            stages: stage → what its sums take.
            gather: rank 0 owns all of them, for no other rank's disk is seen.
        """
        dealt = world.assign(list(stages), lambda stage: stages[stage])
        self.owners = {stage: 0 if gather else rank for rank, some in enumerate(dealt) for stage in some}
        self._world, self._pool = world, ThreadPoolExecutor(1, thread_name_prefix="reduce") if world.size > 1 else None
        self._running: Future[None] | None = None

    def give(self, stage: str, sums: Sums, counts: Mapping[str, float], then: Then) -> None:
        """Add a part to the sums of a stage; every rank calls this for the same stages, in the same order.

        Args:
            stage: its name.
            sums: this rank's part; taken.
            counts: layer → tokens that it saw here.
            then: called with the whole, on the owner alone.
        """
        if self._pool is None:
            then(sums, dict(counts))
            return
        self.wait()
        every = {**sums, **{COUNT + layer: torch.tensor(count, dtype=torch.float64) for layer, count in counts.items()}}
        self._running = self._pool.submit(self._add, self.owners[stage], every, then)

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

    def _add(self, owner: int, part: Sums, then: Then) -> None:
        whole = self._world.reduce_to(owner, part, TOKENS)
        if owner == self._world.rank:
            counts = {name.removeprefix(COUNT): float(whole.pop(name)) for name in list(whole) if name.startswith(COUNT)}
            then(whole, counts)


def agreed(world: World, plan: Plan) -> Plan:
    """Return the plan of the rank that has the least memory, and as many tokens a group as all ranks hold together."""
    least = min(world.share([plan.resident, plan.group_tokens, plan.batch_tokens, plan.waiting, plan.blockwise]))
    resident, group, batch, waiting, blockwise = least
    return replace(
        plan,
        resident=resident,
        group_tokens=min(group * world.size, 1 << 62),
        batch_tokens=batch,
        waiting=waiting,
        blockwise=blockwise,
    )


def dealt_batches(world: World, rows: Sequence[Row], tokens: int, seed: int | None, device: torch.device) -> list[Batch]:
    """Return this rank's batches of a group; `batches` says the rest. A short group is cut finer: each rank has some."""
    if world.size > 1:
        tokens = min(tokens, max(sum(row.tokens for row in rows) // (2 * world.size), 1))
    every = batches(rows, tokens, seed, device)
    return world.assign(every, lambda batch: batch.tokens)[world.rank]
