"""How often a long run keeps its state, and that a signal waits for it.

What a kill takes is a minute of work at most, and keeping takes little of the time. A signal takes less: it ends the run behind
the unit of work that is under way, and all that is finished is kept.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from liborth_cli.checkpoint.outputs import check_space
from liborth_cli.console import size
from liborth_cli.errors import OutOfResources

SECONDS, SHARE = 60.0, 20.0
"""A state is kept when the last one is so old, unless keeping one takes more than a twentieth of the time."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Pace:
    """Tells when a state is due: now and then, and when a signal is to end the run."""

    def __init__(self, unit: str, tell: Callable[[str], None]) -> None:
        """Begin to count now.

        Args:
            unit: what the work consists of; a state is that of so many.
            tell: is told what a signal waits for.
        """
        self._unit, self._tell = unit, tell
        self._last, self._cost, self._full = time.monotonic(), 0.0, False
        self._unkept, self._waiting = False, None
        self._handlers: dict[int, Callable[[int, FrameType | None], object]] = {}

    def done(self) -> None:
        """Note at the end of a unit that there is something to keep; not on a disk that had no room for a state."""
        self._unkept = not self._full
        if self._full:
            self._obey()

    @property
    def is_due(self) -> bool:
        """Whether a state should be kept now: the last one is old enough, or a signal waits."""
        return not self._full and (self.waits or time.monotonic() - self._last >= max(SECONDS, SHARE * self._cost))

    @property
    def waits(self) -> bool:
        """Whether a signal waits for a state."""
        return self._waiting is not None

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
        """Keep a state within, and note how long that takes; a signal that waited for it ends the run then."""
        begin = time.monotonic()
        yield
        self._last = time.monotonic()
        self._cost = self._last - begin
        self.rest()

    def rest(self) -> None:
        """Note that all units are kept: there is nothing a signal should wait for."""
        self._unkept = False
        self._obey()

    @contextmanager
    def minding(self) -> Iterator[None]:
        """Within, let Ctrl-C and SIGTERM wait for the end of a unit where others are not kept yet; a second one does not wait.

        Only signals that somebody handles wait, in the main thread, where they arrive.
        """
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if callable(known := signal.getsignal(number)):
                    self._handlers[number] = known
                    signal.signal(number, self._heed)
        try:
            yield
        finally:
            self._unmind()
        self._obey()

    def _heed(self, number: int, _frame: FrameType | None) -> None:
        """Let a signal wait, or hand it on."""
        waited, self._waiting = self.waits, number
        if self._unkept and not waited:
            text = f"stopping behind this {self._unit}, to keep what is finished; once more stops at once"
            threading.Thread(target=self._tell, args=(text,), daemon=True).start()  # a handler may stand in the midst of a line
        else:
            self._obey()

    def _obey(self) -> None:
        """Hand on the signal that waits."""
        number, self._waiting = self._waiting, None
        if number is not None:
            self._unmind()
            signal.raise_signal(number)

    def _unmind(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())
