"""What connects one rank with the others, and notices when one of them ends: torch.distributed's only importer.

A rank that cannot go on says why, and rank 0 prints it. One that is killed, stopped or cut off is missed by its heartbeat.
Either way every rank ends: at once where it waits, after `GRACE` seconds where it computes. They leave what a kill leaves.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from liborth_cli import __version__, errors
from liborth_cli.console import error_line
from liborth_cli.errors import LiborthError, PairMismatch, RankLost, Stopped, UsageError, first_line
from liborth_cli.messages import HOST, Tensors, packed, unpacked

if TYPE_CHECKING:
    import torch

PATIENCE = 60
"""How many timeouts a rank that is alive may be waited for: nothing tells one that hangs from one at a large matrix."""
BEAT, GRACE = 0.25, 10.0
"""Seconds between two signs of life; and those in which a process may end by itself."""
PART = 1 << 20
"""Bytes of a part of one value in the store, which takes 8 MiB at most."""
LEFT, STOPPED = b"left", b"stopped"
DIED = "died (killed, or out of memory)"


@dataclass(frozen=True)
class Failure:
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
    def read(cls, store: Any) -> Failure:
        """Take it from the store."""
        return cls(*json.loads(store.get("failed")))

    def write(self, store: Any) -> None:
        """Put it where every rank looks."""
        store.set("failed", json.dumps([self.rank, self.kind, self.text]))

    def error(self) -> LiborthError:
        """Return it as it is raised on the other ranks."""
        kind = getattr(errors, self.kind, LiborthError)
        return kind(self.text) if kind is not Stopped else RankLost(self.text)


class Line:
    """The connections of one rank: a store that all of them reach, and, once tensors are sent, a process group."""

    def __init__(self, rank: int, size: int, place: tuple[str, int, bool], timeout: int, prefix: str) -> None:
        """Connect to the store.

        Args:
            rank: this one.
            size: how many there are.
            place: host and port of the store, and whether this rank is to make it.
            timeout: seconds without a sign of life after which a rank is given up.
            prefix: of every key, so that another attempt of torchrun reads nothing of this one.

        Raises:
            UsageError: when the port is taken.
            RankLost: when nobody answers.
        """
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what ranks have to say rank 0 says
        import torch.distributed as dist

        self.rank, self.size, self._timeout, self._prefix = rank, size, timeout, prefix
        self._dist: Any = dist  # its stubs leave out what it exports
        self._host, self._port, hosted = place
        self._kept = self._connect(hosted)
        self._store: Any = self._dist.PrefixStore(prefix, self._kept)
        self._group, self._rounds = False, 0
        self.tensors = Tensors(rank, size, self)
        self._failure: Failure | None = None
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
                Failure(self.rank, type(error).__name__, str(error)).write(self._store)
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
        """Exchange one small value a rank; see `World.share`."""
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
        """Tell rank 0 something, from any thread."""
        number = self._reach(lambda: self._store.add("posts", 1))
        self._put(f"post/{number}", value)

    def posts(self, over: Callable[[], bool]) -> Iterator[Any]:
        """Yield what ranks post, until `over` says that nothing more will come."""
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
                self._failure = Failure.read(self._store)
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
        """Say where this rank computes, and settle where tensors are sent from; see `World.use`."""
        found = self.share(device)
        alone = len(set(zip(self._hosts, found, strict=True))) == self.size  # NCCL refuses two ranks on one GPU
        nccl = alone and all(one.startswith("cuda") for one in found)
        self.tensors.place = device if nccl else HOST

    def send(self, tensor: torch.Tensor, to: int, tag: int) -> None:
        """Send one tensor to another rank, which waits for it with the same tag."""
        self._through(to, lambda: self._dist.send(tensor, to, tag=tag))

    def recv(self, tensor: torch.Tensor, source: int, tag: int) -> None:
        """Fill a tensor with what another rank sends with this tag."""
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
                    return self._fall(Failure.read(store))
                now = time.monotonic()
                for rank, beat in zip(others, store.multi_get([f"heart/{rank}" for rank in others]), strict=True):
                    if seen.get(rank, (b"", 0.0))[0] != beat:
                        seen[rank] = beat, now
                    why = self._missing(rank, beat, now - seen[rank][1])
                    if why:
                        failure = Failure(rank, "RankLost", why)
                        failure.write(store)
                        return self._fall(failure)
            except RuntimeError:
                if not self._over.is_set():
                    self._fall(Failure(0, "RankLost", f"{self._where(0)}, or the store of the ranks, is gone"))
                return None
        return None

    def _listen(self) -> None:
        """Miss this rank's own heart: a connection that was cut says nothing, and holds whoever waits for an answer."""
        while not self._over.wait(BEAT):
            if time.monotonic() - self._beat > self._timeout:
                why = f"{self._where(0)} was not reached for {self._timeout} s: it is cut off"
                return self._fall(Failure(0, "RankLost", why))
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

    def _fall(self, failure: Failure) -> None:
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

    def _told(self, failure: Failure) -> str:
        own = failure.kind == "RankLost"
        return failure.text if own else f"{self._where(failure.rank)}: {failure.text}"

    def _interrupted(self, *_: object) -> None:
        """Raise in the main thread what ends the ranks."""
        if not self._over.is_set():
            self.look()

    def look(self) -> None:
        """Raise what ends the ranks, when something does."""
        if self._failure is not None:
            raise Failure(self._failure.rank, self._failure.kind, self._told(self._failure)).error()

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
                Failure(self.rank, type(error).__name__, str(error)).write(self._store)
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
        return where(rank, self._hosts)


def where(rank: int, hosts: Sequence[str]) -> str:
    """Name a rank and its machine, in a sentence."""
    return f"rank {rank} on {hosts[rank]}" if hosts[rank] else f"rank {rank}"
