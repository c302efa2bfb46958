"""How often a long run keeps its state: what a kill takes is a minute of work at most, and keeping takes little of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from liborth_cli.checkpoint.outputs import check_space
from liborth_cli.console import size
from liborth_cli.errors import OutOfResources

SECONDS, SHARE = 60.0, 20.0
"""A state is kept when the last one is so old, unless keeping one takes more than a twentieth of the time."""


class Pace:
    """Tells when a state is due."""

    def __init__(self) -> None:
        """Begin to count now."""
        self._last, self._cost, self._full = time.monotonic(), 0.0, False

    @property
    def is_due(self) -> bool:
        """Whether the last state is old enough; none is due on a disk that had no room for one."""
        return not self._full and time.monotonic() - self._last >= max(SECONDS, SHARE * self._cost)

    def lack_of_room(self, folder: Path, nbytes: int, beside: int = 0) -> str:
        """Say that the disk has no room for a state, and have no more of them; "" where it has.

        Args:
            folder: where it would lie.
            nbytes: what it takes.
            beside: bytes that must be left.
        """
        try:
            check_space(folder, beside + nbytes)
        except OutOfResources:
            self._full = True
            return f"no room on the disk to keep the state ({size(nbytes)})"
        return ""

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep a state within, and note how long that takes."""
        begin = time.monotonic()
        yield
        self._last = time.monotonic()
        self._cost = self._last - begin
