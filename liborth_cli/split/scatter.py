"""Divide matrices in the order in which factors come, from the last block to the first, and write each where it belongs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from liborth_cli.checkpoint.pair import Action, Item
from liborth_cli.curvature.together import Together
from liborth_cli.machine import Run
from liborth_cli.split.carry import receive_skill, send_skill
from liborth_cli.split.divide import Divider, Job, Skill, ahead
from liborth_cli.split.plan import Splitter
from liborth_cli.split.shard import Folders, WrittenShard, begin_shard


@dataclass
class Scatter:
    """The unfinished files of a split whose factors come block by block.

    Attributes:
        plan: the split.
        folders: where its files go.
        owners: unfinished file → the rank that writes it.
        close: told of every file whose contents are written.
    """

    plan: Splitter
    folders: Folders
    owners: Mapping[str, int]
    close: Callable[[str, WrittenShard], None]
    _open: dict[str, WrittenShard] = field(default_factory=dict, repr=False)
    _closed: set[str] = field(default_factory=set, repr=False)

    def write(self, together: Together, run: Run, pool: Executor, advance: Callable[[int], None]) -> None:
        """Walk and divide, until every file is written; what is divided already is not measured again.

        Args:
            together: the walk.
            run: device, threads and ranks: all of them walk, and then share the matrices.
            pool: where matrices are divided.
            advance: told of the walk's tokens.
        """
        self._world, self._together = run.world, together
        files = [file for file in self.plan.files if file in self.owners]
        self._left = {file: {t.name for t in self.plan.files[file] if self._is_split(t.name)} for file in files}
        self._home = {name: file for file, names in self._left.items() for name in names}
        self._divider = Divider(
            self.plan.reference, self.plan.finetuned, self.plan.options, self.plan.factors, run.device, devices=run.devices
        )
        for names in together.ready({name: self._layers(self.plan.items[name]) for name in self._home}, advance):
            self._divide(names, run, pool)
            run.all_threads()
        for file in files:
            if file not in self._closed and self._writes(file):
                self._shard(file)
                self._settle(file)

    def _divide(self, names: list[str], run: Run, pool: Executor) -> None:
        """Divide some tensors and write them, the largest first: a large one that begins last is waited for alone."""
        items = sorted((self.plan.items[name] for name in names), key=lambda item: -math.prod(item.tensor.shape))
        jobs = [Job(item, number) for item in items for number in range(item.grid[0])]
        if not jobs:
            return
        run.share_threads(max(min(item.grid[1:]) for item in items))
        mine = [job for job in jobs if self._owner(job) == self._world.rank]
        found = ahead(pool, self._divider.skill, mine, self._divider.cost, self._divider.budget(mine))
        for item in items:
            name = item.tensor.name
            file = self._home[name]
            skills = self._carried([Job(item, number) for number in range(item.grid[0])], found, self.owners[file])
            if self._writes(file):
                self._shard(file).write(item, skills)
                self._left[file].discard(name)
                self._settle(file)
            else:
                deque(skills, maxlen=0)
        self._divider.forget()  # what matrices share they share within a block

    def _carried(self, jobs: Sequence[Job], found: Iterator[Skill], writer: int) -> Iterator[Skill]:
        """Yield on the writer what became of one tensor's matrices; send it there from those who divided them."""
        rank = self._world.rank
        for owner in map(self._owner, jobs):
            if owner == rank == writer:
                yield next(found)
            elif owner == rank:
                send_skill(self._world, next(found), writer)
            elif writer == rank:
                yield receive_skill(self._world, owner)

    def _owner(self, job: Job) -> int:
        """Return the rank that has the factors of a matrix; the writer's, where there are none."""
        layers = self.plan.factors.layers_of(job.item.twin, job.number)
        rank = next((rank for layer in layers if (rank := self._together.owner(layer)) is not None), None)
        return self.owners[self._home[job.item.tensor.name]] if rank is None else rank

    def _writes(self, file: str) -> bool:
        return self.owners[file] == self._world.rank

    def _shard(self, file: str) -> WrittenShard:
        """Return a file that is being written; when it is begun, all that waits for no factors is written into it."""
        if file not in self._open:
            shard = self._open[file] = begin_shard(self.plan, file, self.folders, scattered=True)
            nothing: Iterator[Skill] = iter(())
            for tensor in self.plan.files[file]:
                if not self._is_split(tensor.name):
                    shard.write(self.plan.items[tensor.name], nothing)
        return self._open[file]

    def _settle(self, file: str) -> None:
        if not self._left[file] and file not in self._closed:
            self._closed.add(file)
            self.close(file, self._open.pop(file))

    def _is_split(self, name: str) -> bool:
        return self.plan.items[name].action == Action.SPLIT

    def _layers(self, item: Item) -> set[str]:
        return {layer for number in range(item.grid[0]) for layer in self.plan.factors.layers_of(item.twin, number)}
