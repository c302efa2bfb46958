"""A walk whose blocks are dealt to ranks: what goes from block to block goes from rank to rank, while the work goes on.

Level l of a walk is block l; −1 is what stands before the blocks, and behind the last is the head. Rank r has every level that
leaves r when it is divided by the number of ranks. So each rank holds one block at a time, and all are at work: while one has a
batch in its block, the next one has the batch before it in the block after it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch

from liborth_cli.ranks import ALONE, World
from liborth_cli.stream.store import Store

BLOCKS = 16
"""Tag of what one walk sends, when there is no other beside it."""
FORWARD, BACK = 0, 1
"""Which way a tensor goes, added to the walk's tag."""


@dataclass(frozen=True)
class Turns:
    """Which levels a rank has.

    Attributes:
        depth: number of blocks.
        rank: the rank.
        size: how many ranks there are.
    """

    depth: int
    rank: int = 0
    size: int = 1

    def owner(self, level: int) -> int:
        """Return the rank that has a level, −1 … depth."""
        return level % self.size

    def mine(self, level: int) -> bool:
        """Tell whether this rank has it."""
        return self.owner(level) == self.rank

    @property
    def levels(self) -> list[int]:
        """Those of this rank, from the first to the last."""
        return [level for level in range(-1, self.depth + 1) if self.mine(level)]

    @property
    def slots(self) -> int:
        """How many tensors of one batch wait here at a time, at most."""
        return len([level for level in self.levels if level >= 0]) + (not self.mine(self.depth))

    def slot(self, level: int) -> int:
        """Return where the input of a level waits; the gradient of its output waits in the next place."""
        return level // self.size if level >= 0 else -1


class Relay:
    """Brings every rank the inputs of its levels, and the gradients of their outputs; used in a `with`, which closes the store.

    Two threads receive, in the order in which batches and levels come, and one sends. Alone, it is the store itself.

    Attributes:
        turns: who has what.
        store: where tensors wait.
    """

    def __init__(self, store: Store, turns: Turns, world: World = ALONE, tag: int = BLOCKS) -> None:
        """Begin nothing yet.

        Args:
            store: where tensors wait, `turns.slots` of each batch.
            turns: who has what.
            world: the ranks.
            tag: of what is sent; two walks at a time need two of them, and each takes the next one too.
        """
        self.turns, self.store, self._world, self._tag = turns, store, world, tag
        # The first hidden state every rank makes itself, and the last gradient whoever has the head.
        up, down = [x for x in turns.levels if x > 0], [x for x in reversed(turns.levels) if x < turns.depth]
        self._expected, self._begun, self._over = [up, down], [0, 0], False
        self._there, self._news, self._failed = set[tuple[int, int, int]](), threading.Condition(), list[BaseException]()
        self._out = queue.SimpleQueue[tuple[int, int, torch.Tensor] | None]()
        self._threads: list[threading.Thread] = []

    def begin(self, batches: int, device: torch.device) -> None:
        """Receive from now on: for so many batches, where they are needed."""
        if self.turns.size == 1:
            return
        works = [self._send, *(partial(self._receive, way, batches, device) for way in (FORWARD, BACK))]
        self._threads = [threading.Thread(target=self._guarded, args=(work,), daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def put_input(self, index: int, level: int, value: torch.Tensor) -> None:
        """Hand a batch's hidden state to a level."""
        if self.turns.mine(level):
            self.store.put(index, self.turns.slot(level), value)
        else:
            self._out.put((self.turns.owner(level), FORWARD, value))

    def input(self, index: int, level: int) -> torch.Tensor:
        """Return a batch's hidden state before one of this rank's levels; wait for it."""
        if level and self.turns.size > 1:
            self._wait(index, level, FORWARD)
        return self.store.get(index, self.turns.slot(level))

    def put_gradient(self, index: int, level: int, value: torch.Tensor) -> None:
        """Hand what leaves one of this rank's levels, on the way back, to the level before it."""
        if self.turns.size == 1:
            self.store.put(index, self.turns.slot(level), value)
        else:
            self._out.put((self.turns.owner(level - 1), BACK, value))

    def gradient(self, index: int, level: int) -> torch.Tensor:
        """Return the gradient of a batch's hidden state behind one of this rank's levels; wait for it."""
        if self.turns.size > 1:
            self._wait(index, level, BACK)
        return self.store.get(index, self.turns.slot(level) + 1)

    def __enter__(self) -> Relay:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait until all is sent, unless the walk has failed; it may be left early, where every rank leaves it."""
        self._out.put(None)
        with self._news:
            self._over = True
            self._news.notify_all()
        for thread in self._threads if kind in (None, GeneratorExit) else ():
            thread.join()
        self.store.close()
        if kind is None and self._failed:
            raise self._failed[0]

    def _send(self) -> None:
        while (item := self._out.get()) is not None:
            to, way, value = item
            self._world.tensors.send(value, to, self._tag + way)

    def _receive(self, way: int, batches: int, device: torch.device) -> None:
        """Take what comes from the one neighbour; a slot is free by then, for the same batch has left the level above it."""
        for number, level in enumerate(self._expected[way]):
            with self._news:  # no more than one level ahead: a walk that is left early sends nothing for those after it
                self._news.wait_for(lambda number=number: self._over or self._begun[way] >= number)
                if self._over and self._begun[way] < number:
                    return
            source = self.turns.owner(level - 1 if way == FORWARD else level + 1)
            for index in range(batches):
                value = self._world.tensors.receive(source, self._tag + way).to(device)
                self.store.put(index, self.turns.slot(level) + way, value)
                with self._news:
                    self._there.add((index, level, way))
                    self._news.notify_all()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            with self._news:
                self._failed.append(error)
                self._news.notify_all()

    def _wait(self, index: int, level: int, way: int) -> None:
        with self._news:
            self._begun[way] = max(self._begun[way], self._expected[way].index(level) + 1)
            self._news.notify_all()
            while (index, level, way) not in self._there:
                if self._failed:
                    raise self._failed[0]
                self._news.wait(0.25)
                self._world.look()
