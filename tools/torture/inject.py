"""Count, kill at, and fail the calls through which liborth changes the disk; run a command in a fork of this process.

All of liborth's writing goes through the functions named here (tools/torture/system.py holds that against what the kernel
sees), so the n-th of their calls is every instant at which a file system can be found. A fork takes 30 ms where a process
that imports torch takes seconds: this process imports everything, starts no thread, and every trial is a child of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import hashlib
import importlib
import io
import itertools
import os
import pkgutil
import resource
import select
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
    "chmod", "fchmod",
)  # fmt: skip
NAMES = (*CALLS, "flock", "exchange")
"""What is counted; a call is remembered by its place in this list."""
LIMIT, GLANCE = 120.0, 0.005
"""Seconds after which a command counts as hanging, and between two looks at one."""
SHORTENED = ("write", "pwrite", "copy_file_range")
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES, "EMFILE": errno.EMFILE}


@dataclass(frozen=True)
class Fault:
    """What happens at one call.

    Attributes:
        at: which call, counted from 0; −1 only counts.
        what: "kill", "short", "core" (aborted with cores allowed again, as a handler of cores would see it) or a key of ERRORS.
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
        calls: the names of the calls that were counted, in order.
    """

    code: int
    err: str
    out: str
    calls: tuple[str, ...] = ()

    @property
    def hit(self) -> bool:
        """Whether it was killed."""
        return self.code == -signal.SIGKILL

    @property
    def clean(self) -> bool:
        """Whether it ended as documented: one line on stderr, and a code that says why."""
        return self.code in (0, 2, 3, 4, 5, 6, 7) and "Traceback" not in self.err and "unexpected" not in self.err


def preload() -> None:
    """Import everything once, so that a fork has nothing left to import, and keep to one thread, so that it may fork.

    What the command line is built from, and the versions that manifests name, are read once too: they are the same in
    every process, and take longer than the smallest command.
    """
    import torch

    import liborth_cli

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(liborth_cli.__path__, "liborth_cli."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    for name in ("transformers.models.llama.modeling_llama", "threadpoolctl", "rich.table", "rich.console", "typer._adapters"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from liborth_cli.cli.main import group
    from liborth_cli.manifest import Maker
    from liborth_cli.verify.report import page

    group(), Maker(kind="split"), page._template()
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page it looks at


def arm(fault: Fault, tally: int) -> None:
    """Make the calls of this process count, and one of them go wrong.

    Args:
        fault: which, and how.
        tally: descriptor of a file that gets one byte a call.
    """
    numbers = itertools.count()
    real_pwrite = os.pwrite
    codes = {name: bytes([place]) for place, name in enumerate(NAMES)}

    def wrap(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & (os.O_CREAT | os.O_DIRECTORY):
                return real(*args, **kwargs)
            number = next(numbers)
            real_pwrite(tally, codes[name], number)
            if number != fault.at:
                return real(*args, **kwargs)
            if fault.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.what == "core":
                hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
                resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
                os.abort()
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


def run(
    words: Sequence[object], fault: Fault | None = None, after: float | None = None, cwd: Path | None = None,
    look: Callable[[int], None] | None = None,
) -> Ended:  # fmt: skip
    """Run `liborth WORDS` in a fork.

    Args:
        words: its arguments.
        fault: what goes wrong.
        after: kill it after so many seconds.
        cwd: where it runs.
        look: called with its process id every few milliseconds.
    """
    return fork(lambda: _command(words, cwd), fault, after, look)


def fork(
    work: Callable[[], None], fault: Fault | None = None, after: float | None = None, look: Callable[[int], None] | None = None
) -> Ended:
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
        killed = _wait(child, LIMIT if after is None else after, look)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [os.pread(file.fileno(), 1 << 22, 0).decode("utf-8", "replace") for file in (err, out)]
        if killed and after is None:
            texts[0] += "Traceback: hangs"
        return Ended(code, *texts, calls=tuple(NAMES[byte] for byte in os.pread(tally.fileno(), 1 << 20, 0)))


def _wait(child: int, seconds: float, look: Callable[[int], None] | None) -> bool:
    """Wait until a child has ended, and kill it when that takes too long; return whether it was."""
    process, end = os.pidfd_open(child), time.monotonic() + seconds
    try:
        while (left := end - time.monotonic()) > 0:
            if select.select([process], [], [], min(left, GLANCE) if look else left)[0]:
                return False
            if look:
                look(child)
        os.kill(child, signal.SIGKILL)
        return True
    finally:
        os.close(process)


def _become(out: int, err: int) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(out, 1), os.dup2(err, 2)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8", errors="replace")
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), encoding="utf-8", errors="replace", line_buffering=True)


def _command(words: Sequence[object], cwd: Path | None = None) -> None:
    from liborth_cli.cli import main

    if cwd is not None:
        os.chdir(cwd)
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    sys.argv = ["liborth", *map(str, words)]
    main.run()


def hashes(folder: Path) -> dict[str, str]:
    """Return everything below a directory: name → link, kind, or sha256."""
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
