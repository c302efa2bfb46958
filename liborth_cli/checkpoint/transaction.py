"""All or nothing: work in OUT.liborth-partial, journal what is finished, exchange it for OUT at the end.

At every instant OUT is absent, the old output or the new one, each of them whole. Private files become a directory of
their own, put in place just before OUT and taken back when OUT cannot follow; a run that was killed between the two is
undone, or found to have finished, by the next one. A stopped run leaves its partial directories: `resume` takes from them
only what it can prove: the same run and plan, files that hash as the journal says, made from the inputs that are read now.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from liborth_cli.checkpoint import exchange
from liborth_cli.checkpoint.claim import (
    FILES,
    JOURNAL,
    LASTING,
    OLD,
    REREAD,
    Claim,
    foreign,
    identity,
    is_guard,
    is_prepared,
    listed,
    new_identity,
    walk,
)
from liborth_cli.checkpoint.documents import json_lines
from liborth_cli.checkpoint.files import hash_file, sync_folder, write_all, write_file
from liborth_cli.checkpoint.journal import Lines, Unit
from liborth_cli.checkpoint.private import FILE as PRIVATE
from liborth_cli.checkpoint.private import is_idle
from liborth_cli.checkpoint.signing import SUFFIX as SIGNED
from liborth_cli.checkpoint.signing import sign
from liborth_cli.console import JsonObject
from liborth_cli.errors import BadInput, LiborthError, OutputConflict, PairMismatch, Stopped, UsageError, from_os
from liborth_cli.manifest import FILE as MANIFEST

SUFFIX = ".liborth-partial"


def beside(place: Path) -> Path:
    """Name the directory in which an output is made."""
    return place.parent / (place.name + SUFFIX)


def real(place: Path) -> Path:
    """Follow a link, so that an output appears where it leads, on the disk it leads to."""
    return Path(os.path.realpath(place)) if place.is_symlink() or place.name in ("", "..") else place


class Transaction:
    """The partial directories of one run.

    Use it in a `with`: an error about the input removes them; a signal, a full disk or a crash keeps them for `--resume`.

    Attributes:
        out: the directory that `commit` creates.
        partial: where its files are written until then.
        private: where private files are written until then (mode 0700); `partial` when no place was named.
        finished: unit name → what its journal line says.
        anew: what to tell whoever asked to go on where nothing was left to go on with; "" otherwise.
    """

    def __init__(
        self, out: Path, plan: str, force: bool = False, resume: bool = False, private: Path | None = None, mode: int = 0o777
    ) -> None:
        """Create the partial directories, or take up those that were left.

        Args:
            out: the directory to create.
            plan: hash of everything that decides the output's bytes.
            force: discard a partial directory left by another run, and replace `out` as far as it is ours.
            resume: continue from the journal when its plan is the same.
            private: a second directory to create, before `out` and together with it.
            mode: permissions of `out`, which the umask may narrow; files of a directory that is closed to others are too.

        Raises:
            OutputConflict: when another run holds it, when one was left and neither flag is given or it cannot be proven to
                be this one, and when something that is not ours is in the way.
        """
        self.out, self._force, self._file_mode = real(out), force, 0o644 & mode
        self.finished: dict[str, Unit] = {}
        self._stamps: dict[Path, tuple[int, ...]] = {}
        self._committed = self._resumed = False
        self._moves: list[tuple[Claim, Path]] = []
        try:
            claim = Claim(beside(self.out), mode)
            self._moves.append((claim, self.out))
            if _settled(claim, self.out):
                claim.identity = None
            if private is not None:
                self._moves.insert(0, (Claim(beside(real(private)), 0o700), real(private)))
            self._take(force, resume, plan)
        except BaseException:
            for claim, _ in self._moves:
                claim.release(keep=claim.identity is not None)
            raise
        self.partial, self.private = self._moves[-1][0].files, self._moves[0][0].files
        nothing = resume and not self.finished
        self.anew = f"{out}: a stopped run has left nothing to go on with here; begun anew" if nothing else ""

    def finish(self, unit: Unit) -> None:
        """Note that the files of a unit are complete."""
        for (claim, _), key in self._keyed():
            claim.check_held()
            for file in getattr(unit, key):
                self._stamps[claim.files / file.name] = _stamp(claim.files / file.name)
        self.finished[unit.unit] = unit
        self._append(unit.line)

    @property
    def owner(self) -> str:
        """The random id of this run, which stands in the owner files."""
        return self._moves[-1][0].owner or ""

    def expect(self, names: Sequence[Iterable[str]]) -> None:
        """Note files that other processes are going to make, in `partial` and in `private`."""
        for (claim, _), some in zip(reversed(self._moves), names, strict=False):
            for name in some:
                claim.note(name)

    def hand_over(self) -> None:
        """Keep nothing: another process has all that was finished here."""
        self._committed = True

    def check_inputs(self, sha256_of: Callable[[str], str | None]) -> None:
        """Forget the units of an earlier run that were made from other inputs than this run reads; call it before the work.

        Args:
            sha256_of: tells the hash of an input by its name in the records; None when there is no such input.
        """
        for name, unit in list(self.finished.items()):
            if any(sha256_of(file) != sha256 for file, sha256 in unit.inputs.items()):
                del self.finished[name]
        self._prune()
        self._resumed = False

    def commit(self, manifest: bytes, key: Path | None = None) -> None:
        """Write the manifest, hold every file against it, and make the outputs appear.

        Args:
            manifest: its bytes.
            key: signs it (checkpoint/signing.py); nobody when None.

        Raises:
            UsageError: when the key does not sign.
            OutputConflict: when something took an output's name meanwhile, or a file is not what was written.
        """
        if self._resumed:
            raise LiborthError(f"{self.out}: resumed without a look at the inputs; this is a bug, please report it")
        write_file(self.partial / MANIFEST, manifest, self._file_mode)
        signature = sign(manifest, key) if key else b""
        self._check(self.partial, MANIFEST)
        if signature:
            write_file(self.partial / (MANIFEST + SIGNED), signature, self._file_mode)
        if self.private != self.partial:
            if not any(walk(self.private)):
                self._moves.pop(0)[0].release(keep=False)
            else:
                self._check(self.private, PRIVATE)
        try:
            for claim, _ in self._moves:
                claim.check_held()
                claim.sync()
            self._append({"commit": [claim.content for claim, _ in self._moves]})
        except OSError as error:
            raise from_os(error, self.partial) from None
        self._put_in_place()
        self._committed = True

    def __enter__(self) -> Transaction:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Remove the partial directories when what stopped the run cannot be mended by running again."""
        hopeless = kind is not None and issubclass(kind, (BadInput, PairMismatch, UsageError))
        with contextlib.suppress(OSError):
            os.close(self._journal)
        keep = not (self._committed or hopeless or not self.finished)
        if isinstance(error, Stopped):
            error.kept = error.kept or keep
        for claim, _place in self._moves:
            keep = claim.release(keep)  # the journal, in the last of them, goes after all it tells of

    def _put_in_place(self) -> None:
        """Make all outputs appear, or none."""
        seen = [identity(os.lstat(claim.files)) for claim, _ in self._moves]
        try:
            for claim, place in self._moves:
                claim.close_files()
                _put(claim, place, self._force)
        except BaseException as error:
            _take_back(self._moves, seen)
            if isinstance(error, OSError):
                raise OutputConflict(f"{self.out}: cannot be put in place ({error.strerror})") from None
            raise
        for claim, place in self._moves:  # the outputs are there: what they replaced may wait for the next run
            with contextlib.suppress(OSError, OutputConflict):
                sync_folder(place.parent)
                _sweep(claim, place)

    def _keyed(self) -> list[tuple[tuple[Claim, Path], str]]:
        """Pair each claim with the field of a unit that names its files."""
        keys = ("private", "files") if len(self._moves) > 1 else ("files",)
        return list(zip(self._moves, keys, strict=True))

    def _take(self, force: bool, resume: bool, plan: str) -> None:
        claim, place = self._moves[-1][0], str(self._moves[0][1].absolute())
        left, owner = claim.identity is not None, claim.owner
        lost = [c for c, _ in self._moves if c.identity is not None and (left or c.owner != owner)]
        if lost and not (force or resume):
            raise OutputConflict(f"{claim.path}: a stopped run is here; continue it with --resume or discard it with --force")
        lines = _lines(claim) if left and resume else None
        if lines is not None:
            head = lines.head
            same = head is not None and (head.owner, head.private, head.plan) == (claim.identity, place, plan)
            if (head is None or head.owner != claim.identity) and not force:
                raise OutputConflict(f"{claim.path}: nothing proves what was finished here; discard it with --force")
            if head is not None and head.plan != plan and not force:
                if lines.commit:  # all it lacked was its last step
                    self._put_in_place()
                raise OutputConflict(
                    f"{claim.path}: the stopped run had other inputs or options; repeat them, or discard it with --force"
                )
            lines = lines if same else None
        name = (claim.identity if lines else None) or new_identity()
        for each, _ in self._moves:
            if lines and each.identity == name:
                each.discard(OLD)
            elif each not in lost or force or not each.holds_files:
                each.discard()
                each.sign(name)
            else:
                raise OutputConflict(f"{each.path}: a stopped run of another output is here; discard it with --force")
            each.open_files()
        self._begin(lines, {"owner": name, "plan": plan, "private": place})

    def _begin(self, lines: Lines | None, head: JsonObject) -> None:
        """Take the units of an earlier journal that can be proven, remove all other files, and write the journal anew."""
        for unit in lines.units if lines else ():
            if self._proven(unit):
                self.finished[unit.unit] = unit
        self._prune()
        self._resumed = any(unit.inputs for unit in self.finished.values())
        rows = [head, *(unit.line for unit in self.finished.values())]
        claim = self._moves[-1][0]
        self._journal = claim.write(JOURNAL, json_lines(rows))

    def _prune(self) -> None:
        for (claim, _), key in self._keyed():
            claim.prune({file.name for unit in self.finished.values() for file in getattr(unit, key)})

    def _proven(self, unit: Unit) -> bool:
        """Tell whether all files of a unit are there and hash as its record says."""
        try:
            for (claim, _), key in self._keyed():
                for file in getattr(unit, key):
                    path = claim.files / file.name
                    if path.stat().st_size != file.size or hash_file(path).sha256 != file.sha256:
                        return False
                    self._stamps[path] = _stamp(path)
        except (OSError, BadInput):
            return False
        return True

    def _check(self, folder: Path, manifest: str) -> None:
        """Hold what lies in a directory against its manifest: nothing missing, nothing more, every hash.

        A large file whose times and inode are those it had when it was hashed is not read a second time.
        """
        known = listed(folder / manifest)
        if known is None:
            files = [file for unit in self.finished.values() for file in unit.private]
            known = {file.name: (file.size, file.sha256) for file in files}
        for name, is_file in walk(folder):
            expected = name in known or name == manifest or name.split(os.sep)[0] in LASTING
            if not is_file or not (expected or (manifest == PRIVATE and is_guard(folder, name))):
                raise OutputConflict(f"{folder / name}: was not written by this run; move it away and --resume")
        for name, (size, sha256) in known.items():
            path = folder / name
            try:
                same = os.lstat(path).st_size == size
                if same and (size <= REREAD or self._stamps.get(path) != _stamp(path)):
                    same = hash_file(path).sha256 == sha256
            except OSError:
                same = False
            if not same:
                raise OutputConflict(f"{path}: is not what was written; something else writes here, or the disk is failing")

    def _append(self, line: JsonObject) -> None:
        try:
            write_all(self._journal, json_lines([line]))
            os.fsync(self._journal)
        except OSError as error:
            raise from_os(error, self._moves[-1][0].path / JOURNAL) from None


