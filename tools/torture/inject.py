"""Count, kill at, and fail the calls through which liborth changes the disk; run a command in a fork of this process.

All of liborth's writing goes through the functions named here, so the n-th of their calls is every instant at which a file
system can be found. A fork starts in a millisecond, because torch is imported once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import io
import itertools
import os
import pkgutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CALLS = (
    "open", "mkdir", "rename", "unlink", "rmdir", "write", "pwrite", "fsync", "ftruncate", "posix_fallocate", "copy_file_range",
)  # fmt: skip
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES, "EMFILE": errno.EMFILE}
COUNTER = "count"


@dataclass(frozen=True)
class Fault:
    """What happens at one call.

    Attributes:
        at: which call, counted from 0; −1 only counts.
        what: "kill", "short" or a key of ERRORS.
    """

    at: int = -1
    what: str = "kill"


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit code; −9 when it was killed.
        err: its stderr.
        out: its stdout.
        calls: how many calls were counted.
    """

    code: int
    err: str
    out: str
    calls: int = 0

    @property
    def hit(self) -> bool:
        """Whether it was killed."""
        return self.code == -signal.SIGKILL

    @property
    def clean(self) -> bool:
        """Whether it ended as documented: one line on stderr, and a code that says why."""
        return self.code in (0, 2, 3, 4, 5, 6, 7) and "Traceback" not in self.err and "unexpected" not in self.err


def preload() -> None:
    """Import everything once, so that a fork has nothing left to import, and keep to one thread, so that it may fork."""
    import torch

    import liborth_cli

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(liborth_cli.__path__, "liborth_cli."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    import transformers.models.llama.modeling_llama  # noqa: F401


def arm(fault: Fault, tally: int) -> None:
    """Make the calls of this process count, and one of them go wrong.

    Args:
        fault: which, and how.
        tally: descriptor of a file that holds the number of calls at the end.
    """
    numbers = itertools.count()
    real_pwrite = os.pwrite

    def wrap(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & (os.O_CREAT | os.O_DIRECTORY):
                return real(*args, **kwargs)
            number = next(numbers)
            real_pwrite(tally, number.to_bytes(4, "little"), 0)
            if number != fault.at:
                return real(*args, **kwargs)
            if fault.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.what == "short":
                if name in ("write", "pwrite") and len(args[1]) > 1:
                    return real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                if name == "copy_file_range":
                    return real(args[0], args[1], max(args[2] // 2, 1))
                return real(*args, **kwargs)
            raise OSError(ERRORS[fault.what], os.strerror(ERRORS[fault.what]))

        return call

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name), name))
    fcntl.flock = wrap(fcntl.flock, "flock")
    from liborth_cli.checkpoint import exchange

    exchange._exchange = wrap(exchange._exchange, "exchange")


def run(words: Sequence[object], fault: Fault | None = None, after: float | None = None, limit: float = 120.0) -> Ended:
    """Run `liborth WORDS` in a fork.

    Args:
        words: its arguments.
        fault: what goes wrong.
        after: kill it after so many seconds.
        limit: seconds after which it counts as hanging.
    """
    return fork(lambda: _command(words), fault, after, limit)


def fork(work: Callable[[], None], fault: Fault | None = None, after: float | None = None, limit: float = 120.0) -> Ended:
    """Do some work in a fork; see `run`."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as tally:
        sys.stdout.flush(), sys.stderr.flush()
        child = os.fork()
        if not child:
            _become(out.fileno(), err.fileno())
            code = 1
            try:
                if fault is not None:
                    arm(fault, tally.fileno())
                work()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException as error:
                print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        begun, killed = time.monotonic(), False
        while not (found := os.waitpid(child, os.WNOHANG))[0]:
            spent = time.monotonic() - begun
            if not killed and ((after is not None and spent >= after) or spent > limit):
                os.kill(child, signal.SIGKILL)
                killed = True
            time.sleep(0.0005)
        code = os.waitstatus_to_exitcode(found[1])
        texts = [os.pread(file.fileno(), 1 << 22, 0).decode("utf-8", "replace") for file in (err, out)]
        if killed and after is None:
            texts[0] += "Traceback: hangs"
        count = os.pread(tally.fileno(), 4, 0)
        return Ended(code, *texts, calls=int.from_bytes(count, "little") + 1 if count else 0)


def _become(out: int, err: int) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(out, 1), os.dup2(err, 2)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8", errors="replace")
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), encoding="utf-8", errors="replace", line_buffering=True)


def _command(words: Sequence[object]) -> None:
    from liborth_cli.cli import main

    sys.argv = ["liborth", *map(str, words)]
    main.run()


def hashes(folder: Path) -> dict[str, str]:
    """Return everything below a directory: name → link, kind, or sha256."""
    import hashlib

    found = {}
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(root, name)
            if path.is_symlink():
                value = f"-> {os.readlink(path)}"
            elif path.is_dir():
                value = "directory"
            else:
                value = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "special"
            found[str(path.relative_to(folder))] = value
    return found
