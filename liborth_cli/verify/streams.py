"""The two streams of an update, matrix by matrix, and the curvature they are held against."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.console import Console
from liborth_cli.curvature.estimate import Estimator
from liborth_cli.curvature.factors import FactorSet
from liborth_cli.curvature.plan import CurvatureOptions, Resources
from liborth_cli.machine import available_bytes
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point
from liborth_cli.verify.subject import Subject

PARTS = 5
"""Parts of the rows whose factors are taken apart, so that leaving each out gives an interval."""


@dataclass(frozen=True)
class Streams:
    """One matrix's update, W_f − W_r = S + M, in the orientation y = Wx.

    Attributes:
        name: the layer's name in the factor sets.
        skill: S = W_g − W_r, (d_out, d_in), float64.
        memory: M = W_f − W_g, (d_out, d_in), float64.
    """

    name: str
    skill: torch.Tensor
    memory: torch.Tensor


def read_streams(subject: Subject, factors: FactorSet, name: str) -> Streams | None:
    """Form S and M of one layer; None when the split did not touch it, or the reference does not have it."""
    record = factors.manifest["layers"][name]
    general, finetuned, reference = subject.general, subject.finetuned, subject.reference
    assert finetuned is not None and reference is not None
    sides = [side.tensors.get(record["tensor"]) for side in (reference, general, finetuned)]
    if any(info is None or info.shape != sides[1].shape for info in sides if sides[1] is not None) or None in sides:
        return None
    w_r, w_g, w_f = (
        _matrix(side, info, record["matrix"] or 0)
        for side, info in zip((reference, general, finetuned), sides, strict=True)
        if info is not None
    )
    skill, memory = w_g - w_r, w_f - w_g
    if not (skill.any() and memory.any()):
        return None
    return Streams(name, skill.T, memory.T) if record["transposed"] else Streams(name, skill, memory)


def inner(first: torch.Tensor, second: torch.Tensor, a: torch.Tensor, g: torch.Tensor) -> float:
    """Return tr(G X A Yᵀ), the inner product of two matrices in a Kronecker-factored curvature.

    Args:
        first: X, (d_out, d_in).
        second: Y, (d_out, d_in).
        a: A, (d_in, d_in), or its diagonal (d_in,).
        g: G, (d_out, d_out), or its diagonal (d_out,), or (heads, d, d) blocks.
    """
    x = first * a if a.dim() == 1 else first @ a
    if g.dim() == 1:
        x = g[:, None] * x
    elif g.dim() == 2:
        x = g @ x
    else:
        x = torch.bmm(g, x.reshape(len(g), -1, x.shape[1])).reshape(x.shape)
    return float((x * second).sum())


@contextmanager
def held_out_factors(subject: Subject) -> Iterator[list[FactorSet]]:
    """Open factor sets to measure in: those the user gave, or fresh ones of parts of the retain rows, gone afterwards.

    Fresh ones are taken at the fine-tuned weights, where skill and memory stand together, with labels drawn from the model.
    """
    with ExitStack() as stack:
        given: Sequence[Path] = subject.options.get("factors") or ()
        if given:
            sets = [stack.enter_context(FactorSet.open(path)) for path in given]
            for found in sets:
                found.check_belongs(subject.finetuned or subject.general)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="liborth-verify-")))
            count = max(min(PARTS, len(subject.retain)), 1)
            sets = [
                stack.enter_context(FactorSet.open(_estimate(subject, subject.retain[part::count], folder / str(part))))
                for part in range(count)
            ]
        yield sets


def _estimate(subject: Subject, rows: list[Row], out: Path) -> Path:
    point = subject.states["finetuned"]
    assert isinstance(point, Point)
    model = subject.evaluators["retain"].model
    model.use(point)
    weights = "resident" if model.resident else "auto"
    job = Estimator(
        point, model, rows, CurvatureOptions(seed=subject.seed), Resources(available_bytes(), None, weights), subject.run
    )
    job.write(out, [], (subject.source, None), Console(quiet=True))
    return out


def _matrix(side: Checkpoint, info: TensorInfo, number: int) -> torch.Tensor:
    rows, cols = info.shape[-2:]
    first = number * rows * cols
    return side.load_elements(info.name, first, first + math.prod((rows, cols))).double().view(rows, cols)
