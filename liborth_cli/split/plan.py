"""A whole split: planned from headers, carried out file by file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from liborth_cli import manifest
from liborth_cli.card import split_card
from liborth_cli.checkpoint import config, delta, layout, private, sidecars
from liborth_cli.checkpoint.hashing import BackgroundHasher
from liborth_cli.checkpoint.hub import Source
from liborth_cli.checkpoint.pair import Action, Item, match
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.checkpoint.views import Origin
from liborth_cli.checkpoint.writer import Written, write_file
from liborth_cli.console import Console
from liborth_cli.curvature.factors import FactorSet
from liborth_cli.machine import Run
from liborth_cli.methods import METHODS
from liborth_cli.split.ahead import ahead
from liborth_cli.split.belong import points
from liborth_cli.split.divide import Divider, Job, Skill
from liborth_cli.split.factors import FactorSource
from liborth_cli.split.matrix import SplitOptions
from liborth_cli.split.routing import route
from liborth_cli.split.shard import ShardJob


class Splitter:
    """A planned split of one pair; `write` carries it out.

    Attributes:
        reference: W_r.
        finetuned: W_f.
        options: what to do.
        factors: what the method needs of each matrix.
        items: the fate of every tensor, by name.
        warnings: what the user should know before.
        files: output file → its tensors, in the order of writing.
        more: what else goes into the manifest.
    """

    def __init__(
        self,
        reference: Checkpoint,
        finetuned: Checkpoint,
        options: SplitOptions,
        retain: FactorSet | None = None,
        forget: FactorSet | Sequence[FactorSet] | None = None,
    ) -> None:
        """Plan everything from headers.

        Args:
            reference: W_r; an `Origin` where there is none.
            finetuned: W_f.
            options: what to do.
            retain: factors of the data to keep good at.
            forget: factors of what must go, one set or several.

        Raises:
            PairMismatch: when the two do not fit.
            UsageError: when the options do not fit the method or the matrices.
        """
        options.amount.check()
        self.reference, self.finetuned, self.options = reference, finetuned, options
        skip = tuple(override.pattern for override in options.overrides if override.what == "skip")
        found = match(reference, finetuned, replace(options.policy, skip=skip))
        self.items = {item.tensor.name: item for item in found.items}
        general = [i.tensor for i in self.items.values() if i.action != Action.WITHHELD]
        size = options.out_shard_size
        self.more: dict[str, Any] = {}
        self.files = layout.keep(finetuned) if size is None else layout.reshard(general, size)
        self.memory_files = delta.shard_names(list(self.files))
        self.factors = FactorSource(METHODS[options.method].needs, finetuned, retain, forget)
        self.warnings = [*found.notes, *points(retain, self.factors.forget, self.alone)]
        route(self.items, options, self.factors, self.alone, found.left)
        differ = None if self.alone else config.warning(reference, finetuned)
        self.sidecars = sidecars.find(*finetuned.folders)
        self.warnings += [differ] if differ else []
        if self.sidecars.note:
            self.warnings.append(self.sidecars.note)

    @property
    def alone(self) -> bool:
        """Whether there is no reference, and the weights themselves are divided."""
        return isinstance(self.reference, Origin)

    @property
    def split_items(self) -> list[Item]:
        """The tensors whose update is decomposed."""
        return [item for item in self.items.values() if item.action == Action.SPLIT]

    @property
    def disk_bytes(self) -> int:
        """Upper bound of what will be written."""
        edited = sum(i.tensor.nbytes for i in self.items.values() if i.action != Action.SKILL)
        headers = 3 * sum(len(s.header) for s in self.finetuned.shards.values())
        return self.finetuned.nbytes + edited + headers + self.sidecars.nbytes

    def fingerprint(self, run: Run) -> str:
        """Hash everything that decides the output's bytes, for --resume."""
        where = [str(run.device), run.kernels]
        inputs = [[s.identity for s in side.shards.values()] for side in (self.reference, self.finetuned)]
        seen = json.dumps([inputs, self.factors.identity(), asdict(self.options), where, manifest.new("split")], sort_keys=True)
        return hashlib.sha256(seen.encode()).hexdigest()

    def write(
        self,
        out: Path,
        sources: tuple[Source | None, Source],
        run: Run,
        console: Console,
        hasher: BackgroundHasher | None = None,
        memory_out: Path | None = None,
    ) -> dict[str, Any]:
        """Carry the plan out.

        Args:
            out: directory to create.
            sources: where the reference (None: there is none) and the fine-tuned checkpoint came from.
            run: device, threads, resume and force.
            console: where progress goes.
            hasher: one that is already reading the inputs.
            memory_out: directory to create for the memory; `OUT.private` when None.

        Returns:
            The manifest that was written.

        Raises:
            LiborthError: the leaf says which; `out` is then absent or what it was before.
        """
        hasher = hasher or BackgroundHasher()
        workers = run.share_threads(max((min(item.grid[1:]) for item in self.split_items), default=0))
        place = private.private_place(out, memory_out)
        with Transaction(out, self.fingerprint(run), run.force, run.resume, place) as transaction:
            folders = (transaction.partial, transaction.private)
            sides = {"reference": self.reference, "finetuned": self.finetuned}
            named = {f"{side}/{s.name}": s.path for side, checkpoint in sides.items() for s in checkpoint.shards.values()}
            transaction.check_inputs(lambda name: hasher.wait(named[name]).sha256 if name in named else None)
            with (
                console.progress("split", self.finetuned.nbytes) as progress,
                _pool(workers) as pool,
                _pool(1) as closing,
            ):
                skills = self._skills(transaction.finished, run, pool)
                closed: Future[None] | None = None
                for number, (file, tensors) in enumerate(self.files.items()):
                    self._ask_hashes(hasher, tensors)
                    if file in transaction.finished:
                        progress.skip(sum(t.nbytes for t in tensors))
                        continue
                    shard = ShardJob(self, file, folders, skills, first=number == 0)
                    shard.run(tensors, progress)
                    if closed:
                        closed.result()
                    closed = closing.submit(
                        lambda file, shard: transaction.finish(file, {**shard.close(), "inputs": self._sources(file, hasher)}),
                        file,
                        shard,
                    )
                if closed:
                    closed.result()
            shards = [shard.path for side in (self.reference, self.finetuned) for shard in side.shards.values()]
            for path in shards + self.factors.paths:
                hasher.ask(path)
            document = self._finish(transaction, sources, run, hasher)
            transaction.commit(manifest.dump(document))
        return document

    def _skills(self, finished: Container[str], run: Run, pool: Executor) -> Iterator[Skill]:
        """Divide the matrices of all unfinished files in the order of writing, ahead of the writer, across files."""
        tensors = [t for file, group in self.files.items() if file not in finished for t in group]
        items = [self.items[t.name] for t in tensors]
        jobs = [Job(item, number) for item in items if item.action == Action.SPLIT for number in range(item.grid[0])]
        divider = Divider(self.reference, self.finetuned, self.options, self.factors, run.device)
        early = run.threads > 1 and divider.last_first(jobs)
        return ahead(pool, divider.skill, jobs, divider.cost, divider.budget(jobs), early)

    def _finish(
        self, transaction: Transaction, sources: tuple[Source | None, Source], run: Run, hasher: BackgroundHasher
    ) -> dict[str, Any]:
        hashes = hasher.collect()
        old, new = ({s.name: hashes[s.path].sha256 for s in side.shards.values()} for side in (self.reference, self.finetuned))
        self.factors.check_hashes(old, new, {path: hashes[path].sha256 for path in self.factors.paths})
        for checkpoint in (self.reference, self.finetuned):
            hasher.check_same(checkpoint.shards.values())
        partial, records = transaction.partial, [transaction.finished[file] for file in self.files]
        outputs = [Written(**written) for record in records for written in record["files"]]
        tensors = {name: entry for record in records for name, entry in record["tensors"].items()}
        outputs += sidecars.copy(self.sidecars.files, partial)
        memory = [Written(**written) for record in records for written in record["private"]]
        kept = {written["name"]: record["memory"] for record in records for written in record["private"]}
        if layout.has_index(self.files, self.finetuned if self.options.out_shard_size is None else None):
            outputs.append(write_file(partial / layout.INDEX, self._index()))
        if len(self.files) > 1 and memory:
            index = layout.index(kept, sum(file.size for file in memory))
            memory.append(write_file(transaction.private / "memory.safetensors.index.json", index, delta.MODE))
        document = manifest.Split(
            parameters=manifest.SplitParameters(**manifest.finite(self._parameters())),
            inputs={
                "reference": manifest.Input.of(self.reference, sources[0], hashes),
                "finetuned": manifest.Input.of(self.finetuned, sources[1], hashes),
            },
            factors=self.factors.describe(),
            machine=run.machine,
            tensors=manifest.finite(tensors),
            totals=manifest.finite(totals(tensors)),
            **self.more,
        )
        outputs.append(write_file(partial / "README.md", split_card(document).encode()))
        document = document.with_outputs(outputs)
        if memory:
            private.seal(transaction.private, memory, document.digest or "")
        return document.document

    def _parameters(self) -> dict[str, Any]:
        return {
            **asdict(self.options),
            "amount": str(self.options.amount),
            "overrides": [str(o) for o in self.options.overrides],
            "one_checkpoint": self.alone,
            "memory_side": self.options.side,
            "layout_kept": self.options.out_shard_size is None,
        }

    def _index(self) -> bytes:
        names = {file: [t.name for t in tensors if self._is_general(t)] for file, tensors in self.files.items()}
        return layout.index(names, sum(t.nbytes for ts in self.files.values() for t in ts if self._is_general(t)))

    def _is_general(self, tensor: TensorInfo) -> bool:
        return self.items[tensor.name].action != Action.WITHHELD

    def _sources(self, file: str, hasher: BackgroundHasher) -> dict[str, str]:
        """Return the hashes of the input files that one output file is made from."""
        found = {}
        for tensor in self.files[file]:
            shard, old = self.finetuned.shards[tensor.shard], self.items[tensor.name].reference
            found[f"finetuned/{shard.name}"] = shard.path
            if old is not None and not self.alone:
                found[f"reference/{old.shard}"] = self.reference.shards[old.shard].path
        return {name: hasher.wait(path).sha256 for name, path in found.items()}

    def _ask_hashes(self, hasher: BackgroundHasher, tensors: list[TensorInfo]) -> None:
        for tensor in tensors:
            hasher.ask(self.finetuned.shards[tensor.shard].path)
            old = self.items[tensor.name].reference
            if old is not None and not self.alone:
                hasher.ask(self.reference.shards[old.shard].path)


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool that drops what has not begun when an error ends the run."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="split")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def totals(tensors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Add up all split tensors: ‖U‖², the shares of skill and memory in it, predicted retain cost and forget gains."""
    split = [t for t in tensors.values() if t.get("energy")]
    whole = math.fsum(t["energy"] for t in split)
    shares = {side: math.fsum(t["energy"] * t[side] for t in split) / whole if whole else 0.0 for side in ("skill", "memory")}
    found: dict[str, Any] = {"energy": whole, **shares}
    costs = [t["retain_cost"] for t in split if "retain_cost" in t]
    gains = [t["forget_gain"] for t in split if "forget_gain" in t]
    if costs:
        found["retain_cost"] = math.fsum(costs)
    if gains:
        longest = max(map(len, gains))
        found["forget_gain"] = [math.fsum(g[i] for g in gains if len(g) == longest) for i in range(longest)]
    return found
