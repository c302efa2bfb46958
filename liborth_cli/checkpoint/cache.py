"""What outlives a command for the sake of the next: in one private directory, whose place and size `liborth doctor` tells.

It holds the finished checks of a `verify` that was stopped, and, where `LIBORTH_CACHE` names a directory, factors of retain
texts. Factors of rows to forget, tokens of any row and decoys never come here: they would outlive the run that made them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from liborth_cli.checkpoint.private import close

ENVIRONMENT = "LIBORTH_CACHE"
CHECKS, FACTORS = "checks", "factors"
KINDS = (CHECKS, FACTORS)


def place() -> Path:
    """Return where the cache is: `LIBORTH_CACHE`, else `liborth` in the user's cache directory."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "liborth"
    return Path(os.environ.get(ENVIRONMENT) or usual).expanduser()


def is_chosen() -> bool:
    """Tell whether the user named a place, and so asked for what a run would otherwise not leave behind."""
    return bool(os.environ.get(ENVIRONMENT))


def folder(kind: str) -> Path:
    """Make the directory of one kind of contents (0700), and return it.

    Raises:
        OutputConflict: when it cannot be made, is a link, or belongs to somebody else.
    """
    close(place())
    close(place() / kind)
    return place() / kind


def nbytes() -> int:
    """Return how much is in it."""
    files = [file for kind in KINDS for file in (place() / kind).rglob("*")]
    return sum(os.lstat(file).st_size for file in files if file.is_file() and not file.is_symlink())


def empty() -> int:
    """Remove all that liborth put there, and return how many bytes that was."""
    held = nbytes()
    for kind in KINDS:
        if not (place() / kind).is_symlink():
            shutil.rmtree(place() / kind, ignore_errors=True)
    return held
