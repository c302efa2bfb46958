"""What `liborth tune` does, once its options are parsed."""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from liborth_cli import manifest
from liborth_cli.card import tune_card
from liborth_cli.checkpoint.dtypes import DTYPES, WIDE
from liborth_cli.checkpoint.hashing import BackgroundHasher
from liborth_cli.checkpoint.hub import Source, resolve
from liborth_cli.checkpoint.outputs import Place, check_outputs, check_space
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.checkpoint.writer import Written, write_file
from liborth_cli.console import Console, size
from liborth_cli.curvature.command import DEFAULT_LENGTH
from liborth_cli.curvature.estimate import Estimator
from liborth_cli.curvature.factors import FactorSet
from liborth_cli.curvature.plan import CurvatureOptions, Resources
from liborth_cli.errors import UsageError, VerificationFailed
from liborth_cli.machine import Run, available_bytes
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import DataFile, DataSummary, Row, read_rows
from liborth_cli.stream.weights import Point
from liborth_cli.tune.data import hold_out
from liborth_cli.tune.dual import DualStream
from liborth_cli.tune.loop import LoopOptions, Outcome, train
from liborth_cli.tune.lora import Lora
from liborth_cli.tune.method import Method
from liborth_cli.tune.network import Network
from liborth_cli.tune.ogd import ExactOgd, Ogd, protect
from liborth_cli.tune.output import Output, Parts
from liborth_cli.tune.readback import check
from liborth_cli.tune.request import Request
from liborth_cli.tune.route import Learns, Stream, route


