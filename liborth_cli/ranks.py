"""The processes that carry out one command together: torchrun starts them, torch.distributed connects them. Its only importer.

Every rank runs the same command with the same words. What is heavy is dealt (`World.assign`), sums go to one owner
(`reduce_to`), findings to rank 0 (`post`) or to all (`share`); rank 0 alone speaks and commits. Without torchrun there is one
rank, and whoever is given a `World` asks it the same things.

A rank that cannot go on says why, and rank 0 prints it. One that is killed, stopped or cut off is missed by its heartbeat.
Either way every rank ends: at once where it waits, after `GRACE` seconds where it computes. They leave what a kill leaves.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from liborth_cli import __version__, errors
from liborth_cli.console import error_line
from liborth_cli.errors import LiborthError, PairMismatch, RankLost, Stopped, UsageError, first_line
from liborth_cli.messages import HOST, Tensors, packed, unpacked

if TYPE_CHECKING:
    import torch

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun puts into the environment of every process."""
TIMEOUT = "LIBORTH_RANK_TIMEOUT"
"""Seconds without a sign of life after which a rank is given up; 60 when not set."""
PATIENCE = 60
"""How many such times a rank that is alive may be waited for: nothing tells one that hangs from one at a large matrix."""
BEAT, GRACE = 0.25, 10.0
"""Seconds between two signs of life; and those in which a process may end by itself."""
PART = 1 << 20
"""Bytes of a part of one value in the store, which takes 8 MiB at most."""
LEFT, STOPPED = b"left", b"stopped"
DIED = "died (killed, or out of memory)"

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
    _line: _Line | None = field(default=None, repr=False, compare=False)

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
        line = _Line(rank, int(size), (environment["MASTER_ADDR"], port, hosted), int(seconds), f"liborth/{attempt}")
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
        return _where(rank, self.hosts)

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


@dataclass(frozen=True)
class _Failure:
    """Why the ranks end.

    Attributes:
        rank: the one it began with.
        kind: name of the error's class.
        text: the line.
    """

    rank: int
    kind: str
    text: str

    @classmethod
    def read(cls, store: Any) -> _Failure:
        """Take it from the store."""
        return cls(*json.loads(store.get("failed")))

    def write(self, store: Any) -> None:
        """Put it where every rank looks."""
        store.set("failed", json.dumps([self.rank, self.kind, self.text]))

    def error(self) -> LiborthError:
        """Return it as it is raised on the other ranks."""
        kind = getattr(errors, self.kind, LiborthError)
        return kind(self.text) if kind is not Stopped else RankLost(self.text)


