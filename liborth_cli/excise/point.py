"""W(β), tensor by tensor: the bytes of a checkpoint between general and fine-tuned, or beyond, in pieces that fit a cache.

The way is the straight line, or, as an experiment, the geodesic of the retain curvature (`Ends`). Its ends are bits that are
there, never arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.checkpoint import delta
from liborth_cli.checkpoint.dtypes import DTYPES, as_bytes, as_tensor
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.errors import PairMismatch

if TYPE_CHECKING:
    from liborth_cli.ends import Ends
    from liborth_cli.manifest import Tensor

PIECE = 1 << 20
"""Bytes handled at a time."""


@dataclass(frozen=True)
class PathPoint:
    """The weights at one point.

    Attributes:
        general: W_g.
        beta: how much memory.
        memory: the delta; None at β = 0, where it is not needed.
        reference: W_r; None where `alpha` is 1.
        alpha: factor on the skill part, over that of the split.
        records: tensor → what the split did with it; of another α only.
        ends: retain factors at W_g and at W_f, where the way is a geodesic; None where it is straight.
    """

    general: Checkpoint
    beta: float
    memory: delta.Memory | None
    reference: Checkpoint | None
    alpha: float
    records: Mapping[str, Tensor]
    ends: Ends | None

    @property
    def untouched(self) -> bool:
        """Whether these are the general weights themselves."""
        return self.memory is None and self.alpha == 1.0

    @property
    def exact(self) -> bool:
        """Whether these are the fine-tuned weights themselves."""
        return self.beta == 1.0 and self.alpha == 1.0

    def pieces(self, tensor: TensorInfo) -> Iterator[np.ndarray]:
        """Yield the bytes of one output tensor."""
        if tensor.name not in self.general.tensors:
            assert self.memory is not None
            yield from _raw(self.memory.checkpoint, delta.WHOLE + tensor.name, tensor.nbytes)
            return
        if self.memory and (grown := self.memory.grown.get(tensor.name)):
            yield from grown.pieces(self.general, self.memory.checkpoint, tensor.name, self.beta)
            return
        if self.ends is not None and self.memory and tensor.name in self.ends.layers and 0.0 < self.beta < 1.0:
            yield self._on_geodesic(tensor, self.ends, self.memory)
            return
        old = self._reference_of(tensor) if self.alpha != 1.0 else None
        start = 0
        for bits in _raw(self.general, tensor.name, tensor.nbytes):
            finetuned = self.memory.reattach(tensor.name, bits, start) if self.memory else bits
            if old is not None:
                yield self._rescale(tensor, bits, finetuned, old, start)
            elif finetuned is bits:
                yield bits
            else:
                yield delta.blend(bits, finetuned, self.beta, tensor.dtype)
            start += len(bits)

    def _on_geodesic(self, tensor: TensorInfo, ends: Ends, memory: delta.Memory) -> np.ndarray:
        """Return the bits of one matrix on the geodesic from general to fine-tuned; what the two share stays as it is."""
        from liborth_kernels.rounding import round_to

        from liborth_cli.checkpoint.dtypes import torch_dtype

        general = self.general.read(tensor.name)
        finetuned = memory.reattach(tensor.name, general)
        if finetuned is general:
            return general
        w_g, w_f = (as_tensor(bits, tensor.dtype).view(tensor.shape) for bits in (general, finetuned))
        return as_bytes(round_to(ends.at(tensor.name, w_g, w_f, self.beta), torch_dtype(tensor.dtype)))

    def _rescale(
        self, tensor: TensorInfo, general: np.ndarray, finetuned: np.ndarray, old: TensorInfo, start: int
    ) -> np.ndarray:
        """Blend with another α, on the elements that the reference has."""
        from liborth_kernels.interpolate import interpolate

        assert self.reference is not None
        w_g, w_f, beta = as_tensor(general, tensor.dtype), as_tensor(finetuned, tensor.dtype), self.beta
        width, old_width = DTYPES[tensor.dtype].bits // 8, DTYPES[old.dtype].bits // 8
        first = start // width
        shared = max(min(old.nbytes // old_width - first, len(w_g)), 0)
        parts = [as_bytes(interpolate(w_g[shared:], w_f[shared:], beta))] if shared < len(w_g) else []
        if shared:
            w_r = as_tensor(self.reference.read(old.name, first * old_width, (first + shared) * old_width), old.dtype)
            parts.insert(0, as_bytes(interpolate(w_g[:shared], w_f[:shared], beta, w_r, self.alpha)))
        return np.concatenate(parts)

    def _reference_of(self, tensor: TensorInfo) -> TensorInfo | None:
        assert self.reference is not None
        record = self.records.get(tensor.name)
        if record is None or record.action != "split":
            return None
        old = self.reference.tensors.get(record.reference or record.tied_to or tensor.name)
        if old is None or old.shape[1:] != tensor.shape[1:]:
            raise PairMismatch(f"{self.reference.path}: has no {tensor.name!r} that fits; is this the right reference?")
        return old


def _raw(side: Checkpoint, name: str, nbytes: int) -> Iterator[np.ndarray]:
    for start in range(0, nbytes, PIECE):
        yield side.read(name, start, min(start + PIECE, nbytes))