class Tuner:
    """A planned run; `write` carries it out.

    Attributes:
        network: the base, in memory.
        rows: to learn from.
        held: held out.
        loop: how long and how fast.
    """

    def __init__(self, asked: Request, loop: LoopOptions, source: Source, base: Checkpoint, run: Run) -> None:
        """Read the model and the data.

        Raises:
            LiborthError: the leaf says which.
        """
        self.asked, self.source, self.base, self.run = asked, source, base, run
        files, held, private = (
            [DataFile.parse(text, option) for text in group]
            for group, option in (
                (asked.data, "--data"),
                (asked.eval_data, "--eval-data"),
                (asked.private_data, "--private-data"),
            )
        )
        self.retain_files = [DataFile.parse(text, "--retain-data") for text in asked.retain_data]
        self.network = Network(base, run.device)
        self.length = asked.seq_len or min(self.network.context or DEFAULT_LENGTH, DEFAULT_LENGTH)
        if self.network.context is not None and self.length > self.network.context:
            raise UsageError(f"--seq-len {self.length}: longer than the model's context of {self.network.context:,} tokens")
        self.encoder = TextEncoder.beside(base.path if base.path.is_dir() else base.path.parent)
        rows = self._read(files)
        rows, self.held = hold_out(rows, asked.eval_share, loop.seed)
        self.held += self._read(held) if held else []
        if loop.patience and not self.held:
            raise UsageError("--patience needs rows that are held out: give --eval-data or --eval-share")
        secret = self._read(private) if private else []
        learns = asked.sinks.learnt if asked.method == "sinks" else Learns.ALL
        self.rows = route(rows, secret, learns)
        batch = loop.batch_size * loop.accumulate
        self.loop = loop if loop.steps else replace(loop, steps=max(round(asked.epochs * len(self.rows) / batch), 1))
        self.data = asdict(DataSummary.of(files, rows))
        self.private_data = asdict(DataSummary.of(private, secret)) if private else None
        self.held_data = asdict(DataSummary.of(held, self.held)) if self.held else None

    def fingerprint(self, hasher: BackgroundHasher) -> str:
        """Hash everything that decides the output's bytes, the weights' own hashes too, for --resume."""
        asked = {k: str(v) for k, v in asdict(self.asked).items() if k not in ("out", "dry_run")}
        factors = None
        if self.asked.retain:
            with FactorSet.open(self.asked.retain) as opened:
                factors = opened.checkpoint_hashes()
        retained = [file.sha256() for file in self.retain_files]
        weights = [[s.name, hasher.wait(s.path).sha256] for s in self.base.shards.values()]
        seen = [
            weights, self.data, self.private_data, self.held_data, retained, asked,
            factors, asdict(self.loop), str(self.run.device), manifest.new("tune"),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()

    def write(self, out: Path, console: Console) -> dict[str, Any]:
        """Train, write, read back, and make the output appear.

        Returns:
            The manifest that was written.

        Raises:
            LiborthError: the leaf says which; `out` is then absent or what it was before, but for a loss that ran away: then
                it holds the last good state.
        """
        hasher = BackgroundHasher()
        for shard in self.base.shards.values():
            hasher.ask(shard.path)
        torch.manual_seed(self.loop.seed)
        method = self._method(console)
        self._introduce(method, console)
        with Transaction(out, self.fingerprint(hasher), self.run.force, self.run.resume) as transaction:
            outcome = train(method, self.rows, self.held, self.loop, transaction, console)
            method.finish()
            output = Output(self.network, self._parts(method), self.asked.shard_bytes)
            written = output.write(transaction.partial)
            for name, text in outcome.state.curve.files().items():
                written.append(write_file(transaction.partial / name, text))
            kept = self.asked.keep_dtype
            facts = {**method.facts(), **check(method, self.network, output.parts.trained, transaction.partial, kept, console)}
            self.base.check_unchanged()
            document = self._manifest(hasher.collect(), outcome, facts, output.has_memory)
            written.append(write_file(transaction.partial / "README.md", tune_card(document).encode()))
            outputs = sorted((w.to_json() for w in written), key=lambda w: w["name"])
            document = manifest.sealed({**document, "outputs": outputs})
            outcome.keeper.forget()
            transaction.commit(manifest.dump(document))
        self._conclude(out, outcome, output, console)
        return document

    def _method(self, console: Console) -> Method:
        asked = self.asked
        if asked.method == "lora":
            return Lora(self.network, asked.lora)
        if asked.method == "sinks":
            return DualStream(self.network, asked.sinks, asked.lora)
        if asked.method == "full":
            return Method(self.network)
        if asked.exact:
            if not self.retain_files:
                raise UsageError("--exact needs --retain-data: the public text whose gradients are stored")
            return ExactOgd(self.network, self._read(self.retain_files), asked.exact)
        if not asked.retain and not self.retain_files:
            raise UsageError("--method ogd needs --retain, factors from public text, or --retain-data, the text itself")
        with tempfile.TemporaryDirectory(prefix="liborth-") as scratch, ExitStack() as stack:
            folder = asked.retain or Path(scratch) / "factors"
            if not asked.retain:
                self._measure(folder, console)
            factors = stack.enter_context(FactorSet.open(folder))
            hashes = {shard.name: _sha256(shard.path) for shard in self.base.shards.values()}
            factors.check_belongs(self.base, hashes)
            method = Ogd(self.network, *protect(factors, self.network, asked.protect, asked.form))
        if asked.hold and self.retain_files:
            method.hold(route(self._read(self.retain_files), [], Learns.ALL), asked.hold, self.loop.seed)
        elif asked.hold:
            console.note(
                "only directions are held; with --retain-data beside --retain, what is said about that text is held too"
            )
        return method

    def _measure(self, folder: Path, console: Console) -> None:
        """Run `liborth curvature` on the public text."""
        point = Point(self.base)
        model = BlockModel(point, torch.float32, self.run.device)
        try:
            options = CurvatureOptions(seed=self.loop.seed, seq_len=self.length, truncate=self.asked.truncate)
            run = Run(self.run.device, self.run.threads)
            job = Estimator(point, model, self._read(self.retain_files), options, Resources(available_bytes()), run)
            job.write(folder, self.retain_files, (self.source, None), console)
        finally:
            model.close()

    def _parts(self, method: Method) -> Parts:
        trained = set(self.network.stored)
        if isinstance(method, DualStream):
            trained = set() if self.asked.sinks.general == "frozen" else trained
            return Parts(trained, added=method.added(), router=method.router(), config=method.config)
        if isinstance(method, Ogd):
            trained = {layer.tensor for layer in method.layers}
        return Parts(trained, apart=self.asked.method == "ogd", widened=self._widened)

    @property
    def _widened(self) -> bool:
        narrow = any(DTYPES[t.dtype].editable and t.dtype not in WIDE for t in self.base.tensors.values())
        return self.asked.method == "ogd" and narrow and not self.asked.keep_dtype

    def _manifest(self, hashes: dict[Path, Written], outcome: Outcome, facts: dict[str, Any], memory: bool) -> dict[str, Any]:
        names = ("base", "data", "eval_data", "private_data", "out", "retain_data", "dry_run")
        asked = {k: v for k, v in asdict(self.asked).items() if k not in names}
        asked["retain"] = None if self.asked.retain is None else self.asked.retain.resolve().name
        origin = manifest.Input.of(self.base, self.source, hashes).model_dump()
        losses = [entry["loss"] for entry in outcome.state.curve.evaluations if "loss" in entry]
        return manifest.new(
            "tune",
            parameters={**asked, **asdict(self.loop)},
            inputs={"reference": origin},
            data={"trained": self.data, "private": _unhashed(self.private_data), "held_out": self.held_data},
            machine={"device": str(self.run.device), "threads": self.run.threads},
            method=facts,
            memory=memory,
            training={
                "steps": outcome.state.step,
                "kept": outcome.kept,
                "diverged": outcome.diverged,
                "held_out": losses[-1] if losses else None,
            },
        )

    def _introduce(self, method: Method, console: Console) -> None:
        trained = sum(p.numel() for p in method.parameters().values())
        held = f", {len(self.held):,} held out" if self.held else ""
        console.note(f"{trained:,} numbers are trained on {len(self.rows):,} rows{held}, {self.loop.steps:,} steps")
        if isinstance(method, DualStream) and method.options.learnt is not Learns.ALL:
            count = sum(row.stream is Stream.MEMORY for row in self.rows)
            console.note(f"{count:,} rows train the neurons only; the general stream never gets a gradient from them")
        if isinstance(method, Ogd):
            share = [layer.projector.protected for layer in method.layers]
            console.note(
                f"{len(method.layers)} matrices keep {min(share):.1%} to {max(share):.1%} of their directions as they are; "
                f"{len(method.frozen)} tensors without factors of their own (embeddings, norms, biases, tied heads) are frozen"
            )
        if self._widened:
            console.note("weights are written in float32; narrower ones cannot hold the orthogonality (--keep-dtype)")

    def _conclude(self, out: Path, outcome: Outcome, output: Output, console: Console) -> None:
        if self.asked.method in ("full", "lora"):
            console.note("nothing is kept apart: the output is the fine-tuned checkpoint; `liborth split` takes it apart")
        elif output.parts.router:
            console.note("the general checkpoint is here; its memory stands behind a router: liborth_cli.tune.sinks.attach")
        elif self.asked.method == "ogd":
            console.note(f"the general checkpoint is the base; with what was learnt: liborth excise {out} --beta 1 -o …")
        else:
            console.note(f"the general checkpoint is here; with its memory: liborth excise {out} --beta 1 -o …")
        if outcome.diverged is not None:
            raise VerificationFailed(
                f"the loss ran away at step {outcome.diverged}; {out} holds step {outcome.kept}, the last good one. Lower --lr"
            )

    def _read(self, files: list[DataFile]) -> list[Row]:
        return read_rows(files, self.encoder, self.network.vocabulary, self.length, self.asked.truncate)


def tune(asked: Request, loop: LoopOptions, run: Run, console: Console) -> None:
    """Fine-tune a checkpoint and print where the result is.

    Raises:
        LiborthError: the leaf says which.
    """
    source = resolve(asked.base)
    texts = [DataFile.parse(t).path for t in (*asked.data, *asked.eval_data, *asked.private_data, *asked.retain_data)]
    check_outputs([Place(asked.out)], [source.path, asked.retain, *texts], run.force)
    with ExitStack() as stack:
        base = stack.enter_context(Checkpoint.open(source.path))
        job = Tuner(asked, loop, source, base, run)
        needed = 6 * max(sum(p.numel() * 4 for p in job.network.parameters.values()), base.nbytes)
        if asked.dry_run:
            tokens = sum(row.tokens for row in job.rows)
            text = (
                f"would train {len(job.rows):,} rows with {tokens:,} tokens for {job.loop.steps:,} steps and need up to "
                f"{size(needed)} of disk while it runs; nothing was written"
            )
            console.result(text, {"rows": len(job.rows), "tokens": tokens, "steps": job.loop.steps, "disk_bytes": needed})
            return
        check_space(asked.out, needed)
        document = job.write(asked.out, console)
    console.result(str(asked.out), {"output": str(asked.out), "manifest": document})


def _unhashed(data: dict[str, Any] | None) -> dict[str, Any] | None:
    """Leave hashes out of what is published about private rows: whoever can count finds a short secret from its hash (0023)."""
    if data is None:
        return None
    names = [{k: v for k, v in file.items() if k != "sha256"} for file in data["files"]]
    return {**{k: v for k, v in data.items() if k != "sha256"}, "files": names}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
