"""The private directory of an output: what must not be published lies beside OUT, never in it.

`OUT.private/` (or `--memory-out DIR`) holds the memory, and whatever else tells of private rows. It is closed to other users
(0700, every file 0600 from its first byte), says so, keeps itself out of `git add`, and its own manifest names the digest of
the public manifest that it belongs to. The hub's uploader heeds its `.gitignore` only when this very directory is uploaded.
Outputs of older versions hold the memory themselves and are still read.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from liborth_cli import manifest
from liborth_cli.checkpoint.files import Written, drawn_for, write_file
from liborth_cli.errors import BadInput, OutputConflict, PairMismatch, from_os

SUFFIX = ".private"
FILE = "liborth.private.json"
KEY, KEY_BYTES = "liborth.private.key", 32
DECOYS = "decoys.jsonl"
FACTORS = "factors"
"""Directory in a private one for factor sets, which have manifests of their own."""
FOLDER_MODE, FILE_MODE = 0o700, 0o600
README = b"""# PRIVATE: do not publish, do not upload, do not copy to a shared place

The files here hold private data that a model memorised. With them the fine-tuned model comes back bit for bit
(`liborth excise MODEL --beta 1`). Keep this directory where only you can read it; delete it to keep the general model alone.
"""
GUARDS = {".gitignore": b"*\n", "README.md": README}
"""Files that say what a private directory is, and keep it out of `git add`."""


def private_place(out: Path, memory_out: Path | None = None) -> Path:
    """Return where the private part of an output goes: `memory_out` when given, otherwise `OUT.private`.

    Raises:
        OutputConflict: when the output itself has a private directory's name, which would be taken for one.
    """
    out = out if out.name not in ("", "..") else out.resolve()
    if out.name.endswith(SUFFIX):
        raise OutputConflict(f"-o {out}: names that end in {SUFFIX} are for what must not be published; choose another")
    return memory_out or out.parent / (out.name + SUFFIX)


def find_memory(model: Path, given: Path | None = None) -> Path | None:
    """Return the directory or file that holds a model's memory: the one given, else `MODEL.private`, else MODEL; or None."""
    if given is not None:
        return given
    folder = model if model.is_dir() else model.parent
    places = (*(one.parent / (one.name + SUFFIX) for one in (folder, folder.resolve())), folder)
    return next((place for place in places if holds_memory(place)), None)


def holds_memory(folder: Path) -> bool:
    """Tell whether a directory holds a memory."""
    return any(os.path.isfile(folder / f"memory.safetensors{suffix}") for suffix in ("", ".index.json"))


def mode_in(folder: Path) -> int:
    """Return the permissions of a file in a directory: its owner's alone where the directory is closed to others."""
    return 0o644 if folder.is_dir() and folder.stat().st_mode & 0o077 else FILE_MODE


def prepare(folder: Path) -> list[Written]:
    """Make a private directory (0700) with the files that say what it is, or complete one that is there.

    Returns:
        The files that were not there.

    Raises:
        OutputConflict: when it cannot be written to, or is not a directory of this user.
    """
    close(folder)
    for name in os.listdir(folder):
        if is_begun(folder, name):
            (folder / name).unlink(missing_ok=True)
    absent = [name for name in GUARDS if not os.path.lexists(folder / name)]
    return [write_file(folder / name, GUARDS[name], FILE_MODE) for name in absent]


def is_begun(folder: Path, name: str) -> bool:
    """Tell whether a file is a guard or a key that a kill left half written: under a drawn name, and with no other content."""
    wanted, path = drawn_for(name), folder / name
    if wanted is None or path.is_symlink() or not path.is_file():
        return False
    if wanted == KEY:
        return path.stat().st_size <= KEY_BYTES
    whole = GUARDS.get(wanted)
    return whole is not None and path.stat().st_size <= len(whole) and whole.startswith(path.read_bytes())


def is_idle(folder: Path) -> bool:
    """Tell whether a directory for factor sets holds none: a key that names nothing, decoys that were never used."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    known = (name in (KEY, DECOYS) or is_begun(folder, name) for name in os.listdir(folder))
    return all(known) and not any(path.is_dir() or path.is_symlink() for path in folder.iterdir())


def close(folder: Path) -> None:
    """Make a directory for private data (0700), or close one that is there to others.

    Raises:
        OutputConflict: when it cannot be made, is a link, or belongs to somebody else.
    """
    try:
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise OutputConflict(f"{folder}: private data go there, and it is no directory of yours; move it away")
        os.chmod(folder, FOLDER_MODE)
    except OSError as error:
        raise from_os(error, folder) from None


def prepare_factors(folder: Path) -> None:
    """Make a directory for factor sets and decoys, and complete the private directory whose `FACTORS` it is.

    Raises:
        OutputConflict: as `close`.
    """
    if folder.name == FACTORS:
        prepare(folder.parent)
    close(folder)


def remove_empty(folder: Path) -> None:
    """Remove a private directory in which there is nothing but what says that it is one."""
    if set(os.listdir(folder)) <= set(GUARDS):
        for name in GUARDS:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def seal(folder: Path, files: Sequence[Written], belongs_to: str) -> None:
    """Complete a private directory: the files that guard it, and its manifest.

    Args:
        folder: where the files are.
        files: all of them.
        belongs_to: digest of the public manifest.

    Raises:
        OutputConflict: when it cannot be written to.
    """
    document = manifest.Private(belongs_to=belongs_to, private=True)
    write_file(folder / FILE, manifest.dump(document.with_outputs([*files, *prepare(folder)])), FILE_MODE)


def vouched(memory: Path, public: manifest.Manifest) -> dict[str, manifest.File]:
    """Return what is known of the memory files that belong to an output, by name.

    Args:
        memory: the directory or file that holds the memory.
        public: the manifest of the general checkpoint.

    Returns:
        Name → size and hash; empty when nothing vouches for them.

    Raises:
        BadInput: when the private manifest is damaged.
        PairMismatch: when it belongs to another output.
    """
    file = (memory if memory.is_dir() else memory.parent) / FILE
    if not os.path.lexists(file):
        return {entry.name: entry for entry in public.outputs if entry.name.startswith("memory")}
    private = manifest.read(file, manifest.Private)
    if private.belongs_to != public.digest:
        raise PairMismatch(f"{memory}: belongs to another output than the general checkpoint given, or to an earlier one")
    return {entry.name: entry for entry in private.outputs}


def identity(folder: Path, data: bytes) -> str:
    """Name private data without giving it away: HMAC-SHA256 under a random key that lies in the private directory.

    Args:
        folder: the private directory; the key is made when there is none.
        data: what is named.

    Raises:
        BadInput: when the key cannot be read.
    """
    file = folder / KEY
    if not os.path.lexists(file):
        write_file(file, os.urandom(KEY_BYTES), FILE_MODE)
    try:
        key = file.read_bytes()
    except OSError as error:
        raise from_os(error, file, "read", BadInput) from None
    if len(key) != KEY_BYTES:
        raise BadInput(f"{file}: damaged; a key has {KEY_BYTES} bytes")
    return hmac.new(key, data, hashlib.sha256).hexdigest()
