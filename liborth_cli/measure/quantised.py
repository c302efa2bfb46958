"""Weights rounded to a few bits while they are read: round to nearest, symmetric, one scale a row or a group.

Dettmers et al. 2022 (arXiv 2208.07339) for one scale a row at 8 bits; groups of 128 inputs are usual at 4 bits (Frantar et
al. 2022, arXiv 2210.17323). Zhang et al. 2024 (arXiv 2410.16454) show that rounding alone can undo an edit.
"""

from __future__ import annotations

import torch

from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.stream.blocks import BlockModel
from liborth_cli.stream.weights import Weights


def linear_tensors(model: BlockModel) -> dict[str, bool]:
    """Return the stored matrices inside a model's blocks, and whether each lies as (d_in, d_out).

    These are what is rounded; the embedding, the head and vectors keep their precision, as is usual.
    """
    return {
        piece.tensor.name: site.transposed
        for sites in model.planned_sites().values()
        for site in sites
        if site.kind == "linear"
        for piece in site.pieces
    }


class Quantised:
    """Other weights, with their matrices rounded to `bits` bits and back.

    Attributes:
        weights: the others.
        bits: of a weight.
        group: inputs that share a scale; None gives each output one.
        tensors: stored matrices to round, and whether each lies as (d_in, d_out).
    """

    def __init__(self, weights: Weights, bits: int, group: int | None, tensors: dict[str, bool]) -> None:
        """Say what is rounded, and how."""
        self.weights, self.bits, self.group, self.tensors = weights, bits, group, tensors

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint with configuration, names, shapes and dtypes."""
        return self.weights.checkpoint

    def read_into(self, out: torch.Tensor, info: TensorInfo) -> None:
        """Fill `out` (flat, any floating dtype) with the tensor `info`, one matrix rounded at a time."""
        self.weights.read_into(out, info)
        if info.name not in self.tensors:
            return
        for matrix in out.view(-1, *info.shape[-2:]):
            rows = matrix.T if self.tensors[info.name] else matrix
            rows.copy_(round_to_nearest(rows, self.bits, self.group))


def round_to_nearest(matrix: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """Round every weight to the nearest of 2^bits − 1 values that are symmetric about 0, and scale back.

    Args:
        matrix: (d_out, d_in).
        bits: at least 2.
        group: inputs that share a scale, the last group may be shorter; None for all of them.

    Returns:
        (d_out, d_in), float32.
    """
    top = 2 ** (bits - 1) - 1
    parts = []
    for part in matrix.float().split(group or matrix.shape[1], dim=1):
        scale = part.abs().amax(1, keepdim=True).div_(top).clamp_(min=torch.finfo(torch.float32).tiny)
        parts.append((part / scale).round_().clamp_(-top, top).mul_(scale))
    return torch.cat(parts, 1)
