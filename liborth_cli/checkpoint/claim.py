"""Which directories are ours: names beside an output are claimed, never trusted.

A run works in a directory that it made itself, holds by descriptor and lock, and has named in an owner file. Whatever else
lies under such a name (a link, somebody's directory, a run that is still working) is refused and left as it is. A finished
output is ours as far as its manifest lists what is in it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from liborth_cli import manifest
from liborth_cli.checkpoint import files, private
from liborth_cli.checkpoint.documents import json_lines
from liborth_cli.checkpoint.journal import owner_of
from liborth_cli.checkpoint.signing import SUFFIX as SIGNED
from liborth_cli.errors import BadInput, OutputConflict, from_os
from liborth_cli.manifest import FILE as MANIFEST

OWNER, JOURNAL, NAMES, FILES, OLD, DOOMED = "owner.json", "journal.jsonl", "names", "files", "old", "doomed"
OURS = (FILES, OLD, DOOMED, f"{OWNER}.tmp", f"{JOURNAL}.tmp", f"{NAMES}.tmp", NAMES, JOURNAL, OWNER)
"""What lies in a claimed directory, in the order in which it is removed: what proves the rest goes last."""
CARRIED = private.FACTORS
LASTING = (CARRIED, private.KEY)
"""What outlives the output that it lies in."""
GUARDS = private.GUARDS
"""Files of a private directory that its manifest does not list."""
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
REREAD = 16 << 20
"""Bytes up to which a listed file is read again before it is taken for what its manifest says."""


class Claim:
    """A directory beside an output, held by this process from the moment it is made until it is released.

    Attributes:
        path: its name.
        files: the directory in it that becomes the output; `checkpoint.files` reaches it by descriptor.
        content: device and inode of `files`.
        owner: the random id in its owner file; None when there is none.
        identity: the same, but None while nothing in it could be lost.
    """

    def __init__(self, path: Path, mode: int = 0o777) -> None:
        """Make the directory, or hold the one that a stopped run of ours left.

        Raises:
            OutputConflict: when another run holds it, or it cannot be proven to be ours; it is left untouched.
        """
        self.path, self.files, self._mode = path, path / FILES, mode
        self._content = self._names = -1
        self._anchor: files.Anchor | None = None
        self.content = (0, 0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, mode)
            self._fd = os.open(path, FOLDER)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR) and os.path.lexists(path):
                raise OutputConflict(f"{path}: is in the way and was not made by liborth; move it away") from None
            raise from_os(error, path, "created") from None
        try:
            self._lock()
            self.check_held()
            self.owner = self._find_owner()
            lost = self.holds_files or (self.read(JOURNAL, 1 << 32) or b"").count(b"\n") > 1
            self.identity = self.owner if lost else None
        except BaseException:
            os.close(self._fd)
            raise

    def check_held(self) -> None:
        """Raise OutputConflict when the name no longer leads to the directory this process holds."""
        try:
            same = identity(os.lstat(self.path)) == identity(os.fstat(self._fd))
        except OSError:
            same = False
        if not same:
            raise OutputConflict(f"{self.path}: was removed or replaced while this run was working; run again")

    def sign(self, name: str) -> None:
        """Put an owner file into a directory in which nothing could be lost."""
        os.close(self.write(OWNER, json_lines([{"id": name}])))
        self.identity = self.owner = name

    def open_files(self) -> None:
        """Make the directory of files, and have it reached by descriptor from now on."""
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(FILES, self._mode, dir_fd=self._fd)
            self._content = os.open(FILES, FOLDER, dir_fd=self._fd)
        except OSError as error:
            raise from_os(error, self.files, "created") from None
        self.content = identity(os.fstat(self._content))
        self._names = self.write(NAMES, b"".join(os.fsencode(name) + b"\0" for name in self._noted()))
        self._anchor = files.anchors[self.files] = files.Anchor(self._content, self.note)

    def note(self, name: str) -> None:
        """Write down the name of a file before it is made: that proves later whose it is."""
        files.write_all(self._names, os.fsencode(name) + b"\0")

    def close_files(self) -> None:
        """Stop reaching the directory of files by descriptor: it is about to get another name."""
        if self._anchor is not None:
            if files.anchors.get(self.files) is self._anchor:
                del files.anchors[self.files]
            self._anchor = None
            _close(self._content)
            _close(self._names)

    @property
    def holds_files(self) -> bool:
        """Whether anything would be lost with this directory."""
        return any(walk(self.path / FILES)) or any(walk(self.path / OLD))

    def prune(self, kept: set[str]) -> None:
        """Remove files that a stopped run had not finished; sets of factors have manifests of their own."""
        noted = self._noted()
        left = [(n, is_file) for n, is_file in walk(self.files) if n not in kept and not n.startswith(CARRIED + os.sep)]
        for name, is_file in left:
            if not is_file or name.removesuffix(files.UNFINISHED) not in noted:
                raise self._stranger(f"{FILES}/{name}")
        for name, _ in left:
            remove(name, self._content)

    def write(self, name: str, data: bytes) -> int:
        """Write a file of our own beside the files, whole or not at all; return a descriptor that appends to it."""
        temporary = f"{name}.tmp"
        try:
            remove(temporary, self._fd)
            fd = os.open(temporary, NEW, 0o600, dir_fd=self._fd)
            files.write_all(fd, data)
            os.fsync(fd)
            os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            files.sync_folder(self._fd)
        except OSError as error:
            raise from_os(error, self.path / name) from None
        return fd

    def read(self, name: str, limit: int) -> bytes | None:
        """Read a file of our own: plain, linked once and no longer than `limit`; None when there is none such."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._fd)
        except OSError:
            return None
        with open(fd, "rb") as file:
            facts = os.fstat(fd)
            return file.read() if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1 and facts.st_size <= limit else None

    def discard(self, *names: str) -> None:
        """Remove what a run of ours left, all but the owner file when no names are given.

        Raises:
            OutputConflict: when something in it cannot have been written by liborth; nothing is removed then.
        """
        if unknown := set(os.listdir(self._fd)).difference(OURS):
            raise self._stranger(min(unknown))
        names, noted = names or OURS[:-1], self._noted()
        for name, is_file in walk(self.path / FILES) if FILES in names else ():
            if not name.startswith(CARRIED + os.sep) and not (is_file and name.removesuffix(files.UNFINISHED) in noted):
                raise self._stranger(f"{FILES}/{name}")
        for name in names:
            remove(name, self._fd)

    def destroy(self, name: str) -> None:
        """Remove an old output that was proven to be ours: whatever a kill leaves of it needs no proof any more."""
        remove(DOOMED, self._fd)
        os.rename(name, DOOMED, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        remove(DOOMED, self._fd)

    def sync(self) -> None:
        """Wait until the disk has the names in it."""
        for fd in (self._content, self._fd):
            files.sync_folder(fd)

    def release(self, keep: bool) -> bool:
        """Let go; remove the directory too unless it is to be kept. Return whether it is there still."""
        self.close_files()
        with contextlib.suppress(OSError, OutputConflict):
            if not keep:
                self.check_held()
                self.discard()
                remove(OWNER, self._fd)
                os.rmdir(self.path)
        _close(self._fd)
        return os.path.lexists(self.path)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise OutputConflict(
                    f"{self.path}: another run is writing here; wait for it or choose another -o"
                ) from None  # where the file system has no locks, the exclusive mkdir and the owner file must do

    def _find_owner(self) -> str | None:
        facts, names = os.fstat(self._fd), set(os.listdir(self._fd))
        mine = facts.st_uid == os.geteuid() or os.geteuid() == 0
        raw = self.read(OWNER, 200)
        if mine and (not names - {OWNER, f"{OWNER}.tmp"}) and all(self._is_file(name) for name in names):
            return None
        if mine and (found := owner_of(raw)):
            return found
        raise OutputConflict(f"{self.path}: is in the way and was not made by liborth; move it away")

    def _is_file(self, name: str) -> bool:
        return stat.S_ISREG(os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mode)

    def _noted(self) -> set[str]:
        return {os.fsdecode(name) for name in (self.read(NAMES, 1 << 28) or b"").split(b"\0") if name}

    def _stranger(self, name: str) -> OutputConflict:
        return OutputConflict(f"{self.path / name}: was not written by liborth; move it away, or choose another -o")


def new_identity() -> str:
    """Draw the id of a run: 128 random bits."""
    return secrets.token_hex(16)


def identity(facts: os.stat_result) -> tuple[int, int]:
    """Return device and inode: what a directory is, whatever it is called."""
    return facts.st_dev, facts.st_ino


def walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield every entry below a directory that is not itself one, by its relative name, and whether it is a plain file."""
    for root, folders, names in os.walk(folder):
        for name in sorted(names + [f for f in folders if os.path.islink(os.path.join(root, f))]):
            path = os.path.join(root, name)
            yield os.path.relpath(path, folder), stat.S_ISREG(os.lstat(path).st_mode)


def foreign(folder: Path) -> str | None:
    """Name something in a finished output that liborth did not write, or that was changed since; None when all is ours.

    A file is ours when the manifest there lists it and it still is what the manifest says: the size for large ones, the
    hash too for small ones.
    """
    own = next((m for m in (MANIFEST, private.FILE) if (folder / m).is_file()), MANIFEST)
    known = listed(folder / own)
    if known is None:
        return own
    for name, is_file in walk(folder):
        if name in (own, own + SIGNED) or name.split(os.sep)[0] in LASTING or (name not in known and is_guard(folder, name)):
            continue
        path, (size, digest) = folder / name, known.get(name, (-1, ""))
        if not is_file or path.stat().st_size != size:
            return name
        if size <= REREAD and files.hash_file(path).sha256 != digest:
            return name
    return None


def is_guard(folder: Path, name: str) -> bool:
    """Tell whether a file only says that its directory is private."""
    path = folder / name
    return name in GUARDS and os.path.isfile(path) and path.stat().st_size < REREAD and path.read_bytes() == GUARDS[name]


def is_prepared(folder: Path) -> bool:
    """Tell whether a directory is empty but for what says that it is private, and what outlives an output."""
    names = os.listdir(folder)
    return all(name in LASTING or is_guard(folder, name) or private.is_begun(folder, name) for name in names)


def listed(file: Path) -> dict[str, tuple[int, str]] | None:
    """Return name → (size, sha256) of everything a manifest lists; None when it is not a sound one."""
    found = sound(file)
    return {file.name: (file.size, file.sha256) for file in found.outputs} if found else None


def sound(file: Path) -> manifest.Manifest | None:
    """Read a manifest; None when it is not a sound one."""
    try:
        return manifest.read(file)
    except BadInput:
        return None


def remove(name: str, folder: int) -> None:
    """Remove a file or a tree below an open directory, following no link."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)
