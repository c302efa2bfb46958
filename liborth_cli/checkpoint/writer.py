"""Write one safetensors file as a stream: planned, preallocated, tensor after tensor, header last.

No library writes safetensors incrementally. The space for the header is reserved from the plan; tensors that turn out
not to be needed are dropped, and the header's JSON is padded with spaces, which the format allows. Tensors that come in another
order than the plan's are written where the plan has them, and moved together when some were dropped: the file is the same.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.checkpoint import header
from liborth_cli.checkpoint.following import HashBehind
from liborth_cli.errors import NO_SPACE, BadInput, LiborthError, from_os

if TYPE_CHECKING:
    import torch

PIECE = 1 << 23
"""Bytes moved at a time."""
AHEAD = 1 << 27
"""Bytes after which the disk is told to begin with what was written: it would have all of it to do at the end."""
UNFINISHED = ".tmp"
"""What the name of a file ends in until it is whole."""
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EPERM, errno.ENODEV})
"""What a file system says of a service it does not offer."""


@dataclass(frozen=True)
class Anchor:
    """A directory that this process has claimed.

    Attributes:
        fd: its descriptor. What is written below the directory goes through it: when the directory is removed or replaced
            under its name, nothing is written into whatever has taken its place.
        note: told the name of every file before it is made.
    """

    fd: int
    note: Callable[[str], None]


anchors: dict[Path, Anchor] = {}
"""The claimed directories, by path."""


@dataclass(frozen=True)
class Written:
    """One finished file: its base name, size in bytes and sha256."""

    name: str
    size: int
    sha256: str

    def to_json(self) -> dict[str, str | int]:
        """Return the fields as a JSON object."""
        return asdict(self)


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
        with _disk(path):
            self._fd = _create(self._temporary, mode)
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
        with _disk(self.path):
            write_all(self._fd, data.data, place)

    def written(self, size: int) -> None:
        """Take note that the next bytes are in the file, in the order of the places."""
        with _disk(self.path):
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
            with _disk(self.path):
                self._move_together()
        first = self._frame or header.build(self._entries, metadata or self._metadata, self._reserve)
        if len(first) != self._reserve:
            raise LiborthError(f"{self.path}: the plan and what was written differ; this is a bug")
        if first != self._first:
            self._read_again()
        with _disk(self.path):
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
        with _disk(self.path):
            self._wait_for_disk()
            os.close(self._fd)
            self._fd = -1
            _rename(self._temporary, self.path)
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
        _unlink(self._temporary)

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


def write_file(path: Path, data: bytes, mode: int = 0o644) -> Written:
    """Write a small file whole or not at all, durably, and return its hash; what had its name is replaced.

    Args:
        path: where it goes; a link is followed.
        data: all of it.
        mode: permissions, which the umask may narrow.

    Raises:
        OutOfResources: when the disk is full.
        OutputConflict: when the place cannot be written to.
    """
    place = Path(os.path.realpath(path)) if path.is_symlink() else path
    return replace(write_pieces(place, [data], mode), name=path.name)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], mode: int = 0o644) -> Written:
    """Write a safetensors file of tensors that are in memory, in the order given, as a file appears: whole."""
    from liborth_cli.checkpoint.dtypes import as_bytes, name_of

    planned = [(name, name_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = ShardWriter(path, planned, mode=mode)
    for entry, tensor in zip(planned, tensors.values(), strict=True):
        writer.begin(*entry)
        writer.write(as_bytes(tensor))
    return writer.finish()


def copy_file(source: Path, target: Path, mode: int = 0o644) -> Written:
    """Copy a file without reading it where the file system can share the blocks, and hash the copy.

    Raises:
        BadInput: when the source cannot be read.
        OutOfResources: when the disk is full.
        OutputConflict: when the place cannot be written to.
    """
    try:
        old = open(source, "rb", buffering=0)  # noqa: SIM115  closed below; its errors are not the target's
    except OSError as error:
        raise from_os(error, source, "read", BadInput) from None
    with old, _replacing(target, mode) as fd:
        size = os.fstat(old.fileno()).st_size
        if not _shared(old.fileno(), fd, size):
            os.ftruncate(fd, 0)
            position = 0
            while piece := os.pread(old.fileno(), 1 << 22, position):
                write_all(fd, piece, position)
                position += len(piece)
        written = _flush_and_hash(fd, target.name)
        if written.size != size:
            raise BadInput(f"{source}: the file changed while it was copied; start again when nothing writes to it")
    return written


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview], mode: int = 0o644) -> Written:
    """Write a file that comes in pieces whole or not at all, durably, and hash what comes.

    Raises:
        OutOfResources: when the disk is full.
        OutputConflict: when the place cannot be written to.
    """
    digest, size = hashlib.sha256(), 0
    with _replacing(path, mode) as fd:
        for piece in pieces:
            write_all(fd, piece)
            digest.update(piece)
            size += len(piece)
        os.fsync(fd)
    return Written(path.name, size, digest.hexdigest())


def hash_file(path: Path) -> Written:
    """Read a file through sha256.

    Raises:
        BadInput: when it cannot be read.
    """
    folder, name = _reach(path)
    try:
        with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
            return hash_open(file.fileno(), path.name)
    except OSError as error:
        raise from_os(error, path, "read", BadInput) from None


def hash_open(fd: int, name: str) -> Written:
    """Hash an open file from its first byte on; `name` is what it is called.

    hashlib.file_digest takes a quarter of a megabyte at a time, and waits for the interpreter's lock as often: beside threads
    that are busy in Python it is a multiple slower than one that takes eight megabytes.
    """
    digest, size = hashlib.sha256(), 0
    view = memoryview(bytearray(min(PIECE, max(os.fstat(fd).st_size, 1))))
    while count := os.preadv(fd, [view], size):
        digest.update(view[:count])
        size += count
    return Written(name, size, digest.hexdigest())


def write_all(fd: int, data: bytes | memoryview, position: int | None = None) -> None:
    """Write every byte, at a position or where the descriptor stands; a short write is continued.

    Raises:
        OSError: when the file takes no more.
    """
    view, done = memoryview(data), 0
    while done < len(view):
        rest = view[done:]
        count = os.write(fd, rest) if position is None else os.pwrite(fd, rest, position + done)
        if count <= 0:
            raise OSError(errno.EIO, "the disk takes no more bytes")
        done += count


def sync_folder(folder: int | Path) -> None:
    """Wait until the disk has the names in a directory, where the file system offers that."""
    fd = os.open(folder, os.O_RDONLY) if isinstance(folder, Path) else folder
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        if fd is not folder:
            os.close(fd)


@contextmanager
def _replacing(path: Path, mode: int) -> Iterator[int]:
    """Open a new file that takes the name `path` at the end, or disappears after an error."""
    drawn = path.name if path.parent in anchors else f".{path.name[:200]}.{secrets.token_hex(4)}"
    temporary = path.with_name(drawn + UNFINISHED)
    with _disk(path):
        fd = _create(temporary, mode)
        try:
            yield fd
            os.close(fd)
            fd = -1
            _rename(temporary, path)
        finally:
            if fd >= 0:
                os.close(fd)
            _unlink(temporary)


def drawn_for(name: str) -> str | None:
    """Return the name that an unfinished file was to take, from the drawn one that it has; None when that is none."""
    found = re.fullmatch(rf"\.(.+)\.[0-9a-f]{{8}}{re.escape(UNFINISHED)}", name)
    return found[1] if found else None


def _reach(path: Path) -> tuple[int | None, str]:
    """Return the descriptor of the claimed directory above `path` and the rest of the way, or None and the whole path."""
    folder = next((folder for folder in path.parents if folder in anchors), None)
    return (None, str(path)) if folder is None else (anchors[folder].fd, str(path.relative_to(folder)))


def _create(path: Path, mode: int) -> int:
    folder = next((folder for folder in path.parents if folder in anchors), None)
    if folder is not None:
        anchors[folder].note(str(path.relative_to(folder)).removesuffix(UNFINISHED))
    fd, name = _reach(path)
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=fd)


def _rename(source: Path, target: Path) -> None:
    (folder, old), (_, new) = _reach(source), _reach(target)
    os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)


def _unlink(path: Path) -> None:
    folder, name = _reach(path)
    with suppress(OSError):
        os.unlink(name, dir_fd=folder)


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


def _shared(source: int, target: int, size: int) -> bool:
    """Copy inside the kernel, sharing blocks where the file system can; return False when it cannot or did not finish."""
    left = size
    try:
        while left and (count := os.copy_file_range(source, target, left)):
            left -= count
    except AttributeError:
        return False
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
    return left == 0


def _flush_and_hash(fd: int, name: str) -> Written:
    """Wait for the disk and hash what the file now holds at the same time; `name` is what it will be called."""
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(os.fsync, fd)
        written = hash_open(fd, name)
        flushed.result()
    return written


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Translate what a file system refuses into the error with the right exit code."""
    try:
        yield
    except OSError as error:
        raise from_os(error, path) from None
