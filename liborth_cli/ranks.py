"""The processes that carry out one command together: torchrun starts them, and a `Line` connects each with the others.

Every rank runs the same command with the same words. What is heavy is dealt (`World.assign`), sums go to one owner
(`reduce_to`), findings to rank 0 (`post`) or to all (`share`); rank 0 alone speaks and commits. Without torchrun there is one
rank, and whoever is given a `World` asks it the same things.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from liborth_cli.errors import PairMismatch, UsageError
from liborth_cli.line import Line, where

if TYPE_CHECKING:
    import torch

    from liborth_cli.messages import Tensors

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun puts into the environment of every process."""
TIMEOUT = "LIBORTH_RANK_TIMEOUT"
"""Seconds without a sign of life after which a rank is given up; 60 when not set."""

Item = TypeVar("Item")


def deal(items: Sequence[Item], cost: Callable[[Item], float], bins: int) -> list[list[Item]]:
    """Put items into bins of nearly equal cost: the costliest first, each into the emptiest bin (Graham 1969, LPT).

    Args:
        items: in any order; the same order gives the same bins.
        cost: of one, ≥ 0.
        bins: how many.

    Returns:
        The bins, each with its items in their order.
    """
    heap, owner = [(0.0, number) for number in range(bins)], [0] * len(items)
    costs = [float(cost(item)) for item in items]
    for index in sorted(range(len(items)), key=lambda i: (-costs[i], i)):
        full, number = heap[0]
        owner[index] = number
        heapq.heapreplace(heap, (full + costs[index], number))
    return [[item for item, mine in zip(items, owner, strict=True) if mine == number] for number in range(bins)]


def rank_in(environment: Mapping[str, str]) -> int:
    """Return this process's rank by its environment; 0 where nothing, or nothing sound, says another."""
    text = environment.get("RANK", "0") if environment.get("WORLD_SIZE", "1") != "1" else "0"
    return int(text) if text.isdigit() else 0


@dataclass(frozen=True)
class World:
    """The ranks of one command; used in a `with`, which ends when all have ended.

    Attributes:
        rank: this process, 0 … size − 1.
        size: how many there are.
        local: its number among those of its machine, which is that of its GPU.
        hosts: where each of them runs.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    hosts: tuple[str, ...] = ("",)
    _line: Line | None = field(default=None, repr=False, compare=False)

    @classmethod
    def join(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Meet the other ranks; alone where the environment names none.

        Raises:
            UsageError: when the environment is not one that torchrun makes, or ranks were started in different ways.
            PairMismatch: when they run different versions.
            RankLost: when one does not come.
        """
        size = environment.get("WORLD_SIZE", "1")
        if size == "1":
            return cls()
        if missing := [name for name in NAMES if not environment.get(name)]:
            raise UsageError(f"WORLD_SIZE={size} and no {missing[0]}: start every rank with torchrun, or unset WORLD_SIZE")
        numbers = [environment[name] for name in NAMES if name != "MASTER_ADDR"] + [environment.get("LOCAL_RANK", "0")]
        if not all(text.isdigit() for text in numbers) or int(numbers[0]) >= int(size):
            said = ", ".join(f"{name}={environment[name]}" for name in NAMES)
            raise UsageError(f"{said}: these are no ranks; start every rank with torchrun, or unset WORLD_SIZE")
        seconds = environment.get(TIMEOUT, "60")
        if not seconds.isdigit() or int(seconds) < 2:
            raise UsageError(f"{TIMEOUT}={seconds}: write seconds, 2 or more")
        rank, port, local = int(numbers[0]), int(numbers[2]), int(numbers[3])
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == 0
        line = Line(rank, int(size), (environment["MASTER_ADDR"], port, hosted), int(seconds), f"liborth/{attempt}")
        return cls(rank, int(size), local, tuple(line.meet()), line)

    @property
    def siblings(self) -> int:
        """How many ranks share this machine, and its memory."""
        return self.hosts.count(self.hosts[self.rank])

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and commits."""
        return self.rank == 0

    def where(self, rank: int) -> str:
        """Name a rank and its machine, in a sentence."""
        return where(rank, self.hosts)

    def assign(self, items: Sequence[Item], cost: Callable[[Item], float]) -> list[list[Item]]:
        """Deal items to ranks; every rank finds the same (`deal`)."""
        return deal(items, cost, self.size)

    def share(self, value: Any) -> list[Any]:
        """Exchange one small value a rank; every rank calls this, at the same point of its work, and gets all of them."""
        return [value] if self._line is None else self._line.share(value)

    def each(
        self, items: Sequence[Item], work: Callable[[Item], Any], cost: Callable[[Item], float] = lambda _: 1.0
    ) -> list[Any]:
        """Have each item done by one rank; every rank calls this, with the same items, at the same point of its work.

        Args:
            items: where there are fewer than ranks, some ranks have nothing to do.
            work: carries one out; what it returns is plain data.
            cost: of one, as in `deal`; all the same unless it is said.

        Returns:
            What came of every item, in their order, on every rank.
        """
        mine = self.assign(range(len(items)), lambda number: cost(items[number]))[self.rank]
        found = self.share({number: work(items[number]) for number in mine})
        every = {number: one for some in found for number, one in some.items()}
        return [every[number] for number in range(len(items))]

    def broadcast(self, value: Item) -> Item:
        """Return on every rank what rank 0 has; every rank calls this, at the same point of its work."""
        return self.share(value if self.first else None)[0]

    def agree(self, what: str, value: Any) -> None:
        """Raise PairMismatch on every rank when one of them has another value than rank 0; `what` says of what."""
        found = self.share(value)
        other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
        if other is not None:
            raise PairMismatch(f"{self.where(other)} has {what} than {self.where(0)}")

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.share(None)

    def post(self, value: Any) -> None:
        """Tell rank 0 something, from any thread; it need not be listening."""
        assert self._line is not None
        self._line.post(value)

    def posts(self, over: Callable[[], bool]) -> Iterator[Any]:
        """Yield what ranks post, as it comes, until `over` says that nothing more will; rank 0 calls this, in one thread."""
        return iter(()) if self._line is None else self._line.posts(over)

    def reduce_to(self, owner: int, sums: dict[str, torch.Tensor], joined: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
        """Add up tensors by name, in the order of the ranks: the same ranks give the same bits; every rank calls this.

        Args:
            owner: the rank that gets the sums.
            sums: this rank's part; a name that others have not is there all the same. Taken, and changed.
            joined: what the names of those tensors begin with whose rows are put one after the other in place of being added.

        Returns:
            The sums on the owner; nothing elsewhere.
        """
        return sums if self._line is None else self.tensors.reduce_to(owner, sums, joined)

    @property
    def tensors(self) -> Tensors:
        """Sends tensors, plain data and files to other ranks, and waits for theirs; only where there are several."""
        assert self._line is not None
        return self._line.tensors

    def use(self, device: str) -> None:
        """Say where this rank computes; every rank calls this. Sums go from GPU to GPU (NCCL) when each rank has its own."""
        if self._line is not None:
            self._line.use(device)

    def look(self) -> None:
        """Raise what ends the ranks, when something does."""
        if self._line is not None:
            self._line.look()

    def __enter__(self) -> World:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """End together: when rank 0 has committed, or with what ended the first of them."""
        if self._line is not None:
            ended = isinstance(error, SystemExit) and not error.code
            self._line.leave(None if ended or getattr(error, "exit_code", 1) == 0 else error)


ALONE = World()
"""One process, started as any other."""
