"""Copy what travels beside the weights: configuration, tokenizer, licence. Never code."""

from __future__ import annotations

import fnmatch
from pathlib import Path

from liborth_cli.checkpoint.hub import SIDECARS
from liborth_cli.checkpoint.writer import Written, write_file
from liborth_cli.errors import BadInput

MAX_BYTES = 200_000_000


def find(folder: Path) -> list[Path]:
    """List the files of a checkpoint directory that are copied byte for byte, in name order.

    Raises:
        BadInput: when one is absurdly large.
    """
    if not folder.is_dir():
        return []
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and any(fnmatch.fnmatch(f.name, p) for p in SIDECARS)]
    for file in files:
        if file.stat().st_size > MAX_BYTES:
            raise BadInput(f"{file}: larger than any real file of this kind; refusing to copy it")
    return files


def copy(files: list[Path], folder: Path) -> list[Written]:
    """Copy files into `folder`.

    Raises:
        BadInput: when one cannot be read.
    """
    written = []
    for file in files:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise BadInput(f"{file}: cannot be read ({error.strerror})") from None
        written.append(write_file(folder / file.name, data))
    return written
