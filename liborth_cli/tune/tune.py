"""Fine-tune a checkpoint so that what is private lies apart: plan, train, write, read back, and commit."""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch

from liborth_cli import manifest
from liborth_cli.card import tune_card
from liborth_cli.checkpoint import sidecars
from liborth_cli.checkpoint.dtypes import DTYPES, WIDE
from liborth_cli.checkpoint.files import Written, hash_file, write_file
from liborth_cli.checkpoint.hashing import BackgroundHasher
from liborth_cli.checkpoint.hub import Source, resolve
from liborth_cli.checkpoint.outputs import Place, check_outputs, check_space
from liborth_cli.checkpoint.private import holds_memory, private_place, seal
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.checkpoint.usercard import read_card
from liborth_cli.console import Console, JsonObject, size
from liborth_cli.curvature.estimate import DEFAULT_LENGTH, Estimator
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.plan import CurvatureOptions, Resources
from liborth_cli.errors import UsageError, VerificationFailed
from liborth_cli.machine import Run, available_bytes, slowed
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import DataFile, Row, RowReader, summary
from liborth_cli.stream.weights import Point
from liborth_cli.tune.data import Stream, assign_learners, hold_out
from liborth_cli.tune.full import Full
from liborth_cli.tune.lora import Lora
from liborth_cli.tune.network import Network
from liborth_cli.tune.ogd import ExactOgd, Ogd, Orthogonal, protect
from liborth_cli.tune.options import General, Learns, MemoryForm, TuneMethod, TuneOptions
from liborth_cli.tune.output import Output, Parts, read_updates
from liborth_cli.tune.run import Trained, TrainingRun
from liborth_cli.tune.sinks import DualStream
from liborth_cli.tune.streams import TwoStreams
from liborth_cli.tune.tokens import MemoryTokens

TOLERANCE = 1e-5
"""Largest share of an update that may lie in the protected subspace, as written."""


def tune(
    base: str, out: Path, options: TuneOptions, run: Run, console: Console, *, dry_run: bool = False
) -> tuple[str, JsonObject]:
    """Fine-tune a checkpoint.

    Args:
        base: the checkpoint to start from, as the user names it.
        out: directory to create.
        options: what is learnt, and how.
        run: device, threads, and what to do with outputs that exist.
        console: where progress goes.
        dry_run: say what would be done, and write nothing.

    Returns:
        What to print: a text, and a JSON document with the manifest.

    Raises:
        LiborthError: the leaf says which.
    """
    source, retain = resolve(base), options.ogd.retain
    texts = (*options.data, *options.eval_data, *options.private_data, *options.ogd.retain_data)
    inputs = [source.path, retain, *(DataFile.parse(text).path for text in texts)]
    places = [Place(out), Place(private_place(out, options.memory_out), "--memory-out", keeper=out)]
    check_outputs(places, inputs, run.force)
    with Checkpoint.open(source.path) as opened:
        job = Tuner(options, source, opened, run)
        # saved states, two at a time, with both moments; and the output
        needed = 6 * max(sum(p.numel() * 4 for p in job.network.parameters.values()), opened.nbytes)
        if slow := slowed(getattr(torch, job.loop.dtype), run.device):
            console.warn(slow)
        if dry_run:
            tokens = sum(row.tokens for row in job.rows)
            text = (
                f"would train {len(job.rows):,} rows with {tokens:,} tokens for {job.loop.steps:,} steps and need up to "
                f"{size(needed)} of disk while it runs; nothing was written"
            )
            return text, {"rows": len(job.rows), "tokens": tokens, "steps": job.loop.steps, "disk_bytes": needed}
        check_space(out, needed)
        return str(out), {"output": str(out), "manifest": job.write(out, console).document}


