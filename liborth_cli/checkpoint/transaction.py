"""All or nothing: work in OUT.liborth-partial, journal what is finished, rename at the end.

Before the rename OUT does not exist (or is the old one), after it OUT is complete. A run that was stopped leaves the
partial directory; `resume` skips what the journal says is finished and still hashes right.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from liborth_cli.checkpoint.writer import Written, hash_file, write_file
from liborth_cli.errors import BadInput, OutOfResources, OutputConflict, PairMismatch, UsageError
from liborth_cli.manifest import FILE as MANIFEST

JOURNAL = "journal.jsonl"


def check_output(out: Path, inputs: Iterable[Path], force: bool) -> None:
    """Refuse an output that would destroy or mix with something.

    Args:
        out: the directory to be created.
        inputs: paths that are read.
        force: allow replacing an earlier output of liborth.

    Raises:
        OutputConflict: when `out` is, holds or lies inside an input, is in the way, or cannot be created.
    """
    place = out.resolve()
    for path in inputs:
        source = path.resolve()
        if place == source or place in source.parents or source in place.parents:
            raise OutputConflict(f"{out}: the output must lie outside the input {path}")
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        if not force:
            raise OutputConflict(f"{out}: exists; choose another -o, or replace it with --force")
        if not (out / MANIFEST).is_file():
            raise OutputConflict(f"{out}: --force replaces only what liborth wrote, and there is no {MANIFEST} in it")
    parent = next(folder for folder in place.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputConflict(f"{out}: the directory {parent} cannot be written to")


def check_space(out: Path, needed: int) -> None:
    """Raise OutOfResources when the disk under `out` has fewer than `needed` bytes free."""
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutOfResources(f"{out}: needs {needed / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free")


class Transaction:
    """The partial directory of one run.

    Use it in a `with`: an error about the input removes the partial directory; a signal, a full disk or a crash keeps it
    for `--resume`.

    Attributes:
        out: the directory that `commit` creates.
        partial: where files are written until then.
        finished: unit name → the record its journal line holds.
    """

    def __init__(self, out: Path, plan: str, force: bool = False, resume: bool = False) -> None:
        """Create the partial directory, or take up one that was left.

        Args:
            out: the directory to create.
            plan: hash of everything that decides the output's bytes.
            force: discard a partial directory left by another run, and replace `out`.
            resume: continue from the journal when its plan is the same.

        Raises:
            OutputConflict: when another run holds it, or one was left and neither flag is given.
            UsageError: when the left run had a different plan.
        """
        self.out, self.partial, self._force = out, out.with_name(out.name + ".liborth-partial"), force
        self.finished: dict[str, dict[str, Any]] = {}
        self._committed = False
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.partial.mkdir()
            left = False
        except FileExistsError:
            left = True
        except OSError as error:
            raise OutputConflict(f"{self.partial}: cannot be created ({error.strerror})") from None
        self._lock = os.open(self.partial, os.O_RDONLY)
        try:
            self._take(left, force, resume, plan)
        except BaseException:
            os.close(self._lock)
            raise

    def finish(self, unit: str, record: dict[str, Any]) -> None:
        """Note that the files of `unit` are complete; `record["files"]` lists them as `Written.to_json`."""
        self.finished[unit] = record
        self._append({"unit": unit, **record})

    def commit(self, manifest: bytes) -> None:
        """Write the manifest and make the output appear.

        Raises:
            OutputConflict: when something took the output's name meanwhile.
        """
        (self.partial / JOURNAL).unlink()
        write_file(self.partial / MANIFEST, manifest)
        os.fsync(self._lock)
        aside = None
        try:
            if os.path.lexists(self.out) and any(self.out.iterdir()):
                if not self._force:
                    raise OutputConflict(f"{self.out}: appeared while this run was working; it is left as it is")
                aside = self.out.with_name(self.out.name + ".liborth-old")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(self.out, aside)
            os.rename(self.partial, self.out)
        except OSError as error:
            raise OutputConflict(f"{self.out}: cannot be put in place ({error.strerror})") from None
        self._committed = True
        _fsync_folder(self.out.parent)
        if aside:
            shutil.rmtree(aside, ignore_errors=True)

    def __enter__(self) -> Transaction:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove the partial directory when what stopped the run cannot be mended by running again."""
        hopeless = kind is not None and issubclass(kind, (BadInput, PairMismatch, UsageError))
        if not self._committed and (hopeless or not self.finished):
            shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._lock)

    def _take(self, left: bool, force: bool, resume: bool, plan: str) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputConflict(f"{self.partial}: another run is writing here; wait for it or choose another -o") from None
        if left and not force and not resume:
            raise OutputConflict(f"{self.partial}: a stopped run is here; continue it with --resume or discard it with --force")
        if left and resume:
            self._read_journal(plan)
            return
        for file in self.partial.iterdir():
            file.unlink()
        self._append({"plan": plan})

    def _read_journal(self, plan: str) -> None:
        journal = self.partial / JOURNAL
        lines = list(_whole_lines(journal.read_text())) if journal.exists() else []
        if lines and lines[0].get("plan") != plan:
            raise OutputConflict(
                f"{self.partial}: the stopped run had other inputs or options; repeat them, or discard it with --force"
            )
        journal.unlink(missing_ok=True)
        self._append({"plan": plan})
        for line in lines[1:]:
            if all(self._intact(Written(**file)) for file in line["files"]):
                self.finish(line.pop("unit"), line)

    def _intact(self, file: Written) -> bool:
        path = self.partial / file.name
        return path.is_file() and path.stat().st_size == file.size and hash_file(path) == file

    def _append(self, line: dict[str, Any]) -> None:
        with open(self.partial / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())


def _whole_lines(text: str) -> Iterator[dict[str, Any]]:
    """Yield journal lines up to the first one that a crash cut short."""
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
