"""Hash input files beside the work, so that the manifest can name exactly what was read."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import queue
import threading
from pathlib import Path

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.writer import Written
from liborth_cli.errors import BadInput

PIECE = 1 << 23


class BackgroundHasher:
    """One daemon thread that hashes files in the order they are asked for.

    SHA-256 releases the interpreter lock, so this costs a second core, and it warms the page cache for the reader.
    """

    def __init__(self) -> None:
        """Start the thread."""
        self._queue: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._asked: dict[Path, None] = {}
        self._done: dict[Path, Written | OSError] = {}
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

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
        if path not in self._asked:
            self._asked[path] = None
            self._queue.put(path)

    def collect(self) -> dict[Path, Written]:
        """Wait for all files asked for.

        Raises:
            BadInput: when one could not be read.
        """
        self._queue.put(None)
        self._thread.join()
        for path, result in self._done.items():
            if isinstance(result, OSError):
                raise BadInput(f"{path}: cannot be read ({result.strerror})")
        return {path: result for path, result in self._done.items() if isinstance(result, Written)}

    def _work(self) -> None:
        buffer = bytearray(PIECE)
        view = memoryview(buffer)
        while (path := self._queue.get()) is not None:
            try:
                digest, size = hashlib.sha256(), 0
                with open(path, "rb", buffering=0) as file:
                    while count := file.readinto(buffer):
                        digest.update(view[:count])
                        size += count
                self._done[path] = Written(path.name, size, digest.hexdigest())
            except OSError as error:
                self._done[path] = error
