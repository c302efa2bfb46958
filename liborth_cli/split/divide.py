"""From two checkpoints to the skill part of one matrix: read, subtract, divide. Runs beside the writer."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from liborth_kernels.update import update

from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.pair import Item
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.checkpoint.tensors import as_tensor
from liborth_cli.errors import BadInput
from liborth_cli.linalg.truncated import energy
from liborth_cli.methods import Layer
from liborth_cli.split.factors import FactorSource
from liborth_cli.split.matrix import MatrixReport, SplitOptions, split_matrix

PIECE = 1 << 18
"""Elements handled at a time in elementwise work: small enough for the cache, large enough for the call."""
AHEAD_BYTES = 32 << 20
"""Updates that may be in memory at a time, unless a single one is larger: then it is alone."""

Skill = tuple[torch.Tensor | None, MatrixReport | None]
"""U_s, flat, and what was done; nothing where there was nothing to divide."""


@dataclass(frozen=True)
class Job:
    """One matrix to divide: the `number`-th of a tensor's stack."""

    item: Item
    number: int

    @property
    def wide(self) -> bool:
        """Whether the arithmetic is float64."""
        return self.item.reference is not None and "F64" in (self.item.reference.dtype, self.item.tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Size of the update in memory."""
        _, rows, cols = self.item.grid
        return rows * cols * (8 if self.wide else 4)


def budget(jobs: list[Job]) -> int:
    """Return how many bytes of updates may be in memory at a time."""
    return max([AHEAD_BYTES, *(job.nbytes for job in jobs)])


@dataclass(frozen=True)
class Divider:
    """Divides matrices of a pair.

    Attributes:
        reference: W_r.
        finetuned: W_f.
        options: the split.
        factors: what the method needs of each matrix.
        device: where matrices are decomposed.
    """

    reference: Checkpoint
    finetuned: Checkpoint
    options: SplitOptions
    factors: FactorSource
    device: torch.device

    def skill(self, job: Job) -> Skill:
        """Form one matrix's update and divide it; nothing when there is nothing to divide."""
        item, (_, rows, cols) = job.item, job.item.grid
        old, new, first = item.reference, item.tensor, job.number * rows * cols
        assert old is not None
        flat = torch.empty(rows * cols, dtype=torch.float64 if job.wide else torch.float32)
        total = 0.0
        for start, stop in pieces(first, first + rows * cols):
            out = flat[start - first : stop - first]
            update(load_elements(self.finetuned, new, start, stop), load_elements(self.reference, old, start, stop), out)
            total += energy(out)
        if not math.isfinite(total):
            return self._nonfinite(item, flat)
        if total == 0.0:
            return None, None
        options = self.options
        seed = zlib.crc32(f"{item.twin}/{first}".encode()) ^ (options.seed & 0xFFFFFFFF) | (options.seed >> 32) << 32
        generator = torch.Generator().manual_seed(seed)
        matrix = flat.view(rows, cols).to(self.device)
        layer = Layer(new.name, matrix, total, generator, options.tolerance)
        factors = self.factors.of(item.twin, job.number)
        if factors is None:
            skill, report = split_matrix(layer, options)
            return skill.cpu().reshape(-1), report
        layer.retain, layer.forget, layer.diagonal = factors.retain, factors.forget, factors.diagonal
        if factors.transposed:
            layer.update = matrix.T.contiguous()
        skill, report = split_matrix(layer, options)
        return (skill.T if factors.transposed else skill).cpu().contiguous().reshape(-1), report

    def _nonfinite(self, item: Item, flat: torch.Tensor) -> tuple[None, None]:
        if self.options.nonfinite == "refuse":
            count = int((~torch.isfinite(flat)).sum())
            what = f"{count} NaN or infinite values" if count else "values too large for float32 arithmetic"
            raise BadInput(
                f"tensor {item.tensor.name!r} ({item.tensor.shard}): its update has {what}; leave such tensors as they are "
                "with --nonfinite passthrough, or exclude this one with -e"
            )
        return None, None


def pieces(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Cut a range of elements into pieces that fit the cache."""
    for start in range(first, last, PIECE):
        yield start, min(start + PIECE, last)


def read_elements(side: Checkpoint, tensor: TensorInfo, start: int, stop: int) -> np.ndarray:
    """Read the bits of elements [start, stop) of a tensor, uint8."""
    width = DTYPES[tensor.dtype].bits // 8
    return side.read(tensor.name, start * width, stop * width)


def load_elements(side: Checkpoint, tensor: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Read elements [start, stop) of a tensor, flat."""
    return as_tensor(read_elements(side, tensor, start, stop), tensor.dtype)
