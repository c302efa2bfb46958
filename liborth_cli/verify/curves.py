"""Paths between two models that are not straight: one bend, trained to keep the loss low, and the geodesic of the curvature.

The bend is a quadratic Bézier curve, W(t) = (1 − t)²·W₀ + 2t(1 − t)·B + t²·W₁, whose B minimises the mean loss along it
(Garipov et al. 2018, arXiv 1802.10026). The geodesic has nothing to train (`liborth_cli.methods.geodesic`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.ends import Ends
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Weights, between
from liborth_cli.tune.data import Batch, batch_rows
from liborth_cli.tune.full import Full

RATE, WIDTH = 1e-3, 128
"""AdamW's highest rate at a hidden width of 128; it falls with the width, and in a straight line over the steps."""
BATCH_ROWS = 8
COPIES = 7
"""float32 numbers a weight while the bend is trained: both ends, the bend, its gradient and moments, and the model itself."""


@dataclass
class Bezier:
    """The point of a curve with one bend, formed tensor by tensor while it is read.

    Attributes:
        start: W₀.
        bend: B, stored name → values; what is missing lies half way.
        end: W₁.
        t: where.
    """

    start: Weights
    bend: Mapping[str, torch.Tensor]
    end: Weights
    t: float

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that has the configuration: that of `start`."""
        return self.start.checkpoint

    def read_into(self, out: torch.Tensor, info: TensorInfo) -> None:
        """Fill `out` (flat, any floating dtype) with the tensor `info`, summed in float32."""
        if info.name not in self.bend:
            between(self.start, self.end, self.t).read_into(out, info)
            return
        first, last = torch.empty(out.numel()), torch.empty(out.numel())
        self.start.read_into(first, info)
        self.end.read_into(last, info)
        out.copy_(on_curve(first, self.bend[info.name].reshape(-1), last, self.t))


@dataclass
class Geodesic:
    """The point of a geodesic of the retain curvature, formed tensor by tensor while it is read.

    Attributes:
        start: W₀.
        end: W₁.
        ends: factors at both; tensors without them stay on the straight line.
        t: where, in [0, 1].
    """

    start: Weights
    end: Weights
    ends: Ends
    t: float

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that has the configuration: that of `start`."""
        return self.start.checkpoint

    def read_into(self, out: torch.Tensor, info: TensorInfo) -> None:
        """Fill `out` (flat, any floating dtype) with the tensor `info`."""
        if info.name not in self.ends.layers:
            between(self.start, self.end, self.t).read_into(out, info)
            return
        first, last = torch.empty(out.numel()), torch.empty(out.numel())
        self.start.read_into(first, info)
        self.end.read_into(last, info)
        out.copy_(self.ends.at(info.name, first.view(info.shape), last.view(info.shape), self.t).reshape(-1))


def on_curve(start: torch.Tensor, bend: torch.Tensor, end: torch.Tensor, t: float) -> torch.Tensor:
    """Return (1 − t)²·start + 2t(1 − t)·bend + t²·end; all of one shape."""
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t * t * end


def train_bend(
    model: BlockModel,
    ends: tuple[Weights, Weights],
    rows: Sequence[Row],
    steps: int,
    seed: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[str, torch.Tensor]:
    """Find the bend of the curve between two models that makes the loss along it low.

    It begins half way, on the straight line. Each step draws t evenly from (0, 1) and takes AdamW's step on the gradient at
    W(t), which is 2t(1 − t) times the model's own.

    Args:
        model: that runs weights of their shapes; its own are lost. All weights must fit, `COPIES` times.
        ends: W₀ and W₁.
        rows: to train on.
        steps: how many.
        seed: of the draws and of the order.
        advance: told of every step.

    Returns:
        Stored name → B, float32.
    """
    model.use(between(*ends, 0.5))
    model.load_all()
    held = {name: p for name, p in model.model.named_parameters() if name in model.pieces and p.is_floating_point()}
    fixed = {name: tuple(model.read(name, one) for one in ends) for name in held}
    bend = {name: torch.nn.Parameter(p.detach().clone()) for name, p in held.items()}
    method, draw = Full(model.model, held), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(bend.values(), weight_decay=0.0)
    model.model.train()
    for step in range(steps):
        t = float(torch.rand((), generator=draw))
        with torch.no_grad():
            for name, p in held.items():
                p.copy_(on_curve(fixed[name][0], bend[name], fixed[name][1], t))
                p.grad = None
        batch = Batch.of(batch_rows(rows, step, min(BATCH_ROWS, len(rows)), seed), model.device)
        (method.loss(batch)[0] / batch.tokens).backward()
        for name, p in held.items():
            bend[name].grad = None if p.grad is None else 2 * t * (1 - t) * p.grad
        torch.nn.utils.clip_grad_norm_(bend.values(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = RATE * WIDTH / model.hidden * (1 - step / steps)
        optimiser.step()
        advance(1)
    model.model.eval()
    for p in held.values():
        p.requires_grad_(False)
        p.grad = None
    return {piece.tensor.name: piece.within(bend[name].detach()).clone() for name in bend for piece in model.pieces[name]}
