"""Write one safetensors file as a stream: planned, preallocated, tensor after tensor, header last.

No library writes safetensors incrementally. The space for the header is reserved from the plan; tensors that turn out
not to be needed are dropped, and the header's JSON is padded with spaces, which the format allows.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from liborth_cli.checkpoint import header
from liborth_cli.errors import LiborthError, OutOfResources, OutputConflict

OUT_OF_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@dataclass(frozen=True)
class Written:
    """One finished file: its base name, size in bytes and sha256."""

    name: str
    size: int
    sha256: str

    def to_json(self) -> dict[str, str | int]:
        """Return the fields as a JSON object."""
        return asdict(self)


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
    ) -> None:
        """Reserve space for all planned tensors.

        Args:
            path: where the finished file goes.
            planned: (name, dtype, shape) of every tensor that may be written, in the order of writing.
            metadata: the `__metadata__` map; values may be changed in `finish`, not made longer.
            frame: the exact first bytes of the file, when they are known; then every planned tensor must be written.
            mode: permissions of the file.

        Raises:
            OutOfResources: when the disk cannot hold it.
            OutputConflict: when the place cannot be written to.
        """
        entries = header.plan(planned)
        self.path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._metadata, self._frame = metadata, frame
        self._reserve = len(frame or header.build(entries, metadata))
        self._entries: list[header.Entry] = []
        self._position = self._cursor = 0
        with _disk(path):
            self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)
            os.fchmod(self._fd, mode)
            size = self._reserve + (entries[-1].stop if entries else 0)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, size)
            else:
                os.ftruncate(self._fd, size)

    @property
    def empty(self) -> bool:
        """True while no tensor has been kept."""
        return not self._entries

    def begin(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Start the next tensor."""
        stop = self._position + header.nbytes(dtype, shape)
        self._entries.append(header.Entry(name, dtype, shape, self._position, stop))
        self._cursor, self._position = self._position, stop

    def write(self, data: np.ndarray) -> None:
        """Append bytes (uint8) to the tensor begun last."""
        view, done = data.data, 0
        if self._cursor + len(view) > self._position:
            raise LiborthError(f"{self.path}: more bytes than tensor {self._entries[-1].name!r} has")
        with _disk(self.path):
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], self._reserve + self._cursor + done)
        self._cursor += done

    def discard(self) -> None:
        """Forget the tensor begun last, as if it had never been planned."""
        self._position = self._cursor = self._entries.pop().start

    def finish(self, metadata: Mapping[str, str] | None = None) -> Written:
        """Write the header, hash what the file now holds while it is flushed to the disk, and give it its name.

        Args:
            metadata: replaces the planned `__metadata__`.

        Returns:
            The file's name, size and sha256.

        Raises:
            LiborthError: when a tensor was left incomplete or the header does not fit.
        """
        first = self._frame or header.build(self._entries, metadata or self._metadata, self._reserve)
        if len(first) != self._reserve or self._cursor != self._position:
            raise LiborthError(f"{self.path}: the plan and what was written differ; this is a bug")
        with _disk(self.path):
            os.pwrite(self._fd, first, 0)
            os.ftruncate(self._fd, self._reserve + self._position)
            written = _flush_and_hash(self._fd, self._temporary, self.path.name)
            os.close(self._fd)
            os.rename(self._temporary, self.path)
        return written

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        os.close(self._fd)
        self._temporary.unlink(missing_ok=True)


def write_file(path: Path, data: bytes, mode: int = 0o644) -> Written:
    """Write a small file durably and return its hash.

    Raises:
        OutOfResources: when the disk is full.
        OutputConflict: when the place cannot be written to.
    """
    with _disk(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
    return Written(path.name, len(data), hashlib.sha256(data).hexdigest())


def copy_file(source: Path, target: Path, mode: int = 0o644) -> Written:
    """Copy a file without reading it where the file system can share the blocks, and hash the copy.

    Raises:
        OutOfResources: when the disk is full.
        OutputConflict: when the place cannot be written to.
    """
    temporary = target.with_name(target.name + ".tmp")
    with open(source, "rb") as old, _disk(target):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(fd, "wb") as new:
            if not _shared(old.fileno(), fd):
                shutil.copyfileobj(old, new, 1 << 22)
            new.flush()
            written = _flush_and_hash(fd, temporary, target.name)
        os.rename(temporary, target)
    return written


def _shared(source: int, target: int) -> bool:
    """Copy inside the kernel, sharing blocks where the file system can; return False when it cannot copy at all."""
    left = os.fstat(source).st_size
    try:
        while left and (count := os.copy_file_range(source, target, left)):
            left -= count
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        os.lseek(source, 0, os.SEEK_SET)
        os.ftruncate(target, 0)
        os.lseek(target, 0, os.SEEK_SET)
        return False
    return True


def hash_file(path: Path) -> Written:
    """Read a file through sha256."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Written(path.name, os.fstat(file.fileno()).st_size, digest)


def _flush_and_hash(fd: int, path: Path, name: str) -> Written:
    """Wait for the disk and hash the file at the same time; `name` is what it will be called."""
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(os.fsync, fd)
        written = hash_file(path)
        flushed.result()
    return replace(written, name=name)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Translate what a file system refuses into the error with the right exit code."""
    try:
        yield
    except OSError as error:
        if error.errno in OUT_OF_SPACE:
            raise OutOfResources(f"{path}: no space ({error.strerror}); free some and run again") from None
        raise OutputConflict(f"{path}: cannot be written ({error.strerror})") from None
