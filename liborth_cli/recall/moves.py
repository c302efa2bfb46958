"""What steps have moved, and a model that has moved."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from liborth_kernels.rounding import round_to

from liborth_cli.checkpoint.dtypes import torch_dtype
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.curvature.selection import Factored
from liborth_cli.machine import spare_bytes
from liborth_cli.stream.weights import Weights

SHARE = 4
"""Tensors that take more than one part in so many of the memory that is free lie in a scratch file."""


def room(elements: int, folder: Path) -> torch.Tensor:
    """Return zeros, (elements,), float32, in memory; where that is short, in a file that is gone when the process is.

    Args:
        elements: how many.
        folder: private, for the file.
    """
    if 4 * elements < spare_bytes() // SHARE:
        return torch.zeros(elements)
    with tempfile.NamedTemporaryFile(prefix="moved-", dir=folder) as file:
        return torch.from_file(file.name, shared=True, size=elements)


class Moves:
    """A move of some stored tensors, float32.

    Attributes:
        flat: all of it, one after the other.
        tensors: by name, of the stored shapes; views of `flat`.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
        """Begin with no move.

        Args:
            shapes: of the stored tensors.
            folder: private, for a scratch file where memory is short.
        """
        self.flat, self.tensors, start = room(sum(map(math.prod, shapes.values())), folder), dict[str, torch.Tensor](), 0
        for name, shape in shapes.items():
            self.tensors[name] = self.flat[start : start + math.prod(shape)].view(shape)
            start += math.prod(shape)

    def of(self, target: Factored) -> torch.Tensor:
        """Return the move of one matrix, (d_out, d_in): a view, whatever way round it is stored."""
        found = self.tensors[target.tensor]
        found = found if target.matrix is None else found[target.matrix]
        return found.T if target.transposed else found

    def add(self, other: Moves) -> None:
        """Go on by a move of some of the same tensors."""
        for name, tensor in other.tensors.items():
            self.tensors[name].add_(tensor)


def dot(one: Moves, other: Moves) -> float:
    """Return the inner product of two moves of the same tensors, summed in float64 tensor by tensor."""
    return sum(float(one.tensors[name].double().view(-1) @ t.double().view(-1)) for name, t in other.tensors.items())


@dataclass(frozen=True)
class Stepped:
    """W + Δ + c·D, rounded as it would be stored, formed tensor by tensor while it is read.

    Attributes:
        start: W.
        moved: Δ.
        step: D, or None.
        c: how much of it.
    """

    start: Weights
    moved: Moves
    step: Moves | None = None
    c: float = 1.0

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that has the configuration: that of `start`."""
        return self.start.checkpoint

    def read_into(self, out: torch.Tensor, info: TensorInfo) -> None:
        """Fill `out` (flat, any floating dtype, on any device) with the tensor `info`."""
        self.start.read_into(out, info)
        if info.name not in self.moved.tensors:
            return
        total = self.moved.tensors[info.name].view(-1)
        if self.step is not None:
            total = total.add(self.step.tensors[info.name].view(-1), alpha=self.c)
        out.copy_(round_to(out + total.to(out.device), torch_dtype(info.dtype)))
