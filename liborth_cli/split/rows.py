"""The update of a tall matrix, such as an embedding, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from liborth_kernels.update import update

from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.linalg.truncated import energy
from liborth_cli.split.elements import load_elements, pieces

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class UpdateRows:
    """U = W_f − W_r of one matrix; every look reads both again.

    Attributes:
        reference: W_r.
        finetuned: W_f.
        old: the tensor in the reference.
        new: the tensor in the fine-tuned checkpoint.
        first: its first element that belongs to this matrix.
        shape: (m, n).
        dtype: float32 or float64.
        device: where the blocks go.
    """

    reference: Checkpoint
    finetuned: Checkpoint
    old: TensorInfo
    new: TensorInfo
    first: int
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield blocks of rows, top to bottom, in memory that is used again."""
        rows, cols = self.shape
        step = max(BLOCK_BYTES // (self.dtype.itemsize * cols), 1)
        buffer = torch.empty(min(step, rows) * cols, dtype=self.dtype)
        for start in range(0, rows, step):
            count = min(step, rows - start) * cols
            self._fill(buffer[:count], self.first + start * cols)
            yield buffer[:count].view(-1, cols).to(self.device)

    def all(self, out: torch.Tensor) -> float:
        """Write all of it into `out` (m·n,), on the host, and return ‖U‖²."""
        total = []
        for start, stop in pieces(0, len(out)):
            self._fill(out[start:stop], self.first + start)
            total.append(energy(out[start:stop]))
        return math.fsum(total)

    def energy(self) -> float:
        """Return ‖U‖²."""
        return math.fsum(energy(block) for block in self.blocks())

    def _fill(self, out: torch.Tensor, first: int) -> None:
        for start, stop in pieces(first, first + len(out)):
            finetuned = load_elements(self.finetuned, self.new, start, stop)
            reference = load_elements(self.reference, self.old, start, stop)
            update(finetuned, reference, out[start - first : stop - first])
