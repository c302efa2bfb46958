"""Between the host and a GPU: streams beside the first, one for every thread that works on it, and memory that both reach.

Ordinary memory is copied twice on its way, and fresh memory costs a page fault for every 4 KiB: on a machine with an H200 a
gigabyte a second came into it, and 24 into locked memory (decision 0063). Locking a page takes longer than filling it; torch
keeps locked blocks for whoever asks next.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from liborth_cli.checkpoint.dtypes import DTYPES, as_bytes, torch_dtype
from liborth_cli.checkpoint.reader import DEVICE_PIECE, PIECE, Checkpoint, pieces

Result = TypeVar("Result")
STAGE_BYTES, STAGES = 1 << 24, 2
"""Of a page-locked buffer, and how many a thread has: one is filled while the other is read."""
HELPERS = 4
"""Threads that read the pieces of what is long."""


class Carrier:
    """Carries tensors from one device to the host; belongs to one thread.

    Attributes:
        stream: the carrier's own; None where there is no GPU.
    """

    def __init__(self, device: torch.device) -> None:
        """Take the buffers, when there is a GPU to need them."""
        self.stream = torch.cuda.Stream(device) if locked(device) else None
        if self.stream is not None:
            self._buffers = [torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(STAGES)]

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
                    self._buffers[number % STAGES][: len(parts[number])].copy_(parts[number], non_blocking=True)
                    done.append(self.stream.record_event())
                if number:
                    done[number - 1].synchronize()
                    yield self._buffers[(number - 1) % STAGES][: len(parts[number - 1])].numpy()


class _Stage(threading.local):
    """The locked buffers of one thread, through which what it reads goes to a GPU; and when each may be filled again."""

    def __init__(self) -> None:
        """Lock nothing yet."""
        self.buffers: dict[torch.device, deque[tuple[torch.Tensor, Any]]] = {}

    def next(self, device: torch.device) -> tuple[torch.Tensor, Any]:
        """Return the buffer for a GPU that was used the longest ago, free again, and the event to record when it was sent."""
        buffers = self.buffers.setdefault(device, deque())
        if len(buffers) < STAGES:
            buffers.append((torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()))
        else:
            buffers.rotate(-1)
        buffer, free = buffers[-1]
        free.synchronize()
        return buffer, free


_stage = _Stage()
_helpers = ThreadPoolExecutor(HELPERS, thread_name_prefix="helper")


def send(checkpoint: Checkpoint, name: str, start: int, stop: int, out: torch.Tensor) -> None:
    """Read elements [start, stop) of a tensor into a flat one on any device, on the stream that is current.

    On a GPU the file is read into locked memory and sent from there as it is stored; another dtype is made on the GPU.
    """
    stored = checkpoint.tensors[name]
    if not locked(out.device) or name in checkpoint.scales:
        out.copy_(checkpoint.load_elements(name, start, stop))
        return
    width, dtype = DTYPES[stored.dtype].bits // 8, torch_dtype(stored.dtype)
    target = out if out.dtype == dtype else torch.empty(stop - start, dtype=dtype, device=out.device)
    raw, stream = target.view(torch.uint8), torch.cuda.current_stream(out.device)

    def bring(first: int) -> None:
        count = min(STAGE_BYTES, len(raw) - first)
        buffer, free = _stage.next(out.device)
        checkpoint.read(name, start * width + first, start * width + first + count, out=buffer.numpy())
        with torch.cuda.stream(stream):
            raw[first : first + count].copy_(buffer[:count], non_blocking=True)
            free.record()

    firsts = range(0, len(raw), STAGE_BYTES)
    for _ in map(bring, firsts) if len(firsts) <= HELPERS else _helpers.map(bring, firsts):
        pass
    if target is not out:
        out.copy_(target)


def portions(first: int, last: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Cut a range of elements into pieces of the size that is handled at a time on a device."""
    return pieces(first, last, PIECE if device.type == "cpu" else DEVICE_PIECE)


def sent(checkpoint: Checkpoint, name: str, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Load elements [start, stop) of a tensor on a device, flat, in the dtype that they have there."""
    if not locked(device) or name in checkpoint.scales:
        return checkpoint.load_elements(name, start, stop).to(device)
    out = torch.empty(stop - start, dtype=torch_dtype(checkpoint.tensors[name].dtype), device=device)
    send(checkpoint, name, start, stop, out)
    return out


def fetch(tensor: torch.Tensor) -> np.ndarray:
    """Bring a tensor's bytes to the host, whole, through locked memory where there is a GPU; its stream is waited for."""
    if not locked(tensor.device):
        return as_bytes(tensor)
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    found = torch.empty(len(flat), dtype=torch.uint8, pin_memory=True)
    found.copy_(flat, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return found.numpy()


def locked(device: torch.device) -> bool:
    """Tell whether memory for this device is locked on the host: it is a GPU, and not a pretended one."""
    return device.type == "cuda" and torch.cuda.is_available()


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
        self._jobs[name] = self._pool.submit(self._do, job, now(self._device))

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
def own_stream(device: torch.device, after: Any = None) -> Iterator[None]:
    """Have this thread's work on a GPU go to a stream of its own; it is done when the context is left.

    Args:
        device: of the work.
        after: an event (`now`) before which it does not begin.

    The kernels of an eigenproblem are too small to keep a GPU busy, and on one stream every thread waits for all others'.
    """
    if not locked(device):
        yield
        return
    streams: dict[torch.device, torch.cuda.Stream] = _own.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    with torch.cuda.stream(streams[device]):
        if after is not None:
            streams[device].wait_event(after)
        yield
        streams[device].synchronize()


def now(device: torch.device) -> Any:
    """Return an event that is done when all that was asked of a GPU so far is; None on the CPU."""
    if not locked(device):
        return None
    return torch.cuda.current_stream(device).record_event()
