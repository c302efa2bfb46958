"""Hash input files beside the work, so that the manifest can name exactly what was read."""

from __future__ import annotations

import hashlib
import queue
import threading
from pathlib import Path

from liborth_cli.checkpoint.writer import Written
from liborth_cli.errors import BadInput

PIECE = 1 << 22


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