def settle(out: Path) -> None:
    """Finish or undo a commit of `out` that was cut short; do nothing when there is none.

    Raises:
        OutputConflict: when a run is at work there, or what lies beside `out` is not ours.
    """
    out = real(out)
    if os.path.lexists(beside(out)):
        claim = Claim(beside(out))
        nothing = claim.identity is None and not _lines(claim).count  # all that a kill at the very beginning or end has left
        claim.release(keep=not (_settled(claim, out) or nothing))


def _settled(claim: Claim, out: Path) -> bool:
    """Undo a commit that did not get to `out`, and return False; or clear up behind one that did, and return True."""
    lines = _lines(claim) if claim.identity is not None else None
    if lines is None or lines.head is None or not lines.commit or lines.head.owner != claim.identity:
        return False
    moves, seen, done = [(claim, out)], lines.commit, False
    with contextlib.ExitStack() as stack:
        if len(seen) > 1:
            place = Path(lines.head.private)
            other = Claim(beside(place), 0o700)
            stack.callback(lambda: other.release(keep=not done) and None)
            moves.insert(0, (other, place))
        done = _is(out, seen[-1])
        if done:
            for each, place in moves:
                _sweep(each, place)
            claim.discard()
        else:
            _take_back(moves, seen)
    return done


def _put(claim: Claim, place: Path, force: bool) -> None:
    """Make the files of a claim appear as `place`, in exchange for an old output of ours."""
    if os.path.lexists(place):
        _check_ours(place, place, force)
    exchange.put(claim.files, place, claim.path / OLD)
    for old in (claim.files, claim.path / OLD):
        if os.path.lexists(old):
            _check_ours(old, place, force)


