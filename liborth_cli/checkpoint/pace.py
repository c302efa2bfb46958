"""How often a long run keeps its state: what a kill takes is a minute of work at most, and keeping takes little of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS, SHARE = 60.0, 20.0
"""A state is kept when the last one is so old, unless keeping one takes more than a twentieth of the time."""


class Pace:
    """Tells when a state is due."""

    def __init__(self) -> None:
        """Begin to count now."""
        self._last, self._cost = time.monotonic(), 0.0

    @property
    def is_due(self) -> bool:
        """Whether the last state is old enough."""
        return time.monotonic() - self._last >= max(SECONDS, SHARE * self._cost)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep a state within, and note how long that takes."""
        begin = time.monotonic()
        yield
        self._last = time.monotonic()
        self._cost = self._last - begin
