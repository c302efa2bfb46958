"""Hash a file behind whoever writes it, so that at its end nearly all of it has been hashed."""

from __future__ import annotations

import hashlib
import os
import threading

from liborth_cli.machine import available_cores

PIECE = 1 << 23
"""Bytes hashed at a time, and that must be new for the thread to be woken."""


class HashBehind:
    """Hashes what a file holds, from its first byte on, on a thread of its own once there is much of it."""

    def __init__(self, fd: int, first: bytes) -> None:
        """Begin with bytes that will be written in front at the end.

        Args:
            fd: the file, open for reading too.
            first: its first bytes.
        """
        self._fd, self._digest, self._position = fd, hashlib.sha256(first), len(first)
        self._reached, self._ended = len(first), False
        self._more, self._alone = threading.Condition(), available_cores() < 2
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def reach(self, size: int) -> None:
        """Say that the next bytes are in the file; where there is one core, they are hashed at the end."""
        self._reached += size
        if self._reached - self._position < PIECE or self._alone:
            return
        if self._thread is None:
            thread = threading.Thread(target=self._follow, name="hash", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system gives no more threads: it is hashed at the end
                self._alone = True
                return
            self._thread = thread
        with self._more:
            self._more.notify()

    def finish(self) -> str:
        """Hash the rest, and return the sha256 of the whole.

        Raises:
            OSError: when the file could not be read.
        """
        self.end()
        if self._error is None:
            self._advance(self._reached)
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def end(self) -> None:
        """Stop the thread; it lets go of the file."""
        with self._more:
            self._ended = True
            self._more.notify()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        while True:
            with self._more:
                self._more.wait_for(lambda: self._ended or self._reached - self._position >= PIECE)
                if self._ended or self._error is not None:
                    return
            self._advance(self._reached)

    def _advance(self, limit: int) -> None:
        view = memoryview(bytearray(min(PIECE, limit - self._position)))
        try:
            while self._position < limit and not (self._ended and threading.current_thread() is self._thread):
                count = os.preadv(self._fd, [view[: limit - self._position]], self._position)
                if not count:
                    raise OSError("the file is shorter than what was written to it")
                self._digest.update(view[:count])
                self._position += count
        except OSError as error:
            self._error = error