class Tuner:
    """A planned run; `write` carries it out.

    Attributes:
        network: the base, in memory.
        rows: to learn from.
        held: held out.
        loop: how long and how fast, with the number of steps filled in.
    """

    def __init__(self, options: TuneOptions, source: Source, base: Checkpoint, run: Run) -> None:
        """Read the model and the data.

        Raises:
            LiborthError: the leaf says which.
        """
        self.options, self.source, self.base, self.run = options, source, base, run
        files, held, private, self._retain_files = (
            [DataFile.parse(text, option) for text in group]
            for group, option in (
                (options.data, "--data"),
                (options.eval_data, "--eval-data"),
                (options.private_data, "--private-data"),
                (options.ogd.retain_data, "--retain-data"),
            )
        )
        self.network = Network(base, run.device)
        self._length = options.seq_len or min(self.network.context or DEFAULT_LENGTH, DEFAULT_LENGTH)
        if self.network.context is not None and self._length > self.network.context:
            raise UsageError(f"--seq-len {self._length}: longer than the model's context of {self.network.context:,} tokens")
        self._encoder, self._said = TextEncoder.beside(*base.folders), list[str]()
        rows, self.held = hold_out(self._read(files), options.eval_share, options.loop.seed)
        self.held += self._read(held) if held else []
        if options.loop.patience and not self.held:
            raise UsageError("--patience needs rows that are held out: give --eval-data or --eval-share")
        secret = self._read(private) if private else []
        self.rows = assign_learners(rows, secret, options.sinks.learnt if options.method is TuneMethod.SINKS else Learns.ALL)
        batch = options.loop.batch_size * options.loop.accumulate
        steps = options.loop.steps or max(round(options.epochs * len(self.rows) / batch), 1)
        self.loop = replace(options.loop, steps=steps)
        self._data = {
            "trained": summary(files, rows),
            "private": summary(private, secret) if private else None,
            "held_out": summary(held, self.held) if self.held else None,
        }

    def fingerprint(self, hasher: BackgroundHasher) -> str:
        """Hash everything that decides the output's bytes, the weights' own hashes too, for --resume."""
        factors = None
        if self.options.ogd.retain:
            with FactorSet.open(self.options.ogd.retain) as opened:
                factors = opened.checkpoint_hashes()
        weights = [[s.name, hasher.wait(s.path).sha256] for s in self.base.shards.values()]
        data = {name: part and part.model_dump() for name, part in self._data.items()}
        seen = [
            weights, data, [f.sha256() for f in self._retain_files],
            str(self.options), asdict(self.loop), factors, str(self.run.device), manifest.Maker(kind="tune").model_dump(),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()

    def write(self, out: Path, console: Console) -> manifest.Tune:
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
        place, plan = private_place(out, self.options.memory_out), self.fingerprint(hasher)
        with Transaction(out, plan, self.run.force, self.run.resume, private=place) as transaction:
            if transaction.anew:
                console.note(transaction.anew)
            run = TrainingRun(method, self.held, self.loop, transaction, console)
            outcome = run.carry_out(self.rows)
            method.finish()
            output = Output(self.network, self._parts(method), self.options.shard_bytes)
            written, apart = output.write(transaction.partial, transaction.private)
            for name, text in outcome.curve.files().items():
                written.append(write_file(transaction.partial / name, text))
            facts = self._checked(method, output.parts, transaction, console)
            self.base.check_unchanged()
            document = self._manifest(hasher.collect(), outcome, facts, output.has_memory)
            card = tune_card(document, read_card(self.base.path))
            written.append(write_file(transaction.partial / "README.md", card.encode()))
            document = document.with_outputs(written)
            run.forget()
            if apart:
                seal(transaction.private, apart, document.digest or "")
            transaction.commit(manifest.dump(document))
        self._conclude(out, outcome, output.parts, console)
        return document

    def _method(self, console: Console) -> Full:
        options, network = self.options, self.network
        if options.method is TuneMethod.LORA:
            return Lora(network, options.lora)
        if options.method is TuneMethod.SINKS:
            kind = DualStream if options.sinks.memory is MemoryForm.NEURONS else MemoryTokens
            return kind(network, options.sinks, options.lora)
        if options.method is TuneMethod.FULL:
            return Full(network.model, network.trainable())
        ogd = options.ogd
        if ogd.exact:
            if not self._retain_files:
                raise UsageError("--exact needs --retain-data: the public text whose gradients are stored")
            return ExactOgd(network, self._read(self._retain_files), ogd.exact)
        if not ogd.retain and not self._retain_files:
            raise UsageError("--method ogd needs --retain, factors from public text, or --retain-data, the text itself")
        with tempfile.TemporaryDirectory(prefix="liborth-") as scratch, ExitStack() as stack:
            folder = ogd.retain or Path(scratch) / "factors"
            if not ogd.retain:
                self._measure(folder, console)
            factors = stack.enter_context(FactorSet.open(folder))
            factors.check_belongs(self.base, {s.name: hash_file(s.path).sha256 for s in self.base.shards.values()})
            method = Ogd(network, *protect(factors, network, ogd.protect, ogd.form))
        if ogd.hold and self._retain_files:
            method.hold(assign_learners(self._read(self._retain_files), [], Learns.ALL), ogd.hold, self.loop.seed)
        elif ogd.hold:
            console.note(
                "only directions are held; with --retain-data beside --retain, what is said about that text is held too"
            )
        return method

    def _measure(self, folder: Path, console: Console) -> None:
        """Run `liborth curvature` on the public text."""
        point = Point(self.base)
        model = BlockModel(point, torch.float32, self.run.device)
        try:
            options = CurvatureOptions(seed=self.loop.seed, seq_len=self._length, truncate=self.options.truncate)
            run = Run(self.run.device, self.run.threads)
            job = Estimator(point, model, self._read(self._retain_files), options, Resources(available_bytes()), run)
            job.write(folder, self._retain_files, (self.source, None), console)
        finally:
            model.close()

    def _parts(self, method: Full) -> Parts:
        trained = set(self.network.stored)
        if isinstance(method, TwoStreams):
            trained = set() if self.options.sinks.general is General.FROZEN else trained
            if isinstance(method, MemoryTokens):
                return Parts(trained, router={name: p.detach() for name, p in method.memory.items()})
            assert isinstance(method, DualStream)
            return Parts(trained, added=method.added(), router=method.router(), config=method.config)
        if isinstance(method, Ogd):
            trained = {layer.tensor for layer in method.layers}
        return Parts(trained, apart=self.options.method is TuneMethod.OGD, widened=self._widened)

    @property
    def _widened(self) -> bool:
        narrow = any(DTYPES[t.dtype].editable and t.dtype not in WIDE for t in self.base.tensors.values())
        return self.options.method is TuneMethod.OGD and narrow and not self.options.ogd.keep_dtype

    def _checked(self, method: Full, parts: Parts, transaction: Transaction, console: Console) -> manifest.TuneFacts:
        """Add to a method's facts the orthogonality of what was written, in float64; nothing where none is promised."""
        if not isinstance(method, Orthogonal) or not holds_memory(transaction.private):
            return method.facts()
        learnt = {name for name in parts.trained if self.network.stored[name].parameter in method.parameters}
        leaks = method.leaks(read_updates(self.network, learnt, transaction.partial, transaction.private))
        worst = max(leaks, key=lambda name: leaks[name])
        found = leaks[worst]
        console.note(
            f"orthogonality of what was written: {found:.1e} of the update lies in the protected subspace (worst: {worst})"
        )
        if found > TOLERANCE:
            narrow = "its dtype cannot hold more; leave --keep-dtype out"
            why = narrow if self.options.ogd.keep_dtype else "the update is tiny beside the weights"
            console.warn(f"that is above {TOLERANCE:g}: {why}")
        return method.facts().model_copy(update={"orthogonality": found, "leaks": leaks})

    def _manifest(
        self, hashes: dict[Path, Written], outcome: Trained, facts: manifest.TuneFacts, memory: bool
    ) -> manifest.Tune:
        inputs = ("data", "eval_data", "private_data", "loop", "memory_out")
        asked = {name: value for name, value in asdict(self.options).items() if name not in inputs}
        asked["ogd"] |= {"retain": None if self.options.ogd.retain is None else self.options.ogd.retain.resolve().name}
        del asked["ogd"]["retain_data"]
        private = self._data["private"]
        return manifest.Tune(
            parameters=manifest.TuneParameters(**manifest.finite({**asked, **asdict(self.loop)})),
            inputs={"reference": manifest.Input.of(self.base, self.source, hashes)},
            data={**self._data, "private": private and private.unhashed},
            machine=manifest.Machine(device=str(self.run.device), threads=self.run.threads),
            method=facts,
            memory=memory,
            training=manifest.Training(
                steps=outcome.steps, kept=outcome.kept, diverged=outcome.diverged, held_out=outcome.held_out
            ),
        )

    def _introduce(self, method: Full, console: Console) -> None:
        for line in self._said:
            console.note(line)
        trained = sum(p.numel() for p in method.parameters.values())
        held = f", {len(self.held):,} held out" if self.held else ""
        console.note(f"{trained:,} numbers are trained on {len(self.rows):,} rows{held}, {self.loop.steps:,} steps")
        if isinstance(method, TwoStreams) and method.options.learnt is not Learns.ALL:
            count = sum(row.stream is Stream.MEMORY for row in self.rows)
            console.note(
                f"{count:,} rows train the {method.options.memory} only; the general stream never gets a gradient from them"
            )
        if isinstance(method, Ogd):
            share = [layer.projector.protected for layer in method.layers]
            console.note(
                f"{len(method.layers)} matrices keep {min(share):.1%} to {max(share):.1%} of their directions as they are; "
                f"{len(method.frozen)} tensors without factors of their own (embeddings, norms, biases, tied heads) are frozen"
            )
        if left := sidecars.find(*self.base.folders).note:
            console.warn(left)
        if self._widened:
            console.note("weights are written in float32; narrower ones cannot hold the orthogonality (--keep-dtype)")

    def _conclude(self, out: Path, outcome: Trained, parts: Parts, console: Console) -> None:
        place = f" --memory {self.options.memory_out}" if self.options.memory_out else ""
        if self.options.method in (TuneMethod.FULL, TuneMethod.LORA):
            console.note("nothing is kept apart: the output is the fine-tuned checkpoint; `liborth split` takes it apart")
        elif self.options.sinks.memory is not MemoryForm.NEURONS and self.options.method is TuneMethod.SINKS:
            attach = "liborth_cli.tune.tokens.attach_tokens"
            console.note(f"the general checkpoint is here; its memory is tokens before the text: {attach}")
        elif parts.router:
            console.note("the general checkpoint is here; its memory stands behind a router: liborth_cli.tune.sinks.attach")
        elif self.options.method is TuneMethod.OGD:
            console.note(f"the general checkpoint is the base; with what was learnt: liborth excise {out} --beta 1{place} -o …")
        else:
            console.note(f"the general checkpoint is here; with its memory: liborth excise {out} --beta 1{place} -o …")
        if outcome.diverged is not None:
            raise VerificationFailed(
                f"the loss ran away at step {outcome.diverged}; {out} holds step {outcome.kept}, the last good one. Lower --lr"
            )

    def _read(self, files: list[DataFile]) -> list[Row]:
        truncate, tell = self.options.truncate, self._said.append
        return RowReader(self._encoder, self.network.vocabulary, self._length, truncate, tell, ended=True).read(files)
