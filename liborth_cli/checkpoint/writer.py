"""Write one safetensors file as a stream: planned, preallocated, tensor after tensor, header last.

No library writes safetensors incrementally. The space for the header is reserved from the plan; tensors that turn out
not to be needed are dropped, and the header's JSON is padded with spaces, which the format allows. Tensors that come in another
order than the plan's are written where the plan has them, and moved together when some were dropped: the file is the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.checkpoint import header
from liborth_cli.checkpoint.files import (
    PIECE,
    UNFINISHED,
    UNSUPPORTED,
    Written,
    create,
    disk,
    hash_open,
    rename,
    unlink,
    write_all,
)
from liborth_cli.checkpoint.following import HashBehind
from liborth_cli.errors import LiborthError

if TYPE_CHECKING:
    import torch

AHEAD = 1 << 27
"""Bytes after which the disk is told to begin with what was written: it would have all of it to do at the end."""


class Coming(Enum):
    """What is certain of a file that is planned."""

    PLANNED = auto()
    """All that is planned, in this order, with this metadata: the file is hashed while it is written."""
    FEWER = auto()
    """Tensors may be left out or be smaller, or the metadata change: it is hashed at the end."""
    ANY_ORDER = auto()
    """The tensors come in any order, and some may not."""


class ShardWriter:
    """Streams tensors into `path`; the file appears under its name only when `finish` is called.

    Attributes:
        path: the final name.
    """

    def __init__(
        self,
        path: Path,
        planned: Iterable[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str] = header.PT_METADATA,
        frame: bytes | None = None,
        mode: int = 0o644,
        coming: Coming = Coming.PLANNED,
    ) -> None:
        """Reserve space for all planned tensors.

        Args:
            path: where the finished file goes.
            planned: (name, dtype, shape) of every tensor that may be written, in the order of writing.
            metadata: the `__metadata__` map; values may be changed in `finish`, not made longer.
            frame: the exact first bytes of the file, when they are known; then every planned tensor must be written.
            mode: permissions of the file, which the umask may narrow.
            coming: what is certain of the plan.

        Raises:
            OutOfResources: when the disk cannot hold it.
            OutputConflict: when the place cannot be written to.
        """
        entries = header.plan(planned)
        self.path = path
        self._temporary = path.with_name(path.name + UNFINISHED)
        self._metadata, self._frame = metadata, frame
        self._first = frame or header.build(entries, metadata)
        self._reserve = len(self._first)
        self._entries: list[header.Entry] = []
        self._position = self._cursor = 0
        self._flusher: ThreadPoolExecutor | None = None
        self._flushed: Future[None] | None = None
        self._ended: Written | None = None
        self._new = 0
        self._places = {entry.name: entry for entry in entries} if coming == Coming.ANY_ORDER else None
        with disk(path):
            self._fd = create(self._temporary, mode)
            _allocate(self._fd, self._reserve + (entries[-1].stop if entries else 0))
        self._behind = HashBehind(self._fd, self._first) if coming == Coming.PLANNED else None

    @property
    def empty(self) -> bool:
        """True while no tensor has been kept."""
        return not self._entries

    def begin(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Start the next tensor."""
        if self._places is not None:
            self._check_whole()
            self._entries.append(self._places[name])
            self._cursor, self._position = self._places[name].start, self._places[name].stop
            return
        stop = self._position + header.nbytes(dtype, shape)
        self._entries.append(header.Entry(name, dtype, shape, self._position, stop))
        self._cursor, self._position = self._position, stop

    def write(self, data: np.ndarray) -> None:
        """Append bytes (uint8) to the tensor begun last."""
        self.put(data, self.place(len(data)))
        self.written(len(data))

    def place(self, size: int) -> int:
        """Return where the next bytes of the tensor begun last go; `put` brings them, and `written` must be told of them."""
        if self._cursor + size > self._position:
            raise LiborthError(f"{self.path}: more bytes than tensor {self._entries[-1].name!r} has")
        self._cursor += size
        return self._reserve + self._cursor - size

    def put(self, data: np.ndarray, place: int) -> None:
        """Write bytes (uint8) where they go; any thread may."""
        with disk(self.path):
            write_all(self._fd, data.data, place)

    def written(self, size: int) -> None:
        """Take note that the next bytes are in the file, in the order of the places."""
        with disk(self.path):
            self._flush_ahead(size)
        if self._behind is not None:
            self._behind.reach(size)

    def _flush_ahead(self, size: int) -> None:
        """Have the disk begin with what has been written, when that is much; one flush at a time, and its error is raised."""
        self._new += size
        if self._new < AHEAD or (self._flushed is not None and not self._flushed.done()):
            return
        self._wait_for_disk()
        flush = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync
        self._flushed, self._new = self._flushing().submit(flush, self._fd), 0

    def _flushing(self) -> ThreadPoolExecutor:
        if self._flusher is None:
            self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        return self._flusher

    def _flush_last(self, ahead: Future[None] | None) -> None:
        if ahead is not None:
            ahead.result()  # done by now, for there is one thread
        os.fsync(self._fd)

    def _wait_for_disk(self) -> None:
        """Wait for a flush that is under way; the system reports what it could not write to one of them alone.

        Raises:
            OSError: when it failed.
        """
        flushed, self._flushed = self._flushed, None
        if flushed is not None:
            flushed.result()

    def discard(self) -> None:
        """Forget the tensor begun last, as if it had never been planned."""
        self._read_again()
        self._position = self._cursor = self._entries.pop().start

    def end(self, metadata: Mapping[str, str] | None = None) -> Written:
        """Write the header, hand the file over to the disk, and hash what it holds; `finish` waits for the disk and names it.

        Args:
            metadata: replaces the planned `__metadata__`.

        Returns:
            The file's name, size and sha256.

        Raises:
            LiborthError: when a tensor was left incomplete or the header does not fit.
        """
        self._check_whole()
        if self._places is not None:
            with disk(self.path):
                self._move_together()
        first = self._frame or header.build(self._entries, metadata or self._metadata, self._reserve)
        if len(first) != self._reserve:
            raise LiborthError(f"{self.path}: the plan and what was written differ; this is a bug")
        if first != self._first:
            self._read_again()
        with disk(self.path):
            write_all(self._fd, first, 0)
            os.ftruncate(self._fd, self._reserve + self._position)
            self._flushed = self._flushing().submit(self._flush_last, self._flushed)
            if self._behind is None:
                self._ended = hash_open(self._fd, self.path.name)
            else:
                self._ended = Written(self.path.name, os.fstat(self._fd).st_size, self._behind.finish())
            if self._ended.size != self._reserve + self._position or os.pread(self._fd, len(first), 0) != first:
                raise LiborthError(f"{self.path}: the disk does not hold what was written to it")
        return self._ended

    def finish(self, metadata: Mapping[str, str] | None = None) -> Written:
        """End the file, unless it was ended, wait until the disk has it, and give it its name.

        Args:
            metadata: as for `end`.

        Returns:
            The file's name, size and sha256.

        Raises:
            LiborthError: as for `end`.
        """
        written = self._ended or self.end(metadata)
        with disk(self.path):
            self._wait_for_disk()
            os.close(self._fd)
            self._fd = -1
            rename(self._temporary, self.path)
        return written

    def _read_again(self) -> None:
        """Let the file be hashed from its beginning at the end: it will not be what was planned."""
        if self._behind is not None:
            self._behind.end()
            self._behind = None

    def _check_whole(self) -> None:
        if self._cursor != self._position:
            raise LiborthError(f"{self.path}: the plan and what was written differ; this is a bug")

    def _move_together(self) -> None:
        """Put the tensors in the order of the plan, without holes where some were dropped."""
        position, moved, order = 0, [], {name: number for number, name in enumerate(self._places or ())}
        for entry in sorted(self._entries, key=lambda entry: order[entry.name]):
            size = entry.stop - entry.start
            for done in range(0, size if position < entry.start else 0, PIECE):
                piece = os.pread(self._fd, min(PIECE, size - done), self._reserve + entry.start + done)
                write_all(self._fd, piece, self._reserve + position + done)
            moved.append(header.Entry(entry.name, entry.dtype, entry.shape, position, position + size))
            position += size
        self._entries, self._cursor, self._position = moved, position, position

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        self._let_go()
        unlink(self._temporary)

    def __del__(self) -> None:
        """Let go of what an error has left: a thread, and a descriptor that keeps the space of a file that is removed."""
        if hasattr(self, "_behind"):
            self._let_go()

    def _let_go(self) -> None:
        self._read_again()
        with suppress(OSError):
            self._wait_for_disk()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], mode: int = 0o644) -> Written:
    """Write a safetensors file of tensors that are in memory, in the order given, as a file appears: whole."""
    from liborth_cli.checkpoint.dtypes import as_bytes, name_of

    planned = [(name, name_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = ShardWriter(path, planned, mode=mode)
    for entry, tensor in zip(planned, tensors.values(), strict=True):
        writer.begin(*entry)
        writer.write(as_bytes(tensor))
    return writer.finish()


def _allocate(fd: int, size: int) -> None:
    """Reserve the space, or only the length where the file system cannot."""
    try:
        os.posix_fallocate(fd, 0, size)
    except AttributeError:
        os.ftruncate(fd, size)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        os.ftruncate(fd, size)
