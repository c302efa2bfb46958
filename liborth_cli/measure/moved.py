"""Weights moved along the difference of two others: points between models, and sums of streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.stream.weights import Weights


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
