"""Files, held against what their manifest says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from liborth_cli import manifest
from liborth_cli.checkpoint.files import Written
from liborth_cli.checkpoint.private import FACTORS, GUARDS, vouched
from liborth_cli.manifest import Content, Manifest

if TYPE_CHECKING:
    from liborth_cli.checkpoint.hashing import BackgroundHasher


def expected(folder: Path, document: Manifest, memory: Path | None) -> dict[Path, Content]:
    """Return every file that the manifests vouch for, the private ones and the factors kept beside them included.

    Args:
        folder: the output.
        document: its manifest.
        memory: where its memory lies; None when that is away, and is then not expected.
    """
    found: dict[Path, Content] = {folder / name: file for name, file in document.written.items()}
    if memory is None:
        return found
    home, private = memory if memory.is_dir() else memory.parent, vouched(memory, document)
    found |= {home / n: file for n, file in private.items() if n not in GUARDS or (home / n).exists()}
    for kept in sorted((home / FACTORS).glob(f"*/{manifest.FILE}")):  # factor sets have manifests of their own
        found |= {kept.parent / file.name: file for file in manifest.read(kept).outputs}
    return found


def differences(
    files: Mapping[Path, Content],
    advance: Callable[[int], None] = lambda nbytes: None,
    hasher: BackgroundHasher | None = None,
) -> list[str]:
    """Hash files, one stream through memory each; return a sentence for each that is missing or is not what was written.

    Args:
        files: what was written.
        advance: told of the bytes of every file.
        hasher: that others ask for some of the same files; None: a new one.
    """
    from liborth_cli.checkpoint.hashing import BackgroundHasher

    hasher, found = hasher or BackgroundHasher(), []
    there, hashes = [path for path in files if path.is_file()], dict[Path, Written]()
    for path, written in zip(there, hasher.each(there), strict=True):
        hashes[path] = written
        advance(written.size)
    for path, file in files.items():
        if path not in hashes:
            found.append(f"{path.name} is missing")
        elif hashes[path].size != file.size:
            found.append(f"{path.name} is damaged: {hashes[path].size:,} bytes, and {file.size:,} were written")
        elif hashes[path].sha256 != file.sha256:
            found.append(f"{path.name} is damaged: its sha256 is not the one in the manifest")
    return found
