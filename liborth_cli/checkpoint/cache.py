"""What outlives a command for the sake of the next: in one private directory, whose place and size `liborth doctor` tells.

It holds the finished checks of a `verify` that was stopped, and, where `LIBORTH_CACHE` names a directory, factors of retain
texts. Factors of rows to forget, tokens of any row and decoys never come here: they would outlive the run that made them.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from liborth_cli.checkpoint.private import close
from liborth_cli.errors import OutputConflict, from_os

ENVIRONMENT = "LIBORTH_CACHE"
CHECKS, FACTORS = "checks", "factors"
KINDS = (CHECKS, FACTORS)


def place() -> Path:
    """Return where the cache is: `LIBORTH_CACHE`, else `liborth` in the user's cache directory."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "liborth"
    return Path(os.path.expanduser(os.environ.get(ENVIRONMENT) or usual))


def is_chosen() -> bool:
    """Tell whether the user named a place, and so asked for what a run would otherwise not leave behind."""
    return bool(os.environ.get(ENVIRONMENT))


def folder(kind: str) -> Path:
    """Make the directory of one kind of contents (0700), and return it.

    A directory that others can read and that holds more than a cache, such as /tmp or a project's, is not closed to them.

    Raises:
        OutputConflict: when it cannot be made, is a link, belongs to somebody else, or is not the cache's alone.
    """
    where = place()
    if where.parts[:1] and where.parts[0].startswith("~"):
        raise OutputConflict(f"{where}: no such home directory; name another with {ENVIRONMENT}")
    try:
        shared = where.is_dir() and where.stat().st_mode & 0o077 and not {*os.listdir(where)} <= {*KINDS}
    except OSError as error:
        raise from_os(error, where) from None
    if shared:
        raise OutputConflict(f"{where}: open to others, and holds more than liborth's cache; let {ENVIRONMENT} name one for it")
    close(where)
    close(where / kind)
    return where / kind


def nbytes() -> int:
    """Return how much is in it."""
    total = 0
    for folder, _, names in (step for kind in KINDS for step in os.walk(place() / kind)):
        for name in names:
            with suppress(OSError):  # another run may just have removed it
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def empty() -> int:
    """Remove all that liborth put there, and return how many bytes that was."""
    held = nbytes()
    for kind in KINDS:
        if not os.path.islink(place() / kind):
            shutil.rmtree(place() / kind, ignore_errors=True)
    return held
