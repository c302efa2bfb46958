"""The files a split wrote, held against the hashes in its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from liborth_cli import manifest
from liborth_cli.checkpoint.hashing import BackgroundHasher
from liborth_cli.errors import BadInput


def entries(document: dict[str, Any], folder: Path) -> dict[str, tuple[int, str]]:
    """Return file name → (size, sha256) of everything the manifest says was written.

    Raises:
        BadInput: when the manifest's list is damaged.
    """
    try:
        listed = {str(o["name"]): (int(o["size"]), str(o["sha256"])) for o in document["outputs"]}
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{folder / manifest.FILE}: damaged: its list of outputs cannot be read") from None
    strange = next((name for name in listed if not inside(name)), None)
    if strange is not None:
        raise BadInput(f"{folder / manifest.FILE}: names a file outside its directory: {strange!r}")
    return listed


def inside(name: str) -> bool:
    """Tell whether a name stays in its directory: a file of it, or of a folder in it."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part not in ("", ".", "..") and "\\" not in part for part in parts)


def differences(folder: Path, document: dict[str, Any], places: dict[str, Path] | None = None) -> list[str]:
    """Hash every file the manifest lists, one stream through memory each.

    Args:
        folder: where the split wrote.
        document: its manifest.
        places: files that lie somewhere else, by name; None as a value means: left out on purpose.

    Returns:
        One sentence for each file that is missing or is not, to the bit, what was written.
    """
    listed, hasher, found = entries(document, folder), BackgroundHasher(), []
    where = {name: (places or {}).get(name, folder / name) for name in listed}
    for path in where.values():
        if path.is_file():
            hasher.ask(path)
    hashes = hasher.collect()
    for name, (size, sha256) in listed.items():
        path = where[name]
        if path not in hashes:
            found.append(f"{name} is missing")
        elif hashes[path].size != size:
            found.append(f"{name} is damaged: {hashes[path].size:,} bytes, and {size:,} were written")
        elif hashes[path].sha256 != sha256:
            found.append(f"{name} is damaged: its sha256 is not the one in the manifest")
    return found
