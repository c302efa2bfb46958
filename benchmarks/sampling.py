"""Where the threads of this process are, looked at every few milliseconds: a profile that sees waiting and all threads."""

from __future__ import annotations

import re
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType

PERIOD = 0.005
IDLE = ("_worker", "_work", "wait")
"""Functions in which threads wait for work."""


class Sampler:
    """Looks at all other threads while it is active.

    Attributes:
        seen: kind of thread → what it was in → how often; threads that wait for work are left out.
    """

    def __init__(self) -> None:
        """Seen nothing yet."""
        self.seen: dict[str, Counter[str]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Sampler:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()

    def table(self, lines: int = 10) -> str:
        """Name the places that each kind of thread was in most, with their shares of its time."""
        text = []
        for thread, places in sorted(self.seen.items(), key=lambda item: -item[1].total())[:6]:
            total = places.total()
            text.append(f"{thread} ({total} samples)")
            text += [f"  {count / total:5.0%} {place}" for place, count in places.most_common(lines)]
        return "\n".join(text)

    def _look(self) -> None:
        me = threading.get_ident()
        while not self._stop.wait(PERIOD):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if ident != me and frame.f_code.co_name not in IDLE:
                    name = re.sub(r"[-_]?\d+", "", names.get(ident, "?"))
                    self.seen.setdefault(name, Counter())[_place(frame)] += 1


def _place(frame: FrameType | None) -> str:
    """Name the innermost function, and the innermost one of ours that called it."""
    inner, ours = frame, frame
    while ours is not None and "liborth" not in ours.f_code.co_filename:
        ours = ours.f_back
    parts = [f"{Path(f.f_code.co_filename).name}:{f.f_lineno} {f.f_code.co_name}" for f in (inner, ours) if f is not None]
    return " < ".join(dict.fromkeys(parts))
