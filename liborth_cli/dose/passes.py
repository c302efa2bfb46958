"""Curvature passes that a split needs, run by the split itself and kept beside its output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from liborth_cli import manifest
from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.outputs import check_space
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import Console, size
from liborth_cli.curvature.estimate import Estimator
from liborth_cli.curvature.plan import MOST_TOKENS, CurvatureOptions, Resources
from liborth_cli.machine import Run, available_bytes
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import DataFile, Row, data_hash
from liborth_cli.stream.weights import Point

HALF = (0.5,)
"""Where forget curvature is taken: at the fine-tuned point what was memorised is certain, and its Fisher has vanished."""
QUARTERS = (0.25, 0.5, 0.75)
"""Where single tokens are taken: what is forgotten at several points of the path does not come back as fast."""


@dataclass
class Passes:
    """Runs passes, or finds that they were run before.

    Attributes:
        folder: where the factor sets are kept.
        reference: W_r.
        finetuned: W_f.
        sources: where both came from.
        model: to run the passes with.
        run: device, threads, resume.
        console: where progress goes.
    """

    folder: Path
    reference: Checkpoint
    finetuned: Checkpoint
    sources: tuple[Source | None, Source]
    model: BlockModel
    run: Run
    console: Console

    def place(self, kind: str, rows: Sequence[Row], options: CurvatureOptions) -> Path:
        """Return where a factor set belongs; everything that decides its numbers is in its name."""
        sides = (self.finetuned, self.reference) if options.at != 1.0 else (self.finetuned,)
        inputs = [[shard.identity for shard in side.shards.values()] for side in sides]
        seen = json.dumps([inputs, asdict(options), data_hash(rows), manifest.new("curvature")], sort_keys=True)
        return self.folder / f"{kind}-{hashlib.sha256(seen.encode()).hexdigest()[:12]}"

    def plan(self, kind: str, rows: Sequence[Row], options: CurvatureOptions) -> tuple[str, dict[str, object]]:
        """Say what `run_pass` would do, as a line of text and as data."""
        path, tokens = self.place(kind, rows, options), sum(row.tokens for row in rows)
        cached = (path / manifest.FILE).is_file()
        job = self._estimator(rows, options)
        todo = f"at {path}, reused" if cached else f"to be measured into {path}, at most {size(job.disk_bytes)}"
        text = f"{kind} factors on {len(rows):,} rows, {tokens:,} tokens: {todo}"
        document = {"rows": len(rows), "tokens": tokens, "cached": cached, "disk_bytes": job.disk_bytes, "at": options.at}
        return text, document

    def run_pass(self, kind: str, rows: Sequence[Row], files: Sequence[DataFile], options: CurvatureOptions) -> Path:
        """Return the factors of some rows, measuring them unless they are there already.

        Args:
            kind: "retain" or "forget": the beginning of the set's name.
            rows: what the curvature is taken on.
            files: where the rows came from.
            options: the point, the labels, and what else to measure.

        Returns:
            The factor set's directory.

        Raises:
            LiborthError: the leaf says which.
        """
        path = self.place(kind, rows, options)
        if (path / manifest.FILE).is_file():
            self.console.note(f"{kind} factors: reusing {path}")
            return path
        tokens = sum(row.tokens for row in rows)
        where = "the fine-tuned point" if options.at == 1.0 else f"{options.at:g} of the path"
        self.console.note(f"{kind} factors: {len(rows):,} rows, {tokens:,} tokens, at {where}, kept in {path}")
        job = self._estimator(rows, options)
        check_space(path, job.disk_bytes)
        other = self.sources[0] if options.at != 1.0 else None
        job.write(path, files, (self.sources[1], other), self.console)
        return path

    def _estimator(self, rows: Sequence[Row], options: CurvatureOptions) -> Estimator:
        point = Point(self.finetuned, self.reference if options.at != 1.0 else None, options.at)
        self.model.use(point)
        # What an earlier run left under this name is the same work, to be gone on with or begun again.
        run = replace(self.run, force=not self.run.resume)
        return Estimator(point, self.model, rows, options, Resources(available_bytes()), run)


def retain_options(needs: Sequence[str], seed: int) -> CurvatureOptions:
    """Return how retain curvature is measured: at the fine-tuned point, with labels drawn from the model.

    Args:
        needs: what the methods need of it.
        seed: of the labels.
    """
    return CurvatureOptions(
        "sampled", moments="marginal" if "moments" in needs else "none", diagonal="diagonal" in needs, seed=seed
    )


def forget_options(needs: Container[str], alone: bool, tokens: int) -> list[CurvatureOptions]:
    """Return how forget curvature is measured: on the path, with the real labels; one pass for each point.

    Args:
        needs: what the methods need of it.
        alone: there is no path; the model itself is the only point there is.
        tokens: how many tokens there are to forget; single ones are taken at one point where three are too many.
    """
    single = "tokens" in needs
    points = (1.0,) if alone else QUARTERS if single and tokens * len(QUARTERS) <= MOST_TOKENS else HALF
    return [CurvatureOptions("empirical", at=at, per_token=single) for at in points]
