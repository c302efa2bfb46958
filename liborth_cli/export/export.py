"""An export from request to result: open both ends, write the form, hold an adapter against the checkpoint, seal."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch

from liborth_cli import manifest
from liborth_cli.card import export_card
from liborth_cli.checkpoint import private
from liborth_cli.checkpoint.adapter import Adapted
from liborth_cli.checkpoint.files import Written, write_file
from liborth_cli.checkpoint.journal import Unit
from liborth_cli.checkpoint.outputs import Place, check_outputs, check_space
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.checkpoint.usercard import read_card
from liborth_cli.console import Console
from liborth_cli.errors import UsageError, VerificationFailed
from liborth_cli.export.adapter import AdapterFacts, write_adapter
from liborth_cli.export.difference import Difference, open_difference
from liborth_cli.export.llamacpp import check_convertible, write_gguf
from liborth_cli.export.mergekit import write_recipe
from liborth_cli.export.request import ExportRequest, Form, Part
from liborth_cli.export.vector import write_vector
from liborth_cli.machine import Run
from liborth_cli.measure.scores import Evaluator
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point

AGREES = 1e-3
"""Nats a token by which an adapter on its base may differ from the checkpoint, on average over random tokens."""
ROWS, LENGTH = 8, 32
"""Of the self-test."""


def export(request: ExportRequest, run: Run, console: Console) -> manifest.Export:
    """Write what another tool reads.

    Args:
        request: what is asked.
        run: device, threads, force and resume.
        console: where progress and notes go.

    Returns:
        The manifest that was written.

    Raises:
        VerificationFailed: when an adapter does not stand for the checkpoint.
        LiborthError: otherwise; the output is then absent or what it was before.
    """
    if request.form not in (Form.PEFT, Form.GGUF) and (request.rank or request.whole or request.lossy):
        raise UsageError(f"--rank, --whole and --lossy go with --to {Form.PEFT}; --rank and --lossy with --to {Form.GGUF} too")
    if request.form is Form.GGUF and request.whole:
        raise UsageError("--whole: llama.cpp reads factors of linear layers only; leave it out, or --to peft")
    if request.form is Form.MERGEKIT and request.part is Part.MEMORY:
        raise UsageError(
            "mergekit merges whole checkpoints: write the fine-tuned one with `liborth excise --beta 1`, and name it"
        )
    with ExitStack() as stack:
        ends = open_difference(request, stack)
        if request.form is Form.GGUF:
            check_convertible(ends.old)
        check_outputs([Place(request.out)], [ends.old.path, ends.new.path], run.force)
        check_space(request.out, 2 * ends.new.nbytes)
        mode = private.FOLDER_MODE if ends.private else 0o777
        with Transaction(request.out, _plan(request, ends), run.force, run.resume, mode=mode) as transaction:
            transaction.check_inputs(lambda name: None)
            files, facts = _write(request, ends, transaction.partial, run, console)
            document = _document(request, ends, facts)
            card = export_card(document, read_card(ends.new.path))
            files.append(write_file(transaction.partial / "README.md", card.encode(), 0o644 & mode))
            if ends.private:
                files.append(write_file(transaction.partial / ".gitignore", private.GUARDS[".gitignore"], private.FILE_MODE))
            for side in (ends.old, ends.new):
                side.check_unchanged()
            document = document.with_outputs(files)
            transaction.finish(Unit.of("export", files))
            transaction.commit(manifest.dump(document))
    return document


def _write(
    request: ExportRequest, ends: Difference, folder: Path, run: Run, console: Console
) -> tuple[list[Written], dict[str, manifest.Fact]]:
    """Write the form, and say what is to be known of it."""
    if request.form is Form.MERGEKIT:
        return write_recipe(ends, folder), {}
    if request.form is Form.TASK_VECTOR:
        files, differing = write_vector(ends, folder, console)
        if differing:
            console.note(f"{differing} numbers differ in their last bits when it is added back")
        return files, {"differing": differing}
    files, found = write_adapter(ends, folder, request.rank, request.whole, console)
    _tell(found, console)
    mean, worst = self_test(ends, folder, request.seed, run)
    console.note(
        f"self-test on {ROWS * LENGTH} random tokens: {mean:.1e} nats a token from the checkpoint, {worst:.1e} at most"
    )
    if mean > AGREES and not request.lossy:
        left = f"{len(found.left)} changed tensors have no place in it (first: {found.left[0]})" if found.left else ""
        advice = "--whole carries norms and tables" if left and not request.whole else "--to task-vector holds everything"
        raise VerificationFailed(
            f"the adapter is {mean:.2g} nats a token from the checkpoint, more than {AGREES:g}: "
            f"{left or 'its rank is too low'}; {advice}, --lossy writes it all the same"
        )
    if request.form is Form.GGUF:
        files.append(write_gguf(ends, folder))
    return files, {**_facts(found), "self_test": mean, "self_test_worst": worst}


def self_test(ends: Difference, adapter: Path, seed: int, run: Run) -> tuple[float, float]:
    """Hold an adapter on its base against the checkpoint it stands for, on random tokens.

    Returns:
        Mean and largest difference of −log p of a token, in nats.
    """
    with closing(Adapted(ends.old, adapter)) as merged:
        model = BlockModel(Point(merged), torch.float32, run.device)
        try:
            generator = np.random.default_rng(seed)
            length = min(LENGTH, model.context or LENGTH)
            rows = [
                Row(generator.integers(0, model.vocabulary, length + 1), np.ones(length, bool), 1.0, f"random row {number}")
                for number in range(ROWS)
            ]
            evaluator = Evaluator(model, rows)
            scores = [np.concatenate([s.loss for s in evaluator.score(Point(side))]) for side in (merged, ends.new)]
        finally:
            model.close()
    apart = np.abs(scores[0] - scores[1])
    return float(apart.mean()), float(apart.max())


def _tell(found: AdapterFacts, console: Console) -> None:
    console.note(
        f"rank {found.rank} on {found.layers} layers; {found.lost:.2g} of the update's ‖U‖² is not in it; "
        f"vLLM: --max-lora-rank {found.max_lora_rank}"
    )
    if found.left:
        console.note(f"{len(found.left)} changed tensors have no place in it: norms, biases, tables (first: {found.left[0]})")
    if found.whole:
        console.note(f"{len(found.whole)} tensors are carried whole (modules_to_save): PEFT reads that, vLLM does not")


def _facts(found: AdapterFacts) -> dict[str, manifest.Fact]:
    told = {"rank": found.rank, "max_lora_rank": found.max_lora_rank, "layers": found.layers, "lost": found.lost}
    return {**told, "left": list(found.left), "whole": list(found.whole)}


def _plan(request: ExportRequest, ends: Difference) -> str:
    """Hash everything that decides the output's bytes."""
    seen = [[shard.identity for shard in side.shards.values()] for side in (ends.old, ends.new)]
    asked = [request.form, request.part, request.rank, request.whole, request.seed]
    return hashlib.sha256(json.dumps([seen, asked, manifest.Maker(kind="export").model_dump()]).encode()).hexdigest()


def _document(request: ExportRequest, ends: Difference, facts: dict[str, manifest.Fact]) -> manifest.Export:
    asked = manifest.ExportParameters(to=request.form.value, part=request.part.value, seed=request.seed)
    return manifest.Export(parameters=asked, inputs={"base": _input(ends.base.title, ends)}, private=ends.private, facts=facts)


def _input(title: str, ends: Difference) -> manifest.Input:
    return manifest.Input(title=title, commit=ends.base.commit)
