"""The curvature passes that a split needs, run by the split itself; the factor sets lie where private data do."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Container, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from liborth_cli import manifest
from liborth_cli.checkpoint import cache
from liborth_cli.checkpoint.files import hash_file
from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.outputs import check_space
from liborth_cli.checkpoint.private import DECOYS, FACTORS, KEY, identity, is_begun, prepare_factors, remove_empty
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import Console, size
from liborth_cli.curvature.estimate import Estimator
from liborth_cli.curvature.plan import CurvatureOptions, Resources
from liborth_cli.curvature.together import HeldPass, Together, held_bytes
from liborth_cli.errors import (
    BadInput,
    LiborthError,
    OutOfResources,
    OutputConflict,
    PairMismatch,
    UsageError,
    VerificationFailed,
)
from liborth_cli.machine import Run, available_bytes, process_bytes
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.sizes import free_bytes
from liborth_cli.stream.texts import DataFile, Row, data_hash
from liborth_cli.stream.weights import Point, Weights
from liborth_cli.tune.options import Arithmetic

KINDS = ("retain", "forget", "edit")
HALF = (0.5,)
"""Where forget curvature is taken: at the fine-tuned point what was memorised is certain, and its Fisher has vanished."""
QUARTERS = (0.25, 0.5, 0.75)
"""Where single tokens are taken: what is forgotten at several points of the path does not come back as fast."""


@dataclass(frozen=True)
class Pass:
    """One curvature pass.

    Attributes:
        kind: "retain" or "forget".
        rows: what it is taken on.
        files: where the rows came from.
        options: the point, the labels, and what else to measure.
    """

    kind: str
    rows: Sequence[Row]
    files: Sequence[DataFile]
    options: CurvatureOptions

    @property
    def tokens(self) -> int:
        """Positions it reads."""
        return sum(row.tokens for row in self.rows)

    @property
    def read(self) -> str:
        """What it reads."""
        return f"{self.kind} factors: {len(self.rows):,} rows, {self.tokens:,} tokens"

    @property
    def title(self) -> str:
        """What it reads, and where on the path."""
        return f"{self.read}, at {'the fine-tuned point' if self.options.at == 1.0 else f'{self.options.at:g} of the path'}"


@dataclass(frozen=True)
class Planned:
    """What a pass would read and write.

    Attributes:
        rows: how many.
        tokens: how many, in all of them.
        cached: it was run before.
        disk_bytes: what it writes at most.
        at: where on the path.
    """

    rows: int
    tokens: int
    cached: bool
    disk_bytes: int
    at: float

    def words(self, stored: bool) -> str:
        """Say it in words.

        Args:
            stored: whether the factors are written, or used block by block as they are measured.
        """
        todo = f"to be measured, at most {size(self.disk_bytes)}"
        if self.cached:
            todo = "found, used again"
        elif not stored:
            todo = f"measured block by block while it divides, not stored (a stored set: at most {size(self.disk_bytes)})"
        return f"factors on {self.rows:,} rows, {self.tokens:,} tokens: {todo}"


@dataclass
class Passes:
    """Runs passes, or finds that they were run before.

    Attributes:
        folder: where the factor sets are kept, 0700.
        reference: W_r.
        finetuned: W_f.
        sources: where both came from.
        model: scores and steps, in float32.
        measured: the same model for the passes, where products with weights may be narrower.
        run: device, threads, resume.
        console: where progress goes.
        used: sets that this run made or found.
    """

    folder: Path
    reference: Checkpoint
    finetuned: Checkpoint
    sources: tuple[Source | None, Source]
    model: BlockModel
    measured: BlockModel
    run: Run
    console: Console
    used: list[Path] = field(default_factory=list)

    def lasts(self, job: Pass) -> bool:
        """Tell whether a set is kept for other runs: factors of retain rows, where the user named a cache; nothing else is.

        Ranks on several machines may not see one cache, so they keep none.
        """
        public = job.kind == "retain" and not (job.options.is_private or any(file.secret for file in job.files))
        return public and cache.is_chosen() and self.run.world.size == 1

    def found(self, job: Pass) -> Path | None:
        """Return the factor set of a pass that was run before, or None."""
        if self.lasts(job) and (cache.place() / cache.FACTORS).is_dir() and (kept := self._kept(self._lasting_place(job))):
            return kept
        if not self.run.world.broadcast(self.folder.is_dir()):
            return None
        path = self._place(job)
        return path if self.run.world.broadcast((path / manifest.FILE).is_file()) else None

    def plan(self, job: Pass, cached: bool) -> Planned:
        """Say what `run_pass` would do; `cached` tells whether it would find the set."""
        disk = self._estimator(job).disk_bytes
        return Planned(rows=len(job.rows), tokens=job.tokens, cached=cached, disk_bytes=disk, at=job.options.at)

    def run_pass(self, job: Pass) -> Path:
        """Return the factor set's directory; the factors are measured unless they are there already.

        Raises:
            LiborthError: the leaf says which.
        """
        if found := self.found(job):
            self.console.note(f"{job.kind} factors: reusing {found}")
            self.used += [] if self.lasts(job) else [found]
            return found
        if self.lasts(job):
            try:
                return self._measure(job, self._lasting_place(job))
            except (OutputConflict, OutOfResources) as error:
                self.console.note(f"these factors are not kept for other runs: {error}")
        if self.run.world.size > 1 and self.run.gather:
            raise UsageError("--gather: these factors are stored, and all ranks read them: put -o on a file system they share")
        if self.run.world.first:
            prepare_factors(self.folder)
        path = self._place(job)
        self.used.append(path)
        return self._measure(job, path)

    def measure_at(self, weights: Weights, job: Pass, path: Path) -> Path:
        """Return factors at other weights of the fine-tuned model's shapes; they are measured unless they are there already.

        Args:
            weights: what is measured. The set does not say so: it is for whoever made them, who names and deletes it.
            job: the rows, and how.
            path: of the set, in a private directory that stands for these weights.
        """
        return path if (path / manifest.FILE).is_file() else self._measure(job, path, weights)

    def _measure(self, job: Pass, path: Path, weights: Weights | None = None) -> Path:
        """Write a factor set, of the pair's own weights where there are no others."""
        self.console.note(f"{job.title if weights is None else job.read} (private, in {path})")
        estimator = self._estimator(job)
        if weights is not None:
            self.measured.use(weights)
        if self.run.world.first:
            check_space(path, estimator.disk_bytes)
        estimator.write(path, job.files, (self.sources[1], self.sources[0] if job.options.at != 1.0 else None), self.console)
        return path

    def together(self, jobs: Sequence[Pass], stack: ExitStack) -> Together | None:
        """Return a walk in which passes are run side by side, their factors never stored; None where memory does not do.

        Where block inputs do not fit, they wait in an unlinked file: those of the retain rows first. Those of rows to forget do
        so in the private folder alone, where all of their tokens would be stored otherwise.

        Args:
            jobs: the passes.
            stack: closes the model that they are run with.
        """
        if self.run.world.first:
            prepare_factors(self.folder)  # the key that names them lies there
        model = BlockModel(Point(self.finetuned), self.measured.dtype, self.run.device, prefetch=len(jobs) == 1)
        stack.callback(model.close)
        device = self.run.device
        room = self._memory - process_bytes() if device.type == "cpu" else free_bytes(device) // 2
        single = self.run.world.size == 1
        scratch = self.folder if single else Path(tempfile.gettempdir())
        for kinds in ((), ("retain",), ("retain", "forget"))[: 3 if single else 2]:
            try:
                held = [self._held(job, model, scratch if job.kind in kinds else None) for job in jobs]
            except OutOfResources:
                continue
            fits = all(len(one.job.groups) == 1 for one in held) and sum(map(held_bytes, held)) <= room
            if all(self.run.world.share(fits)):
                for job in jobs:
                    self.console.note(f"{job.title} (block by block, not stored)")
                return Together(held)
        self.console.note("the factors of all passes do not fit into memory side by side: they are stored, and deleted after")
        return None

    def expected(self, job: Pass) -> HeldPass:
        """Return a pass that is only looked at: what it would hold, and what it would cost. Nothing is written."""
        with tempfile.TemporaryDirectory(prefix="liborth-") as folder:  # for the key that names it
            return replace(self, folder=Path(folder))._held(job, self.measured, None)

    @property
    def dtype(self) -> str:
        """Of products with weights in the passes, as `CurvatureOptions` names it."""
        return str(self.measured.dtype).removeprefix("torch.")

    @property
    def training(self) -> Arithmetic:
        """Of products with weights where steps of `recall` and students train."""
        return Arithmetic.BFLOAT16 if self.dtype == "bfloat16" else Arithmetic.FLOAT32

    @property
    def left(self) -> bool:
        """Whether a run that is stopped now leaves something to go on with: a whole set, or steps."""
        return any(path.is_dir() and any(path.iterdir()) for path in self.used)

    def discard(self, kind: type[BaseException] | None) -> None:
        """Delete the sets of this run, and the decoys; a run that was stopped keeps them for --resume.

        Args:
            kind: of the error that ended the run, or None.
        """
        if not self.run.world.first:
            return
        if kind is not None and not issubclass(kind, (BadInput, PairMismatch, UsageError, VerificationFailed)):
            return
        for path in self.used:
            shutil.rmtree(path, ignore_errors=True)
        (self.folder / DECOYS).unlink(missing_ok=True)
        if not any(path.name.startswith(KINDS) for path in self.folder.glob("*/")):
            for name in os.listdir(self.folder) if self.folder.exists() else ():
                if name == KEY or is_begun(self.folder, name):  # it names no set any more
                    (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()
            if self.folder.name == FACTORS:
                remove_empty(self.folder.parent)

    def _lasting_place(self, job: Pass) -> Path:
        """Return where a set for other runs belongs: its name stands for the weights' hashes."""
        folder = cache.folder(cache.FACTORS)
        return folder / _name(
            folder, job, [self._hashes, self.finetuned.config, str(self.measured.dtype), str(self.run.device)]
        )

    @cached_property
    def _hashes(self) -> list[str]:
        """Hashes of the weights' files."""
        return [hash_file(shard.path).sha256 for shard in self.finetuned.shards.values()]

    def _kept(self, path: Path) -> Path | None:
        """Return a set in the cache if every file in it is what its manifest says; what is damaged is told of, and removed."""
        if not path.is_dir():
            return None
        try:
            if all(hash_file(path / file.name).sha256 == file.sha256 for file in manifest.read(path).outputs):
                return path
        except LiborthError:
            pass
        self.console.warn(f"{path}: damaged; these factors are measured anew")
        shutil.rmtree(path)
        return None

    def _place(self, job: Pass) -> Path:
        """Return where a factor set belongs: its name stands for the files of weights."""
        sides = (self.finetuned, self.reference) if job.options.at != 1.0 else (self.finetuned,)
        inputs = [[shard.identity for shard in side.shards.values()] for side in sides]
        return self.folder / self.run.world.broadcast(_name(self.folder, job, inputs) if self.run.world.first else "")

    def _held(self, job: Pass, model: BlockModel, scratch: Path | None) -> HeldPass:
        point = self._point(job)
        model.use(point)
        resources = Resources(self._memory, scratch, weights="stream")
        estimator = Estimator(point, model, job.rows, job.options, resources, self.run)
        sides = {"model": (self.finetuned, self.sources[1])}
        if point.reference is not None and self.sources[0] is not None:
            sides["reference"] = (point.reference, self.sources[0])
        return HeldPass(
            job.kind,
            job=estimator,
            data=manifest.Data.model_validate(self.run.world.broadcast(self._data(estimator, job))),
            sides=sides,
            place=self._place(job),
            scratch=scratch,
        )

    @property
    def _memory(self) -> int:
        """Bytes of host memory for this process: the ranks of one machine share it."""
        return available_bytes() // self.run.world.siblings

    def _data(self, estimator: Estimator, job: Pass) -> Any:
        return estimator.data(job.files, self.folder).model_dump() if self.run.world.first else None

    def _point(self, job: Pass) -> Point:
        return Point(self.finetuned, self.reference if job.options.at != 1.0 else None, job.options.at)

    def _estimator(self, job: Pass) -> Estimator:
        point = self._point(job)
        self.measured.use(point)
        # What an earlier run left under this name is the same work, to be gone on with or begun again.
        run = replace(self.run, force=not self.run.resume or self.lasts(job))
        return Estimator(point, self.measured, job.rows, job.options, Resources(self._memory), run)


def _name(folder: Path, job: Pass, weights: Sequence[Any]) -> str:
    """Name a factor set after all that decides its numbers, under a key that lies in the folder.

    A plain hash of rows would let whoever reads the name find a short secret by counting.
    """
    maker = manifest.Maker(kind="curvature").model_dump()
    seen = json.dumps([weights, asdict(job.options), data_hash(job.rows), maker], sort_keys=True, default=str)
    return f"{job.kind}-{identity(folder, seen.encode())[:16]}"


def retain_options(needs: Sequence[str], seed: int, dtype: str) -> CurvatureOptions:
    """Return how retain curvature is measured: at the fine-tuned point, with labels drawn from the model.

    Args:
        needs: what the methods need of it.
        seed: of the labels.
        dtype: of products with weights.
    """
    moments = "marginal" if "moments" in needs else "none"
    return CurvatureOptions("sampled", moments=moments, diagonal="diagonal" in needs, seed=seed, dtype=dtype)


def forget_options(needs: Container[str], alone: bool, dtype: str = "float32") -> list[CurvatureOptions]:
    """Return how forget curvature is measured: on the path, with the real labels; one pass for each point.

    Args:
        needs: what the methods need of it.
        alone: there is no path; the model itself is the only point there is.
        dtype: of products with weights.
    """
    single = "tokens" in needs
    points = (1.0,) if alone else QUARTERS if single else HALF
    return [CurvatureOptions("empirical", at=at, per_token=single, dtype=dtype) for at in points]
