"""The update of a tall matrix, such as an embedding, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from liborth_kernels.update import update

from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo, pieces
from liborth_cli.linalg.truncated import energy

BLOCK_BYTES = 8 << 20
"""Of a block of rows on the CPU."""
DEVICE_BLOCK_BYTES = 256 << 20
"""On a GPU, which needs many rows to be busy and pays for every transfer."""


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
        device: where the blocks go. On a GPU both weights are sent as they are stored and subtracted there: for two-byte
            weights that is as many bytes as the update, and the host has nothing to compute.
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
        buffer = torch.empty(min(self._step, rows) * cols, dtype=self.dtype, device=self.device)
        if self._on_device:
            for finetuned, reference in self.pairs() or ():
                yield update(finetuned, reference, buffer[: finetuned.numel()].view(-1, cols))
            return
        for start in range(0, rows, self._step):
            count = min(self._step, rows - start) * cols
            self._fill(buffer[:count], self.first + start * cols)
            yield buffer[:count].view(-1, cols)

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]] | None:
        """Return the same blocks as W_f and W_r, on a GPU; None on the CPU."""
        return self._pairs() if self._on_device else None

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rows, cols = self.shape
        for start in range(0, rows, self._step):
            here, there = self.first + start * cols, self.first + min(start + self._step, rows) * cols
            sides = ((self.finetuned, self.new), (self.reference, self.old))
            new, old = (side.load_elements(tensor.name, here, there).to(self.device).view(-1, cols) for side, tensor in sides)
            yield new, old

    @property
    def _on_device(self) -> bool:
        return self.device.type != "cpu"

    @property
    def _step(self) -> int:
        """Rows of a block."""
        size = DEVICE_BLOCK_BYTES if self._on_device else BLOCK_BYTES
        return max(size // (self.dtype.itemsize * self.shape[1]), 1)

    def all(self, out: torch.Tensor) -> float:
        """Write all of it into `out` (m·n,), on the device, and return ‖U‖²."""
        if self._on_device:
            start = 0
            for block in self.blocks():
                out[start : start + block.numel()] = block.view(-1)
                start += block.numel()
            return energy(out)
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
            finetuned = self.finetuned.load_elements(self.new.name, start, stop)
            reference = self.reference.load_elements(self.old.name, start, stop)
            update(finetuned, reference, out[start - first : stop - first])
