"""Every way liborth can refuse, each with its exit code (docs/formats.md, "Exit codes")."""

from __future__ import annotations

import difflib
import errno
import signal
from collections.abc import Collection

NO_SPACE = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
"""What a file system says when it is full."""
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""What the kernel says when this process may not have more."""


def shown(value: object, limit: int = 80) -> str:
    """Quote a name from a file for an error line: what cannot be printed is escaped, and the middle of a long one left out."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - limit // 3]}…{text[-limit // 3 :]}"


def cut(text: str, most: int) -> str:
    """Return a text of so many characters at most; one that was longer ends in an ellipsis."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def closest(name: str, known: Collection[str], every: str = "") -> str:
    """Return what to say of a name that is not known, behind a semicolon: the closest one, and all there are.

    Args:
        name: as it was given.
        known: the names there are.
        every: says which these are; without it they are listed.
    """
    near = difflib.get_close_matches(name, list(known), 1)
    every = every or cut(f"there are: {', '.join(sorted(known))}", 170)
    return f"did you mean {near[0]}? {every[0].upper()}{every[1:]}" if near else every


def first_line(error: BaseException, most: int = 120) -> str:
    """Return the first line of what a library says of a failure, or the failure's kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


class LiborthError(Exception):
    """Base of all errors a user is meant to read: one line that says what, where and what to do.

    Attributes:
        exit_code: what the process exits with.
    """

    exit_code = 1


class UsageError(LiborthError):
    """The options contradict each other or ask for something the method cannot do."""

    exit_code = 2


class BadInput(LiborthError):
    """A file is missing, malformed, unsafe, or changed while it was read."""

    exit_code = 3


class PairMismatch(LiborthError):
    """Two inputs do not belong together: shapes, dtypes, vocabularies or hashes differ."""

    exit_code = 4


class VerificationFailed(LiborthError):
    """The work was done and did not hold up."""

    exit_code = 5


class OutputConflict(LiborthError):
    """The output exists, is an input, cannot be written, or another process is writing it."""

    exit_code = 6


class OutOfResources(LiborthError):
    """Not enough disk or memory."""

    exit_code = 7


class RankLost(LiborthError):
    """Another process of the same command died, is stuck, or was never there; what was finished can be resumed."""

    exit_code = 8


class Unheard(LiborthError):
    """Whoever read stdout has gone, as head goes: nothing is wrong, and nobody is there to hear the rest."""

    exit_code = 128 + signal.SIGPIPE


class Stopped(LiborthError):
    """A signal ended the run between two bytes; what was finished can be resumed.

    Attributes:
        exit_code: 128 plus the signal's number (130 for Ctrl-C, 143 for SIGTERM).
        kept: there is something for --resume to go on with; whoever has kept it says so.
        why_not: why nothing is kept, where that is not because nothing was finished.
    """

    def __init__(self, signal_number: int) -> None:
        """Record which signal it was."""
        name = "Ctrl-C" if signal_number == 2 else f"signal {signal_number}"
        super().__init__(f"stopped by {name}")
        self.exit_code, self.kept, self.why_not = 128 + signal_number, False, ""


def from_os(
    error: OSError, name: object, verb: str = "written", otherwise: type[LiborthError] = OutputConflict
) -> LiborthError:
    """Turn what the system refused into the error with the right exit code.

    Args:
        error: what it said.
        name: the file it said it of.
        verb: what could not be done to it.
        otherwise: the kind of error when nothing has run out.
    """
    why = error.strerror or error
    if error.errno in NO_SPACE:
        return OutOfResources(f"{name}: no space ({why}); free some and run again")
    if error.errno in EXHAUSTED:
        more = "; raise the limit with `ulimit -n`" if error.errno == errno.EMFILE else ""
        return OutOfResources(f"{name}: cannot be {verb} ({why}){more}")
    return otherwise(f"{name}: cannot be {verb} ({why})")
