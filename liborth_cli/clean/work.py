"""OUT.private: where a run of `clean` works, what of it is done, and who holds it.

MARK says which commands have run, on which inputs; `--resume` goes on behind them. The directory is locked while a process
works in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liborth_cli.checkpoint.documents import load_object
from liborth_cli.checkpoint.files import write_file
from liborth_cli.checkpoint.private import GUARDS, close, prepare, remove_empty
from liborth_cli.checkpoint.transaction import beside
from liborth_cli.clean.commands import ROWS, Step, Typist
from liborth_cli.console import Console, JsonObject
from liborth_cli.errors import BadInput, LiborthError, OutputConflict, PairMismatch, Stopped, UsageError, VerificationFailed
from liborth_cli.machine import Run

MARK = "liborth.clean.json"


@dataclass
class Work:
    """The private directory of a run, held by this process.

    Attributes:
        folder: OUT.private.
        typist: carries commands out.
        resume: whether the run goes on with one that was stopped.
        console: where the commands are printed.
        head: the commands, and what their inputs are.
        done: those of the commands that have run.
    """

    folder: Path
    typist: Typist
    resume: bool
    console: Console
    head: JsonObject
    done: list[str] = field(default_factory=list)

    def carry_out(self, step: Step) -> None:
        """Print a command and carry it out, unless an earlier run had; a failed verification is a result here."""
        made = shlex.join(step.decisive)
        self.console.note(f"$ {step}" + ("   # done before" if made in self.done else ""))
        if made in self.done:
            return
        left = step.command in self.typist.kept and (self.resume or os.path.lexists(beside(step.makes)))
        again = ["--force"] if os.path.lexists(step.makes) else ["--resume"] if left else []
        before = _made(step.makes)
        try:
            self.typist.carry_out([*step.words, *again])
        except VerificationFailed:
            if _made(step.makes) == before:  # nothing new was written, and what an earlier run left there is no result
                raise
        if not os.path.lexists(step.makes):
            raise LiborthError(f"{step.makes}: `liborth {step.command}` did not write it; this is a bug, please report it")
        self.done.append(made)
        self.note()

    def note(self) -> None:
        """Write down how far it is."""
        document = {**self.head, "done": self.done}
        write_file(self.folder / MARK, (json.dumps(document, indent=1) + "\n").encode(), 0o600)


@contextlib.contextmanager
def claimed(
    place: Path, steps: Sequence[Step], inputs: Sequence[Path], typist: Typist, run: Run, console: Console
) -> Iterator[Work]:
    """Make the private directory, or go on in the one of an earlier run, and hold it.

    When the input is refused before anything is made of it, the directory goes again.

    Args:
        place: OUT.private.
        steps: as they are planned.
        inputs: files and checkpoints that the run reads.
        typist: carries commands out.
        run: with --force and --resume.
        console: where the commands are printed.

    Raises:
        OutputConflict: when it is in the way, is somebody else's, or another run is working in it.
        UsageError: when --resume finds another run's work.
    """
    head = {
        "commands": [shlex.join(step.decisive) for step in steps],
        "inputs": {str(path): _identity(path) for path in inputs},
    }
    known = (place / MARK).is_file()
    if place.is_dir() and not known and set(os.listdir(place)) - {".gitignore", "README.md"}:
        raise OutputConflict(f"{place}: is in the way and was not made by `liborth clean`; move it away, or choose another -o")
    if known and not (run.resume or run.force):
        raise OutputConflict(f"{place}: a run of `liborth clean` was here; go on with --resume, or begin again with --force")
    work = Work(place, typist, run.resume, console, head)
    close(place)
    held = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputConflict(f"{place}: another run is working here; wait for it, or choose another -o") from None
        if known and run.resume and not run.force:
            before = load_object(place / MARK, 1 << 20)
            if {key: before.get(key) for key in head} != head:
                raise UsageError(f"{place}: a run with other options or inputs; begin again with --force, not --resume")
            work.done = list(before.get("done", ()))
        prepare(place)
        work.note()
        yield work
    except (UsageError, BadInput, PairMismatch):  # the command is going to be another one, and must not find this in its way
        if not known and set(os.listdir(place)) <= {MARK, ROWS, *GUARDS}:
            shutil.rmtree(place / ROWS, ignore_errors=True)
            (place / MARK).unlink(missing_ok=True)
            remove_empty(place)
        raise
    except Stopped as error:
        error.kept = True
        raise
    finally:
        os.close(held)


def _made(path: Path) -> tuple[int, int] | None:
    """Return what tells whether a result was made anew; None when there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _identity(path: Path) -> list[list[Any]]:
    """Return what tells whether an input changed: size and time of a file, or of every file of a directory."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