class _Line:
    """The connections of one rank: a store that all of them reach, and, once tensors are sent, a process group."""

    def __init__(self, rank: int, size: int, place: tuple[str, int, bool], timeout: int, prefix: str) -> None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what ranks have to say rank 0 says
        import torch.distributed as dist

        self.rank, self.size, self._timeout, self._prefix = rank, size, timeout, prefix
        self._dist: Any = dist  # its stubs leave out what it exports
        self._host, self._port, hosted = place
        self._kept = self._connect(hosted)
        self._store: Any = self._dist.PrefixStore(prefix, self._kept)
        self._group, self._rounds = False, 0
        self.tensors = Tensors(rank, size, self)
        self._failure: _Failure | None = None
        self._over, self._lock = threading.Event(), threading.Lock()
        self._heart: threading.Thread | None = None
        self._hosts = [""] * size
        self._pids = [0] * size

    def _connect(self, hosted: bool = False) -> Any:
        seconds = timedelta(seconds=self._timeout)
        try:
            return self._dist.TCPStore(self._host, self._port, None, hosted, seconds, wait_for_workers=False)
        except (RuntimeError, ValueError) as error:
            if hosted:
                why = "is in use" if "EADDRINUSE" in str(error) else "cannot be listened on"
                raise UsageError(f"MASTER_PORT={self._port} {why}; name another") from None
            raise RankLost(f"nobody answers at {self._host}:{self._port} within {self._timeout} s; is rank 0 there?") from None

    def meet(self) -> list[str]:
        """Learn of the others, and begin to watch them; return where they run."""
        try:
            self._meet()
        except LiborthError as error:
            with contextlib.suppress(RuntimeError):
                _Failure(self.rank, type(error).__name__, str(error)).write(self._store)
            raise
        self._beat = time.monotonic()
        self._heart = threading.Thread(target=self._watch, name="heart", daemon=True)
        self._heart.start()
        threading.Thread(target=self._listen, name="pulse", daemon=True).start()
        return self._hosts

    def _meet(self) -> None:
        import torch

        mine = (self.size, f"liborth {__version__}, torch {torch.__version__}", os.uname().nodename, os.getpid())
        if self._store.add(f"hello/{self.rank}", 1) > 1:
            raise UsageError(f"two processes say RANK={self.rank}")
        self._put(f"hello/{self.rank}/who", mine)
        signal.signal(signal.SIGUSR1, self._interrupted)
        for other in range(self.size):
            self._await(f"hello/{other}/who", f"rank {other} of {self.size} did not come", self._timeout)
            size, version, self._hosts[other], self._pids[other] = self._get(f"hello/{other}/who")
            if size != self.size:
                raise UsageError(f"rank {other} was started with WORLD_SIZE={size}, rank {self.rank} with {self.size}")
            if version != mine[1]:
                raise PairMismatch(f"{self._where(other)} runs {version}, rank {self.rank} {mine[1]}")
        self._store.set(f"heart/{self.rank}", "0")
        self.share(None)

    # Small values, through the store ------------------------------------------------------------------------------------

    def share(self, value: Any) -> list[Any]:
        self._rounds += 1
        self._put(f"round/{self._rounds}/{self.rank}", value)
        found = []
        for other in range(self.size):
            key = f"round/{self._rounds}/{other}"
            self._await(key, f"{self._where(other)} does not get on")
            found.append(self._get(key))
        if self._rounds > 1:  # whoever is in this round has read the last one
            self._drop(f"round/{self._rounds - 1}/{self.rank}")
        return found

    def post(self, value: Any) -> None:
        number = self._reach(lambda: self._store.add("posts", 1))
        self._put(f"post/{number}", value)

    def posts(self, over: Callable[[], bool]) -> Iterator[Any]:
        number = 1
        while not over():
            key = f"post/{number}"
            if not self._reach(lambda key=key: self._store.check([key])):
                self.look()
                time.sleep(0.02)
                continue
            yield self._get(key)
            self._drop(key)
            number += 1

    def _put(self, key: str, value: Any) -> None:
        raw = packed(value)
        parts = range(0, len(raw), PART)
        for number, start in enumerate(parts):
            self._reach(lambda n=number, s=start: self._store.set(f"{key}/{n}", raw[s : s + PART]))
        self._reach(lambda: self._store.set(key, str(len(parts))))

    def _get(self, key: str) -> Any:
        count = int(self._reach(lambda: self._store.get(key)))
        return unpacked(b"".join(self._reach(lambda n=n: self._store.get(f"{key}/{n}")) for n in range(count)))

    def _drop(self, key: str) -> None:
        with contextlib.suppress(RuntimeError):
            for number in range(int(self._store.get(key))):
                self._store.delete_key(f"{key}/{number}")
            self._store.delete_key(key)

    def _await(self, key: str, late: str, seconds: float | None = None) -> None:
        """Wait for a key; what ends the ranks ends the wait."""
        limit, pause = seconds or PATIENCE * self._timeout, 0.001
        end = time.monotonic() + limit
        while not self._reach(lambda: self._store.check([key])):
            if self._heart is None and self._store.check(["failed"]):
                self._failure = _Failure.read(self._store)
            self.look()
            if time.monotonic() > end:
                raise RankLost(f"{late} within {limit:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def _reach(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except RuntimeError:
            self.look()
            self._speak(0)
            raise RankLost(f"{self._where(0)}, or the store of the ranks at {self._host}:{self._port}, is gone") from None

    # Tensors, from one rank to another: `tensors` says which, and these carry them ------------------------------------

    def use(self, device: str) -> None:
        found = self.share(device)
        alone = len(set(zip(self._hosts, found, strict=True))) == self.size  # NCCL refuses two ranks on one GPU
        nccl = alone and all(one.startswith("cuda") for one in found)
        self.tensors.place = device if nccl else HOST

    def send(self, tensor: torch.Tensor, to: int, tag: int) -> None:
        self._through(to, lambda: self._dist.send(tensor, to, tag=tag))

    def recv(self, tensor: torch.Tensor, source: int, tag: int) -> None:
        self._through(source, lambda: self._dist.recv(tensor, source, tag=tag))

    def _through(self, other: int, work: Callable[[], Any]) -> None:
        try:
            self._open()
            work()
        except RuntimeError as error:
            for _ in range(int(GRACE / BEAT)):  # who ended the connection may still say why
                self.look()
                time.sleep(BEAT)
            raise RankLost(f"the connection to {self._where(other)} broke: {first_line(error)}"[:250]) from None

    def _open(self) -> None:
        """Connect every rank with every other, once; all come here at about the same time."""
        with self._lock:
            if not self._group:
                # Its own connection: whoever waits there for a dead rank holds it, and the others have to hear of that.
                store = self._dist.PrefixStore(f"{self._prefix}/tensors", self._connect())
                limit = timedelta(seconds=PATIENCE * self._timeout)
                kind = "gloo" if self.tensors.place == HOST else "cpu:gloo,cuda:nccl"  # the tensor's device says which
                self._dist.init_process_group(kind, store=store, rank=self.rank, world_size=self.size, timeout=limit)
                self._group = True

    # Who is alive -------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Give a sign of life, and miss those of others: rank 0 misses everybody, the others miss rank 0."""
        store, count, seen = self._dist.PrefixStore(self._prefix, self._connect()), 0, dict[int, tuple[bytes, float]]()
        others = [rank for rank in range(self.size) if rank != self.rank] if self.rank == 0 else [0]
        while not self._over.wait(BEAT):
            try:
                count, self._beat = count + 1, time.monotonic()
                store.set(f"heart/{self.rank}", str(count))
                if store.check(["failed"]):
                    return self._fall(_Failure.read(store))
                now = time.monotonic()
                for rank, beat in zip(others, store.multi_get([f"heart/{rank}" for rank in others]), strict=True):
                    if seen.get(rank, (b"", 0.0))[0] != beat:
                        seen[rank] = beat, now
                    why = self._missing(rank, beat, now - seen[rank][1])
                    if why:
                        failure = _Failure(rank, "RankLost", why)
                        failure.write(store)
                        return self._fall(failure)
            except RuntimeError:
                if not self._over.is_set():
                    self._fall(_Failure(0, "RankLost", f"{self._where(0)}, or the store of the ranks, is gone"))
                return None
        return None

    def _listen(self) -> None:
        """Miss this rank's own heart: a connection that was cut says nothing, and holds whoever waits for an answer."""
        while not self._over.wait(BEAT):
            if time.monotonic() - self._beat > self._timeout:
                why = f"{self._where(0)} was not reached for {self._timeout} s: it is cut off"
                return self._fall(_Failure(0, "RankLost", why))
        return None

    def _missing(self, rank: int, beat: bytes, silent: float) -> str:
        """Say what is wrong with a rank; nothing when it is alive, or has left."""
        where = self._where(rank)
        if beat == STOPPED:
            return f"{where} was stopped by a signal"
        if beat != LEFT and silent > 2 * BEAT and self._is_dead(rank):
            return f"{where} {DIED}"
        if beat != LEFT and silent > self._timeout:
            return f"{where} gave no sign of life for {self._timeout} s: it is stuck, dead or cut off"
        return ""

    def _is_dead(self, rank: int) -> bool:
        """Tell whether a rank of this machine has no process any more, or one that only waits to be buried."""
        if self._hosts[rank] != self._hosts[self.rank] or not os.path.isdir("/proc/self"):
            return False
        try:
            with open(f"/proc/{self._pids[rank]}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
        except OSError:
            return os.path.realpath("/proc/self") == f"/proc/{os.getpid()}"

    def _fall(self, failure: _Failure) -> None:
        """End this process: its main thread in the usual way, or, when that does not come, as a kill would."""
        self._failure = failure
        if self._over.is_set():
            return
        self._speak(failure.rank)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        if not self._over.wait(GRACE):
            error_line(self._told(failure))
            os._exit(failure.error().exit_code)

    def _speak(self, gone: int) -> None:
        """Let the second rank say what the first cannot."""
        if gone == 0 and self.rank == 1:
            sys.stderr = sys.__stderr__

    def _told(self, failure: _Failure) -> str:
        own = failure.kind == "RankLost"
        return failure.text if own else f"{self._where(failure.rank)}: {failure.text}"

    def _interrupted(self, *_: object) -> None:
        """Raise in the main thread what ends the ranks."""
        if not self._over.is_set():
            self.look()

    def look(self) -> None:
        if self._failure is not None:
            raise _Failure(self._failure.rank, self._failure.kind, self._told(self._failure)).error()

    def leave(self, error: BaseException | None) -> None:
        """Say how this rank ended, and wait for the others to hear it.

        Raises:
            RankLost: when a signal has ended this rank because another one died.
        """
        if error is None:
            if self.rank:
                self._await("done", "rank 0 does not get on")
            else:
                self._store.set("done", "")
        self._over.set()
        if self._heart is not None:
            self._heart.join(BEAT)
        if error is not None:  # a thread that waits for another rank would keep this process
            code = getattr(error, "exit_code", LiborthError.exit_code)
            end = threading.Timer(2 * GRACE, os._exit, [code])
            end.daemon = True
            end.start()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all ranks when one has ended
        lost = ""
        with contextlib.suppress(RuntimeError):
            if error is None or self._failure is not None:
                self._store.set(f"heart/{self.rank}", LEFT)
            elif isinstance(error, Stopped):
                self._store.set(f"heart/{self.rank}", STOPPED)
            else:
                _Failure(self.rank, type(error).__name__, str(error)).write(self._store)
                self._store.set(f"heart/{self.rank}", LEFT)
            lost = self._part(stopped=isinstance(error, Stopped))
        if self._group and error is None:
            self._dist.destroy_process_group()
        if lost:
            raise RankLost(lost) from None

    def _part(self, stopped: bool) -> str:
        """Wait until rank 0 has heard of it, and rank 0 until all have; return which rank is missing when a signal came."""
        lost = self._failure.rank if self._failure is not None and self._failure.kind == "RankLost" else None
        wanted = [rank for rank in (range(1, self.size) if self.rank == 0 else [0]) if rank != lost]
        end = time.monotonic() + (2.0 if stopped else GRACE)
        while wanted and time.monotonic() < end:
            hearts = self._store.multi_get([f"heart/{rank}" for rank in wanted])
            wanted = [rank for rank, beat in zip(wanted, hearts, strict=True) if beat not in (LEFT, STOPPED)]
            dead = [rank for rank in wanted if self._is_dead(rank)]
            if not wanted or dead == wanted:
                break
            time.sleep(0.02)
        if not stopped or not wanted or self.rank:
            return ""
        return f"{self._where(wanted[0])} {DIED if self._is_dead(wanted[0]) else 'is silent'}"

    def _where(self, rank: int) -> str:
        return _where(rank, self._hosts)


def _where(rank: int, hosts: Sequence[str]) -> str:
    return f"rank {rank} on {hosts[rank]}" if hosts[rank] else f"rank {rank}"