def _check_ours(folder: Path, place: Path, force: bool) -> None:
    """Refuse to replace what is not ours, or what nobody allowed to replace."""
    if folder.is_symlink() or not folder.is_dir():
        raise OutputConflict(f"{place}: appeared while this run was working; it is left as it is")
    if is_prepared(folder):
        return
    if not force:
        raise OutputConflict(f"{place}: appeared while this run was working; it is left as it is")
    if name := foreign(folder):
        raise OutputConflict(f"{place / name}: was not written by liborth, or was changed since; it is left as it is")


def _take_back(moves: list[tuple[Claim, Path]], seen: list[tuple[int, int]]) -> None:
    """Undo what a commit has done so far, last things first."""
    for (claim, place), new in reversed(list(zip(moves, seen, strict=True))):
        aside = claim.path / OLD
        if _is(place, new):
            exchange.take_back(claim.files, place, aside)
        elif os.path.lexists(aside) and not os.path.lexists(place):
            os.rename(aside, place)


def _sweep(claim: Claim, place: Path) -> None:
    """Remove the old output that a commit left behind; what outlives it goes over to the new one."""
    for name in (FILES, OLD):
        old = claim.path / name
        if os.path.lexists(old):
            for lasting in LASTING:
                if os.path.lexists(old / lasting) and not is_idle(old / lasting) and not os.path.lexists(place / lasting):
                    os.rename(old / lasting, place / lasting)
            if not is_prepared(old) and (found := foreign(old)):
                raise OutputConflict(f"{old / found}: was not written by liborth; move it away")
            claim.destroy(name)


def _is(place: Path, seen: tuple[int, int]) -> bool:
    try:
        return identity(os.lstat(place)) == tuple(seen)
    except OSError:
        return False


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what changes when anybody writes to a file: both times, size and inode."""
    facts = os.lstat(path)
    return facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size, facts.st_ino


def _lines(claim: Claim) -> Lines:
    return Lines(claim.read(JOURNAL, 1 << 32) or b"")
