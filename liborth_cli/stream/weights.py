"""Weights of a model at a point on the path W_r + t·(W_f − W_r), read into memory that is used again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch

from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.pair import Policy, match
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.checkpoint.tensors import as_tensor, torch_dtype
from liborth_cli.errors import UsageError

PIECE = 1 << 18
"""Elements converted at a time: small enough for the cache, large enough for the call."""


class Weights(Protocol):
    """A model's weights, wherever they come from; they need not exist on disk."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that has the configuration, and the name, shape and dtype of every tensor."""
        ...

    def read_into(self, out: torch.Tensor, info: TensorInfo) -> None:
        """Fill `out` (flat, any floating dtype, on any device) with the tensor `info`."""
        ...


@dataclass
class Point:
    """Where on the path between two checkpoints the model stands.

    Attributes:
        finetuned: W_f.
        reference: W_r, or None when the point is W_f.
        t: 0 is W_r, 1 is W_f.
    """

    finetuned: Checkpoint
    reference: Checkpoint | None = None
    t: float = 1.0
    _old: dict[str, TensorInfo | None] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Hold the pair together.

        Raises:
            PairMismatch: when the two checkpoints do not fit.
            UsageError: when the point is off the path, or a reference is missing or useless.
        """
        if not 0.0 <= self.t <= 1.0:
            raise UsageError(f"--at {self.t:g}: the path runs from 0 (the reference) to 1 (the model)")
        if self.reference is None and self.t != 1.0:
            raise UsageError(f"--at {self.t:g} needs --reference, the checkpoint before fine-tuning")
        if self.reference is not None:
            items = match(self.reference, self.finetuned, Policy())
            self._old = {item.tensor.name: item.reference for item in items}

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that has the configuration: the fine-tuned one."""
        return self.finetuned

    def read_into(self, out: torch.Tensor, info: TensorInfo) -> None:
        """Fill `out` (flat, any floating dtype, on any device) with the tensor `info` at this point.

        The blend is computed in float32 (float64 when a side is float64) and never rounded to the stored dtype. Rows that
        the reference does not have are the fine-tuned ones.
        """
        old = self._old.get(info.name)
        shared = math.prod(old.shape) if old is not None and self.t < 1.0 else 0
        count = math.prod(info.shape)
        if not shared and out.device.type == "cpu" and out.dtype == torch_dtype(info.dtype) and count:
            self.finetuned.read(info.name, out=out.view(torch.uint8).numpy())
            return
        for start in range(0, count, PIECE):
            stop = min(start + PIECE, count)
            target = out[start:stop]
            if old is None or start >= shared:
                target.copy_(_load(self.finetuned, info, start, stop))
                continue
            middle = min(stop, shared)
            reference = _load(self.reference, old, start, middle)
            if self.t == 0.0:
                target[: middle - start].copy_(reference)
            else:
                wide = torch.float64 if "F64" in (info.dtype, old.dtype) else torch.float32
                reference = reference.to(wide)
                finetuned = _load(self.finetuned, info, start, middle).to(wide)
                target[: middle - start].copy_(reference.add_(finetuned.sub_(reference), alpha=self.t))
            if middle < stop:
                target[middle - start :].copy_(_load(self.finetuned, info, middle, stop))


class Arena:
    """One stretch of memory that holds the weights of one stage after the other.

    Fresh memory costs a page fault for every 4 KiB, which takes longer than reading the weights from a warm cache.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """Start empty; the arena grows to the largest stage."""
        self._dtype, self._flat = dtype, torch.empty(0, dtype=dtype, device=device)
        self._used = 0

    def reset(self, elements: int) -> None:
        """Forget what it holds and make room for so many elements."""
        self._used = 0
        if self._flat.numel() < elements:
            device = self._flat.device
            self._flat = torch.empty(0, dtype=self._dtype, device=device)
            self._flat = torch.empty(elements, dtype=self._dtype, device=device)

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Hand out the next stretch, contiguous, of this shape."""
        count = math.prod(shape)
        taken = self._flat[self._used : self._used + count].view(shape)
        self._used += -(-count // 64) * 64
        return taken


def padded(shape: tuple[int, ...]) -> int:
    """Return the elements an arena spends on a tensor: a multiple of 64, so that every tensor starts on a cache line."""
    return -(-math.prod(shape) // 64) * 64


def _load(side: Checkpoint | None, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    assert side is not None
    width = DTYPES[info.dtype].bits // 8
    return as_tensor(side.read(info.name, start * width, stop * width), info.dtype)
