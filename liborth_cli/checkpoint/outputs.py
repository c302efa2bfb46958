"""What is checked before the first byte is written: that no output destroys, mixes with or hides something."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from liborth_cli.checkpoint.claim import foreign, identity, is_prepared, listed, sound
from liborth_cli.checkpoint.private import FILE as PRIVATE
from liborth_cli.checkpoint.private import KEY, SUFFIX
from liborth_cli.checkpoint.transaction import beside, real, settle
from liborth_cli.errors import OutOfResources, OutputConflict
from liborth_cli.manifest import FILE as MANIFEST
from liborth_cli.manifest import Private


class Kind(Enum):
    """What an output is."""

    FOLDER = "a directory that liborth creates or replaces as a whole"
    FILE = "one file"
    SCRATCH = "an existing directory for temporary files"


@dataclass(frozen=True)
class Place:
    """One place a command is going to write to.

    Attributes:
        path: as the user gave it.
        flag: the option it came from, for the error.
        kind: what it is.
        keeper: the output whose private directory it is, or None.
    """

    path: Path
    flag: str = "-o"
    kind: Kind = Kind.FOLDER
    keeper: Path | None = None


def check_outputs(outputs: Sequence[Place], inputs: Iterable[Path | None], force: bool = False) -> None:
    """Hold every output of a command against every input, against the other outputs and against what is there.

    Places are compared by device and inode, through links, so that no second name of an input gets past. A commit that was
    cut short is settled first. Call it before the work, with everything the command reads and writes.

    Args:
        outputs: all places that will be written to.
        inputs: all files and directories that are read; None is skipped.
        force: allow replacing earlier outputs of liborth, and single files.

    Raises:
        OutputConflict: when an output is, holds or lies inside an input or another output, or an earlier one of liborth, is in
            the way, or cannot be created.
    """
    sources = [path for path in inputs if path is not None and path.exists()]
    for output in outputs:
        if output.kind is Kind.FOLDER:
            settle(output.path)
    for number, output in enumerate(outputs):
        for source in sources:
            _check_apart(output, source)
        for other in outputs[:number]:
            if _overlap(output, other):
                raise OutputConflict(f"{output.flag} {output.path}: is, holds or lies inside {other.flag} {other.path}")
        _check_place(output, force)


def check_apart(output: Place, inputs: Iterable[Path]) -> None:
    """Hold an output that may go on from an earlier run against every input.

    Args:
        output: that will be written to.
        inputs: all files and directories that are read.

    Raises:
        OutputConflict: when it is, holds or lies inside one of them.
    """
    for source in inputs:
        if source.exists():
            _check_apart(output, source)


def check_space(out: Path, needed: int) -> None:
    """Raise OutOfResources when the disk under `out` has fewer than `needed` bytes free."""
    disk = shutil.disk_usage(_existing(real(out)))
    if disk.total and disk.free < needed:  # a file system without a size tells nothing
        raise OutOfResources(f"{out}: needs {needed / 1e9:.2f} GB of disk and {disk.free / 1e9:.2f} GB are free")


def _check_apart(output: Place, source: Path) -> None:
    path, name = output.path, f"{output.flag} {output.path}"
    if output.kind is Kind.FILE:
        if _inside(path, source) or (source.is_dir() and any(_same(path, file) for file in _files(source))):
            raise OutputConflict(f"{name}: is an input, lies inside one, or is another name of one; choose another")
        return
    places = [path, beside(real(path))] if output.kind is Kind.FOLDER else [path]
    if any(_inside(place, source) or (output.kind is Kind.FOLDER and _inside(source, place)) for place in places):
        raise OutputConflict(f"{name}: the output must lie outside the input {source}")


def _overlap(one: Place, two: Place) -> bool:
    """Tell whether one of two outputs is the other, or lies inside the other, when that is created as a whole."""
    whole = [(a, b) for a, b in ((one, two), (two, one)) if b.kind is Kind.FOLDER]
    return any(_inside(a.path, b.path) for a, b in whole) or (
        one.kind is two.kind is Kind.FILE and os.path.realpath(one.path) == os.path.realpath(two.path)
    )


def _check_place(output: Place, force: bool) -> None:
    path, place = output.path, real(output.path)
    if output.kind is Kind.SCRATCH:
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise OutputConflict(f"{output.flag} {path}: no directory that can be written to")
        return
    parent = place.parent if output.kind is Kind.FILE else _existing(place)
    if not parent.is_dir():
        raise OutputConflict(f"{path}: there is no directory {parent}")
    if output.kind is Kind.FILE:
        if os.path.lexists(place) and not place.is_file():
            raise OutputConflict(f"{path}: {'a directory; name a file' if place.is_dir() else 'is not a file'}")
        if place.exists() and not force:
            raise OutputConflict(f"{path}: exists; replace it with --force")
        if _is_part(Path(os.path.realpath(place))):
            raise OutputConflict(f"{output.flag} {path}: is a part of an output of liborth; choose another")
    else:
        _check_folder(path, place, force)
        _check_private(output, place)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputConflict(f"{path}: the directory {parent} cannot be written to")
    if not shutil.disk_usage(parent).total:  # /proc and its like let nobody make a file, whatever their modes say
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".liborth-", dir=parent))
        except OSError as error:
            raise OutputConflict(f"{path}: the directory {parent} cannot be written to ({error.strerror})") from None


def _check_folder(path: Path, place: Path, force: bool) -> None:
    if os.path.ismount(place):
        raise OutputConflict(f"{path}: is a mount point and cannot be replaced as a whole; name a directory inside it")
    whole = next((above for above in Path(os.path.realpath(place)).parents if (above / MANIFEST).is_file()), None)
    if whole is not None:
        raise OutputConflict(f"{path}: lies inside {whole}, an output of liborth that may be published; choose another -o")
    if not os.path.lexists(place) or (place.is_dir() and is_prepared(place)):
        return
    if not force:
        raise OutputConflict(f"{path}: exists; choose another -o, or replace it with --force")
    if not place.is_dir() or not any((place / m).is_file() for m in (MANIFEST, PRIVATE)):
        raise OutputConflict(f"{path}: --force replaces only what liborth wrote, and there is no {MANIFEST} in it")
    if name := foreign(place):
        raise OutputConflict(
            f"{place / name}: was not written by liborth, or was changed since; move it away, then --force replaces the rest"
        )


def _check_private(output: Place, place: Path) -> None:
    """Refuse to replace a private directory that another output lives on: with it, a memory would be gone for good."""
    if not (place / PRIVATE).is_file():
        return
    name = f"{output.flag} {output.path}"
    if output.keeper is None:
        raise OutputConflict(f"{name}: holds private data of another output, which --force does not replace; choose another")
    owner = place.with_name(place.name.removesuffix(SUFFIX))
    if owner != place and (owner / MANIFEST).is_file() and not _same(owner, output.keeper):
        raise OutputConflict(f"{name}: holds the private data of {owner}, which --force does not replace; choose another")
    beside = place == output.keeper.absolute().with_name(output.keeper.name + SUFFIX)
    held, public = sound(place / PRIVATE), sound(output.keeper / MANIFEST)
    mine = isinstance(held, Private) and public is not None and held.belongs_to == public.digest
    if not beside and not mine:
        raise OutputConflict(
            f"{name}: holds the private data of another output, which --force does not replace; choose another"
        )


def _is_part(file: Path) -> bool:
    """Tell whether a file is one of those that a manifest beside it lists, or is that manifest."""
    manifests = [file.parent / name for name in (MANIFEST, PRIVATE) if (file.parent / name).is_file()]
    known = [listed(manifest) for manifest in manifests]
    return (
        bool(manifests)
        and file.exists()
        and (file.name in (MANIFEST, PRIVATE, KEY) or any(names is None or file.name in names for names in known))
    )


def _existing(place: Path) -> Path:
    """Return the nearest directory above that exists."""
    return next(folder for folder in place.absolute().parents if folder.exists())


def _same(one: Path, two: Path) -> bool:
    """Tell whether two names lead to one thing, through links and hard links."""
    try:
        return identity(os.stat(one)) == identity(os.stat(two))
    except OSError:
        return Path(os.path.realpath(one)) == Path(os.path.realpath(two))


def _inside(inner: Path, outer: Path) -> bool:
    """Tell whether `inner` is `outer` or lies below it."""
    place = Path(os.path.realpath(inner))
    return any(_same(folder, outer) for folder in (place, *place.parents))


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names)
