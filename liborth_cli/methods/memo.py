"""What several matrices have in common is computed once: q, k and v share their input, and so do gate and up."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

LIMIT = 5 << 28
"""Bytes kept at a time (1.25 GiB): one joint basis of width 8,192, both ways, in float64."""


class Memo:
    """A small store of results, oldest out first; safe to use from several threads, which then wait for one another.

    Attributes:
        limit: bytes kept at most; a larger single result is handed over and forgotten.
        hits: how often a result was there.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        """Start empty."""
        self.limit, self.hits = limit, 0
        self._held: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()
        self._mine = threading.local()

    def get(self, key: Hashable | None, make: Callable[[], Any], nbytes: Callable[[Any], int]) -> Any:
        """Return the result kept under `key`, or make it.

        Args:
            key: None keeps nothing.
            make: computes the result; called by one thread at a time for each key.
            nbytes: the size of a result.
        """
        if key is None:
            return make()
        with self._lock:
            turn = self._making.setdefault(key, threading.Lock())
        with turn:
            with self._lock:
                if key in self._held:
                    self.hits += 1
                    self._held.move_to_end(key)
                    return self._use(self._held[key][0])
            import torch  # the options of methods are read without it

            result = make()
            if torch.cuda.is_initialized():  # another thread's stream may not read it before it is there
                torch.cuda.current_stream().synchronize()
            self._keep(key, result, nbytes(result))
            return self._use(result)

    def release(self) -> None:
        """Say that this thread's work with the results it was given is done: until then their memory is not used again."""
        self._mine.used = []

    def _use(self, result: Any) -> Any:
        self._mine.used = [*getattr(self._mine, "used", []), result]
        return result

    def clear(self) -> None:
        """Forget everything: nobody asks for it again."""
        with self._lock:
            self._held.clear()

    def _keep(self, key: Hashable, result: Any, size: int) -> None:
        with self._lock:
            self._making.pop(key, None)
            if size > self.limit:
                return
            self._held[key] = (result, size)
            while sum(size for _, size in self._held.values()) > self.limit:
                self._held.popitem(last=False)
