"""Files, held against what their manifest says of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from liborth_cli.checkpoint.private import vouched
from liborth_cli.manifest import Content, Manifest

if TYPE_CHECKING:
    from liborth_cli.checkpoint.delta import Memory


def expected(folder: Path, document: Manifest, memory: Memory | None) -> dict[Path, Content]:
    """Return every file that the manifests vouch for, the private one included; the memory may lie elsewhere, or be away."""
    place = memory.checkpoint.path if memory else folder
    private = vouched(place, document)
    found = {folder / name: file for name, file in document.written.items() if name not in private}
    home = place if place.is_dir() else place.parent
    return {**found, **({home / name: file for name, file in private.items()} if memory else {})}


def differences(files: Mapping[Path, Content]) -> list[str]:
    """Hash files, one stream through memory each; return a sentence for each that is missing or is not what was written."""
    from liborth_cli.checkpoint.hashing import BackgroundHasher

    hasher, found = BackgroundHasher(), []
    for path in files:
        if path.is_file():
            hasher.ask(path)
    hashes = hasher.collect()
    for path, file in files.items():
        if path not in hashes:
            found.append(f"{path.name} is missing")
        elif hashes[path].size != file.size:
            found.append(f"{path.name} is damaged: {hashes[path].size:,} bytes, and {file.size:,} were written")
        elif hashes[path].sha256 != file.sha256:
            found.append(f"{path.name} is damaged: its sha256 is not the one in the manifest")
    return found
