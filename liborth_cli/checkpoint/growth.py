"""Neurons that only the memory has: rows and columns that follow those of the general checkpoint's tensors.

A model with more neurons is the general one with longer matrices. The general part is never touched, so taking the neurons
out is exact. In a memory file:

    rows/<tensor>            what follows the tensor's last row (its last element, for a vector)
    columns/<tensor>         what follows the last column of every row
    scaled-rows/<tensor>, scaled-columns/<tensor>    the same, for weights that β multiplies: those out of a neuron
    sidecar/<file>           a file beside the weights as it reads with the neurons in (config.json)
    router/<name>            weights that no ordinary checkpoint has a place for
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from liborth_kernels import interpolate_numpy

from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.errors import BadInput, PairMismatch, UsageError

ROWS, COLUMNS, SCALED_ROWS, SCALED_COLUMNS = "rows/", "columns/", "scaled-rows/", "scaled-columns/"
SIDECAR, ROUTER = "sidecar/", "router/"
KINDS = {ROWS: (0, False), COLUMNS: (1, False), SCALED_ROWS: (0, True), SCALED_COLUMNS: (1, True)}
"""prefix → (axis the tensor grows along, whether β multiplies what is added)."""
PIECE_ROWS = 256


@dataclass(frozen=True)
class Growth:
    """What a memory adds to one tensor.

    Attributes:
        entry: where it lies in the memory file.
        axis: 0 for rows, 1 for columns.
        scaled: whether β multiplies it.
    """

    entry: TensorInfo
    axis: int
    scaled: bool

    def widen(self, tensor: TensorInfo) -> TensorInfo:
        """Return the tensor as it is with the neurons in.

        Raises:
            PairMismatch: when the two do not fit.
        """
        mine, other = list(self.entry.shape), list(tensor.shape)
        if len(mine) != len(other) or len(mine) <= self.axis or self.entry.dtype != tensor.dtype:
            raise PairMismatch(f"{self.entry.name!r} in the memory file does not fit the general checkpoint")
        added, before = mine.pop(self.axis), other.pop(self.axis)
        if mine != other:
            raise PairMismatch(f"{self.entry.name!r} in the memory file does not fit the general checkpoint")
        shape = (*tensor.shape[: self.axis], before + added, *tensor.shape[self.axis + 1 :])
        return replace(tensor, shape=shape, nbytes=tensor.nbytes + self.entry.nbytes)

    def pieces(self, general: Checkpoint, memory: Checkpoint, name: str, beta: float) -> Iterator[np.ndarray]:
        """Yield the bytes of the grown tensor, a few rows at a time.

        Args:
            general: has the tensor.
            memory: has what is added.
            name: of the tensor.
            beta: what the scaled weights are multiplied by; 1 leaves every bit as it is.
        """
        old, columns = general.tensors[name], self.axis == 1
        rows = old.shape[0]
        width = old.nbytes // rows
        added = self.entry.nbytes // rows if columns else 0
        for start in range(0, rows, PIECE_ROWS):
            stop = min(start + PIECE_ROWS, rows)
            part = general.read(name, start * width, stop * width)
            if columns:
                more = self._read(memory, start * added, stop * added, beta)
                part = np.concatenate([part.reshape(stop - start, -1), more.reshape(stop - start, -1)], 1).reshape(-1)
            yield part
        if not columns:
            yield self._read(memory, 0, self.entry.nbytes, beta)

    def _read(self, memory: Checkpoint, start: int, stop: int, beta: float) -> np.ndarray:
        bits = memory.read(self.entry.name, start, stop)
        if not self.scaled or beta == 1.0:
            return bits
        zero = np.zeros_like(bits)
        if self.entry.dtype in interpolate_numpy.SUPPORTED:
            return interpolate_numpy.interpolate(zero, bits, beta, self.entry.dtype)
        from liborth_kernels.interpolate import interpolate

        from liborth_cli.checkpoint.tensors import as_bytes, as_tensor

        dtype = self.entry.dtype
        return as_bytes(interpolate(as_tensor(zero, dtype), as_tensor(bits, dtype), beta))


def find(memory: Checkpoint) -> dict[str, Growth]:
    """Return tensor name → what a memory file adds to it."""
    return {
        name.removeprefix(prefix): Growth(info, axis, scaled)
        for name, info in memory.tensors.items()
        for prefix, (axis, scaled) in KINDS.items()
        if name.startswith(prefix) and DTYPES[info.dtype].editable
    }


def sidecars(memory: Checkpoint) -> dict[str, bytes]:
    """Return the files beside the weights that read differently with the neurons in, by name.

    Raises:
        BadInput: when the memory names a file that it has no business with.
    """
    names = [name.removeprefix(SIDECAR) for name in memory.tensors if name.startswith(SIDECAR)]
    if set(names) - {"config.json"}:
        raise BadInput(f"{memory.path}: wants to write {min(set(names) - {'config.json'})!r} beside the weights; refused")
    return {name: memory.read(SIDECAR + name).tobytes() for name in names}


def check_excisable(memory: Checkpoint) -> None:
    """Raise UsageError when the neurons work only behind a router."""
    if any(name.startswith(ROUTER) for name in memory.tensors):
        raise UsageError(
            f"{memory.path}: this memory stands behind a router, which no checkpoint has a place for; "
            "load it with liborth_cli.tune.sinks.attach, or take --beta 0"
        )
