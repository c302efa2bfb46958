"""The process around a command: signals, memory, and errors turned into one line and an exit code."""

from __future__ import annotations

import errno
import gc
import signal
import sys
from collections.abc import Callable
from typing import Any

from liborth_cli.cli.allocator import keep_freed_memory
from liborth_cli.console import error_line
from liborth_cli.errors import LiborthError, OutOfResources, Stopped


def guard(command: Callable[[], None]) -> None:
    """Run a command; whatever goes wrong ends in one line on stderr and the right exit code."""
    keep_freed_memory()
    gc.set_threshold(100_000, 50, 50)  # importing torch makes half a million objects and no garbage
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        command()
    except LiborthError as error:
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail("out of memory; exclude the largest tensors with -e, or use a machine with more", OutOfResources.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            _fail(f"{error.filename or 'the disk'}: no space ({error.strerror})", OutOfResources.exit_code)
        _unexpected(error)
    except Exception as error:
        _unexpected(error)


def _stop(number: int, _frame: Any) -> None:
    raise Stopped(number)


def _unexpected(error: Exception) -> None:
    if "-v" in sys.argv or "--verbose" in sys.argv:
        raise error
    _fail(f"unexpected {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; -v shows where", 1)


def _fail(text: str, code: int) -> None:
    error_line(text.replace("\n", " "))
    sys.exit(code)
