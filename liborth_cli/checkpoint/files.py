"""Files that appear whole: written under another name, handed over to the disk, hashed, and then named.

Below a directory that this process has claimed every file goes through the directory's descriptor, so that nothing is written
into what has taken its place.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from liborth_cli.errors import NO_SPACE, BadInput, from_os

PIECE = 1 << 23
"""Bytes moved at a time."""
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


def drawn_for(name: str) -> str | None:
    """Return the name that an unfinished file was to take, from the drawn one that it has; None when that is none."""
    found = re.fullmatch(rf"\.(.+)\.[0-9a-f]{{8}}{re.escape(UNFINISHED)}", name)
    return found[1] if found else None


@contextmanager
def _replacing(path: Path, mode: int) -> Iterator[int]:
    """Open a new file that takes the name `path` at the end, or disappears after an error."""
    drawn = path.name if path.parent in anchors else f".{path.name[:200]}.{secrets.token_hex(4)}"
    temporary = path.with_name(drawn + UNFINISHED)
    with disk(path):
        fd = create(temporary, mode)
        try:
            yield fd
            os.close(fd)
            fd = -1
            rename(temporary, path)
        finally:
            if fd >= 0:
                os.close(fd)
            unlink(temporary)


def _flush_and_hash(fd: int, name: str) -> Written:
    """Wait for the disk and hash what the file now holds at the same time; `name` is what it will be called."""
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(os.fsync, fd)
        written = hash_open(fd, name)
        flushed.result()
    return written


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


def create(path: Path, mode: int) -> int:
    """Make a file that is not there yet, and return its descriptor.

    Raises:
        OSError: when the place cannot be written to, or the name is taken.
    """
    folder = next((folder for folder in path.parents if folder in anchors), None)
    if folder is not None:
        anchors[folder].note(str(path.relative_to(folder)).removesuffix(UNFINISHED))
    fd, name = _reach(path)
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=fd)


def rename(source: Path, target: Path) -> None:
    """Give a file its name; what had the name is replaced."""
    (folder, old), (_, new) = _reach(source), _reach(target)
    os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)


def unlink(path: Path) -> None:
    """Remove a file, if it is there and can be removed."""
    folder, name = _reach(path)
    with suppress(OSError):
        os.unlink(name, dir_fd=folder)


def _reach(path: Path) -> tuple[int | None, str]:
    """Return the descriptor of the claimed directory above `path` and the rest of the way, or None and the whole path."""
    folder = next((folder for folder in path.parents if folder in anchors), None)
    return (None, str(path)) if folder is None else (anchors[folder].fd, str(path.relative_to(folder)))


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Translate what a file system refuses into the error with the right exit code."""
    try:
        yield
    except OSError as error:
        raise from_os(error, path) from None
