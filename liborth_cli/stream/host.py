"""Streams of a GPU beside the first: one for every thread that works on it, and those that bring results to the host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from liborth_cli.checkpoint.dtypes import as_bytes

Result = TypeVar("Result")
STAGE_BYTES = 1 << 24
"""Of a page-locked buffer, of which there are two: one is filled while the other is read."""


class Carrier:
    """Carries tensors from one device to the host; belongs to one thread.

    Pageable memory is copied twice and holds up the stream that it is copied on, and locking a page takes longer than filling
    it: so two small buffers are locked once.

    Attributes:
        stream: the carrier's own; None where there is no GPU.
    """

    def __init__(self, device: torch.device) -> None:
        """Take the buffers, when there is a GPU to need them."""
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and torch.cuda.is_available() else None
        if self.stream is not None:
            self._buffers = [torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]

    def pieces(self, tensor: torch.Tensor) -> Iterator[np.ndarray]:
        """Yield a tensor's bytes in order, each piece valid until the next; in one piece what is on the host already."""
        if self.stream is None or tensor.device.type == "cpu":
            yield as_bytes(tensor)
            return
        with torch.cuda.stream(self.stream):
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            done: list[Any] = []  # events
            parts = flat.split(STAGE_BYTES)
            for number in range(len(parts) + 1):
                if number < len(parts):
                    self._buffers[number % 2][: len(parts[number])].copy_(parts[number], non_blocking=True)
                    done.append(self.stream.record_event())
                if number:
                    done[number - 1].synchronize()
                    yield self._buffers[(number - 1) % 2][: len(parts[number - 1])].numpy()


class Beside(Generic[Result]):
    """Does things beside the work that made them possible, on a few threads and streams; at once where nothing may wait.

    A job begins on the GPU when everything has been done that was asked of it when the job was. When the work fails, jobs that
    have not begun are dropped, and those that have are waited for.
    """

    def __init__(self, device: torch.device, waiting: int) -> None:
        """Start the threads.

        Args:
            device: where the work is done.
            waiting: jobs that may be under way or wait; whoever asks for one more waits. 0: whoever asks does it.
        """
        self._device, self._waiting, self._mine = device, waiting, threading.local()
        self._pool = ThreadPoolExecutor(waiting, thread_name_prefix="beside") if waiting else None
        self._jobs: dict[str, Future[Result]] = {}
        self._carrier = Carrier(torch.device("cpu")) if not waiting else None

    def ask(self, name: str, job: Callable[[Carrier], Result]) -> None:
        """Have a job done.

        Args:
            name: what its result is called.
            job: called with the carrier of the thread that does it.
        """
        if self._pool is None:
            assert self._carrier is not None
            self._jobs[name] = Future()
            self._jobs[name].set_result(job(self._carrier))
            return
        while len(open_jobs := [future for future in self._jobs.values() if not future.done()]) >= self._waiting:
            wait(open_jobs, return_when=FIRST_COMPLETED)
        for future in self._jobs.values():
            if future.done():
                future.result()  # what failed ends the work now
        self._jobs[name] = self._pool.submit(self._do, job, _now(self._device))

    def collect(self) -> dict[str, Result]:
        """Wait for all jobs, and return their results in the order they were asked for."""
        return {name: future.result() for name, future in self._jobs.items()}

    def __enter__(self) -> Beside[Result]:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what has begun."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _do(self, job: Callable[[Carrier], Result], ready: Any) -> Result:
        if not hasattr(self._mine, "carrier"):
            self._mine.carrier = Carrier(self._device)
        carrier: Carrier = self._mine.carrier
        if carrier.stream is None or ready is None:
            return job(carrier)
        with torch.cuda.stream(carrier.stream):
            carrier.stream.wait_event(ready)
            result = job(carrier)
        # Only now may the memory that the job read be used again by the stream that it was taken on.
        carrier.stream.synchronize()
        return result


_own = threading.local()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Have this thread's work on a GPU go to a stream of its own; it is done when the context is left.

    The kernels of an eigenproblem are too small to keep a GPU busy, and on one stream every thread waits for all others'.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        yield
        return
    if not hasattr(_own, "stream"):
        _own.stream = torch.cuda.Stream(device)
    with torch.cuda.stream(_own.stream):
        yield
        _own.stream.synchronize()


def _now(device: torch.device) -> Any:
    """Return an event that is done when all that was asked of a GPU so far is; None on the CPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.current_stream(device).record_event()
