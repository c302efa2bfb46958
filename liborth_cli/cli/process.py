"""The process around a command: its memory, descriptors and signals, and errors turned into one line and an exit code."""

from __future__ import annotations

import codecs
import contextlib
import errno
import gc
import io
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liborth_cli.cli.command import Command, UsageProblem, after_stop, usage_line
from liborth_cli.console import error_line
from liborth_cli.errors import (
    BadInput,
    LiborthError,
    OutOfResources,
    OutputConflict,
    Stopped,
    Unheard,
    UsageError,
    first_line,
    from_os,
)
from liborth_cli.heap import keep_freed_memory
from liborth_cli.machine import is_out_of_memory
from liborth_cli.ranks import rank_in

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR)
"""What the system says of a place that cannot be written to; the rest is said of files that are read."""


def guard(work: Callable[[], Any], asked: Command | None = None) -> None:
    """Run a command; whatever goes wrong ends in one line on stderr and the right exit code.

    Args:
        work: returns an exit code, or anything else for 0.
        asked: the command that it is, which knows what is true when a signal has ended it.
    """
    _prepare()
    try:
        _stand_somewhere()
        code = work()
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except Unheard as error:
        sys.exit(error.exit_code)
    except UsageProblem as error:
        _fail(usage_line(error), UsageError.exit_code)
    except Stopped as error:
        _fail(f"{error}; {after_stop(error, asked)}", error.exit_code)
    except LiborthError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        kind = OutputConflict if error.errno in REFUSED else BadInput  # whose fault: the output's, or a file's
        known = from_os(error, error.filename or "a file", "used", kind)
        _fail(str(known), known.exit_code)
    except Exception as error:
        if is_out_of_memory(error):
            _fail("out of memory; exclude the largest tensors with -e, or use a machine with more", OutOfResources.exit_code)
        if "-v" in sys.argv or "--verbose" in sys.argv:
            raise
        _fail(f"unexpected {type(error).__name__}: {first_line(error)}; -v shows where", LiborthError.exit_code)


def _stand_somewhere() -> None:
    """Refuse to work in a directory that was deleted: relative paths mean nothing there, and MKL ends the process by itself."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise BadInput("the working directory was deleted; change to one that exists") from None


def _prepare() -> None:
    keep_freed_memory()
    gc.set_threshold(100_000, 50, 50)  # importing torch makes half a million objects and no garbage
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    with contextlib.suppress(OSError, ValueError):  # checkpoints have more shards than the usual 256 or 1024 descriptors
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(OSError, ValueError):  # a core file would hold whatever was in memory: weights, texts, secrets
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError):  # a handler that is given cores through a pipe gets one all the same: without memory
        Path("/proc/self/coredump_filter").write_text("0")
    _open_streams()
    if rank_in(os.environ):  # the first rank speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


class _Deaf(io.FileIO):
    """A stream that nobody needs to hear: what is told on stderr must not end a run when it is full or its reader is gone."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


class _Heard(io.FileIO):
    """Standard output: what goes wrong with it is said once, and no library ends the process when its reader is gone."""

    over = False

    def write(self, data: Any) -> int:
        try:
            return len(data) if self.over else super().write(data) or 0
        except OSError as error:
            self.over = True
            if error.errno == errno.EPIPE:
                raise Unheard("nobody reads standard output any more") from None
            raise


def _open_streams() -> None:
    """Make stdout and stderr take any text, whatever their encoding, also where they are closed or full."""
    codecs.register_error("liborth", _encode_anyway)
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: else the first file of ours would get its number, and what is printed would land in it
            os.open(os.devnull, os.O_RDWR)
    for name, raw in (("stdout", _Heard(1, "w", closefd=False)), ("stderr", _Deaf(2, "w", closefd=False))):
        stream = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):
            encoding = getattr(stream, "encoding", None) or "utf-8"
            lines = name == "stderr" or raw.isatty()
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding, line_buffering=lines))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="liborth")


def _encode_anyway(error: UnicodeError) -> tuple[str | bytes, int]:
    """Give the bytes of a path that is not UTF-8 as they are, and escape what an encoding does not have."""
    assert isinstance(error, UnicodeEncodeError)
    part = error.object[error.start : error.end]
    with contextlib.suppress(UnicodeError):
        return part.encode("ascii", "surrogateescape"), error.end
    return part.encode("ascii", "backslashreplace").decode("ascii"), error.end


def _stop(number: int, _frame: Any) -> None:
    raise Stopped(number)


def _fail(text: str, code: int) -> None:
    error_line(text)
    sys.exit(code)
