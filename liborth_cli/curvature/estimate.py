"""A whole estimate: rows through the model, sums to disk group by group, factors in place at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from liborth_cli import manifest
from liborth_cli.checkpoint import layout
from liborth_cli.checkpoint.hashing import BackgroundHasher
from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.checkpoint.writer import write_file
from liborth_cli.console import Console, Progress
from liborth_cli.curvature import factors as shards
from liborth_cli.curvature.collect import FactorCollector, MomentCollector, unseen
from liborth_cli.curvature.describe import describe_layers, model_hash
from liborth_cli.curvature.factors import GRADIENT_COVARIANCE, INPUT_COVARIANCE, STEM, VECTORS, Sums
from liborth_cli.curvature.plan import MOST_TOKENS, CurvatureOptions, Resources, disk_bytes, plan
from liborth_cli.curvature.selection import choose
from liborth_cli.errors import BadInput, OutOfResources, UsageError
from liborth_cli.machine import Run, process_bytes
from liborth_cli.stream.batches import Batch, batches, groups
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.store import FileStore, MemoryStore
from liborth_cli.stream.tap import activation_dtype, arithmetic
from liborth_cli.stream.texts import DataFile, DataSummary, Row
from liborth_cli.stream.walk import Losses, walk_exact, walk_resident, walk_streamed
from liborth_cli.stream.weights import Point

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Estimator:
    """A planned estimate of one model's curvature; `write` carries it out.

    Attributes:
        model: the model.
        rows: what it reads.
        options: what is computed.
        chosen: stage → sites and their targets.
        left_out: stored tensors without factors, with the reason.
        plan: how the work is cut up.
    """

    def __init__(
        self, point: Point, model: BlockModel, rows: Sequence[Row], options: CurvatureOptions, resources: Resources, run: Run
    ) -> None:
        """Plan everything from shapes.

        Raises:
            OutOfResources: when the memory does not hold one block and one row.
            UsageError: when the options do not fit the model.
        """
        self.point, self.model, self.rows, self.options, self.resources, self.run = point, model, rows, options, resources, run
        self.chosen, self.left_out = choose(model, options.tensors, options.per_head, options.full_head)
        self.targets = {stage: [t for _, ts in sites for t in ts] for stage, sites in self.chosen.items()}
        lengths = [row.tokens for row in rows]
        self._check_exact()
        if options.per_token and sum(lengths) > MOST_TOKENS:
            raise UsageError(
                f"--per-token keeps every token, and these are {sum(lengths):,}, more than {MOST_TOKENS:,}; read fewer with "
                "--tokens, or use the factors alone, with --method contrastive"
            )
        if options.per_token and options.bases:
            raise UsageError("--per-token keeps tokens in place of covariances: leave out --eigen and --moments exact")
        self.plan = plan(model, self.targets, options, self.resources, lengths)
        if not self.plan.group_tokens:
            raise OutOfResources(
                f"--memory: one block and one row of {max(lengths):,} tokens need about "
                f"{(self.plan.needed + process_bytes()) / 1e9:.2f} GB in all, more than allowed; raise it, keep block inputs "
                "on disk with --scratch, or choose fewer matrices with --tensors"
            )
        self.groups = list(groups(rows, self.plan.group_tokens))

    @property
    def disk_bytes(self) -> int:
        """Upper bound of what will be written, intermediate sums included."""
        positions = sum(row.tokens for row in self.rows)
        return disk_bytes(self.targets, self.options, positions) * (2 if len(self.groups) > 1 else 1) + (1 << 20)

    def fingerprint(self, data: dict[str, Any]) -> str:
        """Hash everything that decides the numbers, for --resume."""
        sides = [side for side in (self.point.finetuned, self.point.reference) if side is not None]
        inputs = [[s.identity for s in side.shards.values()] for side in sides]
        cut = [len(self.groups), self.plan.resident, str(self.run.device), self.run.kernels]
        seen = json.dumps([inputs, asdict(self.options), data["sha256"], cut, manifest.new("curvature")], sort_keys=True)
        return hashlib.sha256(seen.encode()).hexdigest()

    def write(
        self, out: Path, files: Sequence[DataFile], sources: tuple[Source, Source | None], console: Console
    ) -> dict[str, Any]:
        """Carry the plan out.

        Args:
            out: directory to create.
            files: where the rows came from.
            sources: where the model and the reference came from.
            console: where progress goes.

        Returns:
            The manifest that was written.

        Raises:
            LiborthError: the leaf says which; `out` is then absent or what it was before.
        """
        hasher = BackgroundHasher()
        for side in (self.point.finetuned, self.point.reference):
            for shard in side.shards.values() if side is not None else ():
                hasher.ask(shard.path)
        data = asdict(DataSummary.of(files, self.rows))
        passes = self.options.passes
        steps = len(passes) * (1 if self.plan.resident else 2 * len(self.model.blocks))
        with Transaction(out, self.fingerprint(data), self.run.force, self.run.resume) as transaction:
            self._transaction, self._hasher = transaction, hasher
            transaction.check_inputs(lambda name: self._inputs().get(name))
            with console.progress("curvature", data["tokens"] * steps, unit="tokens", per=steps) as progress:
                if self.plan.resident:
                    self.model.load_all()
                for name in passes:
                    self._pass(name, progress, steps // len(passes))
            document = self._finish(transaction, sources, hasher, data)
            transaction.commit(manifest.dump(document))
        return document

    def _pass(self, name: str, progress: Progress, steps: int) -> None:
        transaction = self._transaction
        collector = self._collector(name, transaction.partial)
        done = [k for k in range(len(self.groups)) if _unit(name, k) in transaction.finished]
        start = done[-1] + 1 if done else 0
        record = transaction.finished[_unit(name, done[-1])] if done else None
        if record is not None and isinstance(collector, FactorCollector):
            collector.tokens.update(record["tokens"])
            collector.shared.update(record["shared"])
        progress.skip(steps * sum(row.tokens for group in self.groups[:start] for row in group))
        for k in range(start, len(self.groups)):
            record = self._group(name, k, collector, record, progress)

    def _group(
        self,
        name: str,
        k: int,
        collector: FactorCollector | MomentCollector,
        earlier: dict[str, Any] | None,
        progress: Progress,
    ) -> dict[str, Any]:
        """Walk one group, write the sums of all groups so far (the means, when it is the last), and journal them."""
        transaction, last = self._transaction, k == len(self.groups) - 1
        seed = self.options.seed if self.options.fisher == "sampled" else None
        some = batches(self.groups[k], self.plan.batch_tokens, seed, self.run.device)
        before = earlier["stages"] if earlier else {}
        written: dict[str, Any] = {}

        def finished(stage: str) -> None:
            sums = collector.take(stage)
            if stage in before:
                sums = shards.add(transaction.partial / before[stage]["name"], sums)
            if not sums:
                return
            if last:
                sums = self._average(sums, name, collector)
            file = shards.final_name(name, stage) if last else f"group-{name}-{k:06d}-{stage}.safetensors"
            written[stage] = shards.write(transaction.partial / file, sums)

        with arithmetic(self.model.dtype):
            losses = self._walk(some, collector, finished, progress.advance)
        total, count = earlier["losses"] if earlier else (0.0, 0)
        record = {
            "files": list(written.values()),
            "inputs": self._inputs(),
            "stages": written,
            "tokens": dict(collector.tokens),
            "shared": dict(collector.shared) if isinstance(collector, FactorCollector) else {},
            "losses": [total + losses.total, count + losses.tokens],
        }
        transaction.finish(_unit(name, k), record)
        # Only now: a kill before the journal line leaves the earlier sums to resume from.
        for old in before.values():
            (transaction.partial / old["name"]).unlink(missing_ok=True)
        return record

    def _collector(self, name: str, partial: Path) -> FactorCollector | MomentCollector:
        dtype = torch.float64 if self.options.dtype == "float64" else torch.float32
        if name == "factors":
            o = self.options
            return FactorCollector(self.chosen, self.run.device, o.moments == "marginal", o.diagonal, dtype, o.per_token)
        return MomentCollector(self.chosen, self.run.device, lambda layer: self._basis(partial, layer), dtype)

    def _basis(self, partial: Path, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        record = self._factor_record
        stage = next(t.stage for group in self.targets.values() for t in group if t.name == layer)
        wide = torch.float64 if self.options.dtype == "float64" else torch.float32
        file = partial / record["stages"][stage]["name"]
        found = shards.read(file, [VECTORS + INPUT_COVARIANCE + record["shared"][layer], VECTORS + GRADIENT_COVARIANCE + layer])
        q_a, q_g = (found[key].to(self.run.device, wide) for key in found)
        return q_a, q_g

    def _average(self, sums: Sums, name: str, collector: FactorCollector | MomentCollector) -> Sums:
        tokens = collector.tokens if isinstance(collector, FactorCollector) else self._factor_record["tokens"]
        return shards.average(sums, tokens, self.options.bases and name == "factors")

    def _walk(
        self,
        some: list[Batch],
        collector: FactorCollector | MomentCollector,
        finished: Callable[[str], None],
        advance: Callable[[int], None],
    ) -> Losses:
        model = self.model
        if self.options.fisher == "exact":
            losses = walk_exact(model, some, collector, advance)
        elif self.plan.resident:
            losses = walk_resident(model, some, collector, advance)
        else:
            levels, width = len(model.blocks) + 1, activation_dtype(model.dtype).itemsize
            store = MemoryStore()
            if self.resources.scratch is not None:
                sizes = [batch.tokens * model.hidden * width for batch in some]
                store = FileStore(self.resources.scratch, sizes, levels)
            try:
                return walk_streamed(model, some, collector, store, finished, advance)
            finally:
                store.close()
        for stage in model.stages:
            finished(stage)
        return losses

    def _inputs(self) -> dict[str, str]:
        """Hash the weights that every sum is made from."""
        sides = {"model": self.point.finetuned, "reference": self.point.reference}
        shards = {f"{name}/{s.name}": s.path for name, side in sides.items() if side for s in side.shards.values()}
        return {name: self._hasher.wait(path).sha256 for name, path in shards.items()}

    def _check_exact(self) -> None:
        if self.options.fisher != "exact":
            return
        if self.options.per_token:
            raise UsageError("--per-token keeps one gradient a token, and --fisher exact has one for every label")
        if self.model.vocabulary > self.options.exact_vocabulary:
            raise UsageError(
                "--fisher exact runs one backward pass for each position and label, and this model has "
                f"{self.model.vocabulary:,} labels; --fisher sampled estimates the same, or allow it with "
                f"--exact-vocabulary {self.model.vocabulary}"
            )
        if self.resources.weights == "stream":
            raise UsageError("--fisher exact needs the whole model in memory: its many backward passes share one forward pass")
        self.resources = replace(self.resources, weights="resident")

    def _finish(
        self, transaction: Transaction, sources: tuple[Source, Source | None], hasher: BackgroundHasher, data: dict[str, Any]
    ) -> dict[str, Any]:
        hashes = hasher.collect()
        sides = {"model": (self.point.finetuned, sources[0])}
        if self.point.reference is not None and sources[1] is not None:
            sides["reference"] = (self.point.reference, sources[1])
        inputs = {side: manifest.Input.of(*found, hashes).model_dump() for side, found in sides.items()}
        factors = self._factor_record
        records = [transaction.finished[_unit(name, len(self.groups) - 1)] for name in self.options.passes]
        targets = [target for stage in self.model.stages for target in self.targets[stage]]
        layers = describe_layers(targets, factors["shared"], factors["tokens"])
        if not layers:
            raise BadInput(f"{type(self.model.model).__name__}: none of its matrices is used in a way that is understood")
        outputs = [written for record in records for written in record["files"]]
        kept = {written["name"] for written in outputs}
        for stray in transaction.partial.iterdir():
            if stray.name not in kept:
                stray.unlink()
        names = {w["name"]: shards.names(transaction.partial / w["name"]) for w in outputs}
        index = layout.index(names, sum(int(w["size"]) for w in outputs))
        outputs.append(write_file(transaction.partial / f"{STEM}.safetensors.index.json", index).to_json())
        loss, count = factors["losses"]
        return manifest.new(
            "curvature",
            parameters={key: value for key, value in asdict(self.options).items() if key != "group_tokens"},
            inputs=inputs,
            model_sha256=model_hash(inputs, self.options.at),
            data=[data],
            layers=layers,
            left_out={**self.left_out, **unseen(self.chosen, layers)},
            totals={
                "tokens": sum(row.weight * row.tokens for row in self.rows),
                "loss": loss / max(count, 1),
                "loss_tokens": count,
            },
            machine={**self.run.machine, "resident": self.plan.resident},
            outputs=sorted(outputs, key=lambda w: w["name"]),
        )

    @property
    def _factor_record(self) -> dict[str, Any]:
        return self._transaction.finished[_unit("factors", len(self.groups) - 1)]


def _unit(name: str, group: int) -> str:
    return f"{name}/{group}"
