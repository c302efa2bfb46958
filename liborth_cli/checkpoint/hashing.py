"""Hash input files beside the work or from its own reads, so that the manifest can name exactly what was read."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from liborth_cli import manifest
from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.files import Written, hash_open
from liborth_cli.checkpoint.private import FILE as PRIVATE
from liborth_cli.checkpoint.private import vouched
from liborth_cli.checkpoint.reader import Checkpoint, Shard, stamp
from liborth_cli.errors import BadInput, from_os
from liborth_cli.machine import available_cores

PIECE = 1 << 23
MOST_THREADS = 8


class ReadHash:
    """Hashes a shard from the reads that are made of it anyway, when they come in the order of the file.

    What was skipped is read when something after it is; what comes twice is hashed once. Any thread may read.
    """

    def __init__(self, shard: Shard) -> None:
        """Listen to a shard of which nothing but the header has been read."""
        self._shard, self._digest, self._position = shard, hashlib.sha256(shard.header), len(shard.header)
        self._lock = threading.RLock()
        shard.on_read = self._see

    def finish(self) -> Written:
        """Read what nobody has read, and return name, size and hash of the whole."""
        with self._lock:
            self._advance(self._shard.size)
            return Written(self._shard.name, self._shard.size, self._digest.hexdigest())

    def _see(self, first: int, data: np.ndarray) -> None:
        with self._lock:
            if first > self._position:
                self._advance(first)
            fresh = data[max(self._position - first, 0) :] if first <= self._position else data[:0]
            self._digest.update(fresh.data)
            self._position += len(fresh)

    def _advance(self, stop: int) -> None:
        buffer = np.empty(min(PIECE, stop - self._position), np.uint8)
        while self._position < stop:
            self._shard.read_into(buffer[: stop - self._position], self._position)


def lanes() -> int:
    """Return how many files to hash at a time: one for every four cores."""
    return min(max(available_cores() // 4, 1), MOST_THREADS)


class BackgroundHasher:
    """Daemon threads that hash files in the order they are asked for: one for every four cores.

    SHA-256 releases the interpreter lock, so this costs other cores, and it warms the page cache for the reader. One core
    hashes one or two GB/s; a GPU reads faster than that. A thread ends when nothing is left to hash.
    """

    def __init__(self) -> None:
        """Start nothing yet."""
        self._queue, self._lock = deque[Path](), threading.Lock()
        self._stamps: dict[Path, tuple[int, int, int, int]] = {}
        self._results: dict[Path, Future[Written]] = {}
        self._threads = 0

    @classmethod
    def head_start(cls, *specs: str | None) -> BackgroundHasher:
        """Begin with local checkpoints before anything else is known of them, shard by shard in turn.

        Args:
            *specs: what the user typed; whatever is not a sound local checkpoint is left for others to complain about.
        """
        hasher, shards = cls(), []
        for spec in filter(None, specs):
            if Path(spec).exists():
                with contextlib.suppress(BadInput), Checkpoint.open(Path(spec)) as checkpoint:
                    shards.append([shard.path for shard in checkpoint.shards.values()])
        for path in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*shards))):
            hasher.ask(path)
        return hasher

    def ask(self, path: Path) -> None:
        """Queue a file, once."""
        with self._lock:
            if path in self._results:
                return
            self._results[path] = Future()
            self._queue.append(path)
            if self._threads < lanes():
                self._threads += 1
                threading.Thread(target=self._work, daemon=True).start()

    def wait(self, path: Path) -> Written:
        """Wait for one file, which is asked for when nobody has.

        Raises:
            BadInput: when it could not be read.
        """
        self.ask(path)
        try:
            return self._results[path].result()
        except OSError as error:
            raise from_os(error, path, "read", BadInput) from None

    def each(self, paths: Sequence[Path]) -> Iterator[Written]:
        """Ask for some files and yield what they are, in their order; those that follow are hashed meanwhile.

        Raises:
            BadInput: when one could not be read.
        """
        for path in paths:
            self.ask(path)
        yield from map(self.wait, paths)

    def collect(self) -> dict[Path, Written]:
        """Wait for all files asked for.

        Raises:
            BadInput: when one could not be read.
        """
        return {path: self.wait(path) for path in list(self._results)}

    def check_same(self, shards: Iterable[Shard]) -> None:
        """Raise BadInput when a file was hashed as something else than it was opened as: a head start can come too early."""
        for shard in shards:
            if self._stamps[shard.path] != shard.stamp:
                raise BadInput(f"{shard.path}: the file changed while it was read; start again when nothing writes to it")

    def _next(self) -> Path | None:
        """Return the next file; None ends the thread that asks."""
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            self._threads -= 1
            return None

    def _work(self) -> None:
        while (path := self._next()) is not None:
            try:
                with open(path, "rb", buffering=0) as file:
                    self._stamps[path] = stamp(file.fileno())
                    written = hash_open(file.fileno(), path.name)
                self._results[path].set_result(written)
            except OSError as error:
                self._results[path].set_exception(error)


def check_belongs(memory: Memory, general: Checkpoint) -> None:
    """Hash a memory and the general files, and hold them against what both were when the memory was made.

    Args:
        memory: what is laid over them.
        general: the checkpoint it is laid over.

    Raises:
        PairMismatch: when a general file is, to the bit, another one, or the memory is of another output.
        BadInput: when the memory is damaged, or no sound manifest says what it should be.
    """
    own, shards = memory.checkpoint, [*general.shards.values(), *memory.checkpoint.shards.values()]
    folder = general.path if general.path.is_dir() else general.path.parent
    known = vouched(own.path, manifest.read(folder, manifest.Split, manifest.Tune))
    for number, written in enumerate(BackgroundHasher().each([shard.path for shard in shards])):
        if number < len(general.shards):
            memory.check_belongs(written)
        elif not known:
            raise BadInput(f"{own.path}: nothing vouches for it: {PRIVATE} is not beside it")
        elif (listed := known.get(written.name)) is None or listed.sha256 != written.sha256:
            raise BadInput(f"{shards[number].path}: damaged, or of another split: its hash is not in the manifest")
