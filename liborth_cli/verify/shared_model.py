"""One model for all checks: its weights come and go, its shapes stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from liborth_cli.measure.scores import Evaluator, RowScore, SlidingEvaluator
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.verify.subject import Subject


def shared_model(subject: Subject) -> BlockModel:
    """Return the model that all checks of a subject share, built on first use."""
    if subject.network is not None:
        return subject.network()
    for evaluator in subject.evaluators.values():
        return evaluator.model
    return BlockModel(subject.states["general"], torch.float32, subject.run.device)


def evaluator_of(model: BlockModel, rows: Sequence[Row], resident: bool | None = None) -> Evaluator:
    """Return an evaluator of the kind that the rows' lengths need."""
    if model.context is not None and any(row.tokens > model.context for row in rows):
        return SlidingEvaluator(model, rows, model.context, resident)
    return Evaluator(model, rows, resident)


def score_states(subject: Subject, rows: Sequence[Row], names: Sequence[str], stage: str) -> dict[str, list[RowScore]]:
    """Score rows at several states.

    Args:
        subject: what is verified.
        rows: what is read.
        names: of the states; those the subject does not have are left out.
        stage: what the progress line says.

    Returns:
        State → one score a row.
    """
    evaluator = evaluator_of(shared_model(subject), rows)
    known = [name for name in names if name in subject.states]
    total = len(known) * sum(row.tokens for row in rows)
    with subject.console.progress(stage, total, "tokens") as progress:
        return {name: evaluator.score(subject.states[name], progress.advance) for name in known}


def tokenizer(subject: Subject) -> TextEncoder | None:
    """Return the tokenizer beside the model, or None where there is none."""
    path = subject.source.path
    return subject.encoder or TextEncoder.beside(path if path.is_dir() else path.parent)
