"""Weights of a model, wherever they come from: stored, on the path between two checkpoints, blended, moved or rounded.

What need not exist on disk is formed tensor by tensor while it is read, in memory that is used again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from liborth_cli.checkpoint.dtypes import torch_dtype
from liborth_cli.checkpoint.pair import Policy, match
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.errors import UsageError
from liborth_cli.stream.host import portions, send, sent


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
            items = match(self.reference, self.finetuned, Policy()).items
            self._old = {item.tensor.name: item.reference for item in items}

    @property
    def same_names(self) -> bool:
        """Whether every tensor of the fine-tuned checkpoint has the reference's name for it, where there is one."""
        return all(old is None or old.name == name for name, old in self._old.items())

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
        shared = min(math.prod(old.shape), math.prod(info.shape)) if old is not None and self.t < 1.0 else 0
        count = math.prod(info.shape)
        if not shared and out.device.type == "cpu" and out.dtype == torch_dtype(info.dtype) and count:
            self.finetuned.read(info.name, out=out.view(torch.uint8).numpy())
            return
        for start, stop in portions(0, count, out.device):
            target = out[start:stop]
            if old is None or start >= shared:
                send(self.finetuned, info.name, start, stop, target)
                continue
            assert self.reference is not None
            middle = min(stop, shared)
            reference = sent(self.reference, old.name, start, middle, out.device)
            if self.t == 0.0:
                target[: middle - start].copy_(reference)
            else:
                wide = torch.float64 if "F64" in (info.dtype, old.dtype) else torch.float32
                reference = reference.to(wide)
                finetuned = sent(self.finetuned, info.name, start, middle, out.device).to(wide)
                target[: middle - start].copy_(reference.add_(finetuned.sub_(reference), alpha=self.t))
            if middle < stop:
                send(self.finetuned, info.name, middle, stop, target[middle - start :])


@dataclass
class Moved:
    """W = base + c·(to − origin), formed tensor by tensor while it is read.

    Where `to` and `origin` agree to the bit, W is `base` to the bit. One tensor of each is in memory at a time.

    Attributes:
        base: where the move begins.
        c: how far.
        to: where the difference points.
        origin: where the difference begins; often `base` itself, which is then read once.
    """

    base: Weights
    c: float
    to: Weights
    origin: Weights

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that has the configuration: that of `base`."""
        return self.base.checkpoint

    def read_into(self, out: torch.Tensor, info: TensorInfo) -> None:
        """Fill `out` (flat, any floating dtype) with the tensor `info`; the sum is float32, or float64 for wider ones."""
        wide = torch.float64 if info.dtype == "F64" or out.dtype == torch.float64 else torch.float32
        start = torch.empty(out.numel(), dtype=wide)
        self.base.read_into(start, info)
        if self.c != 0.0:
            step = torch.empty_like(start)
            self.to.read_into(step, info)
            if self.origin is self.base:
                step.sub_(start)
            else:
                taken = torch.empty_like(start)
                self.origin.read_into(taken, info)
                step.sub_(taken)
            start.add_(step, alpha=self.c)
        out.copy_(start)


@dataclass
class Patched:
    """Some tensors of one model, all others of another.

    Attributes:
        base: where most are from.
        other: where those are from that `takes` names.
        takes: stored name → whether it is taken from `other`.
    """

    base: Weights
    other: Weights
    takes: Callable[[str], bool]

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that has the configuration: that of `base`."""
        return self.base.checkpoint

    def read_into(self, out: torch.Tensor, info: TensorInfo) -> None:
        """Fill `out` (flat, any floating dtype) with the tensor `info`."""
        (self.other if self.takes(info.name) else self.base).read_into(out, info)


def between(start: Weights, end: Weights, t: float) -> Weights:
    """Return the point (1 − t)·start + t·end; the ends are the models themselves, to the bit.

    Args:
        start: W at t = 0.
        end: W at t = 1, of the same shapes.
        t: where on the line; beyond the ends too.
    """
    if t == 0.0:
        return start
    return end if t == 1.0 else Moved(start, t, end, start)


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
