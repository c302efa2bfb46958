"""Paths between two models that are not straight: one bend, trained to keep the loss low, and the geodesic of the curvature.

The bend is a quadratic Bézier curve, W(t) = (1 − t)²·W₀ + 2t(1 − t)·B + t²·W₁, whose B minimises the mean loss along it
(Garipov et al. 2018, arXiv 1802.10026). It begins half way, as the straight line. A few rows are soon learnt by heart, so
others judge the bend while it is trained, and the best that was seen is kept, the straight line included. The geodesic has
nothing to train (`liborth_cli.methods.geodesic`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import torch

from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.ends import Ends
from liborth_cli.measure.scores import Evaluator, mean_loss
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Weights, between
from liborth_cli.tune.data import Example
from liborth_cli.tune.full import LOSS, Full, Lesson
from liborth_cli.tune.loop import Watch, train
from liborth_cli.tune.options import LoopOptions, Schedule

RATE, WIDTH = 1e-3, 128
"""AdamW's highest rate at a hidden width of 128; it falls with the width, and in a straight line over the steps."""
BATCH_ROWS = 8
COPIES = 8
"""float32 numbers a weight while the bend is trained: both ends, the bend and the best so far, gradient, moments, the model."""
LOOKS, JUDGED = 10, (0.25, 0.5, 0.75)
"""How often the bend is judged while it is trained, and at which points of the curve."""


class Curved:
    """A point of a way that is not straight, formed tensor by tensor while it is read; subclasses say how a tensor bends.

    Attributes:
        start: W₀.
        end: W₁.
        t: where.
    """

    start: Weights
    end: Weights
    t: float

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that has the configuration: that of `start`."""
        return self.start.checkpoint

    @property
    def bent(self) -> Container[str]:
        """The stored tensors that leave the straight line."""
        raise NotImplementedError

    def at(self, name: str, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Return one of them at t, given both ends in float32, all as stored."""
        raise NotImplementedError

    def read_into(self, out: torch.Tensor, info: TensorInfo) -> None:
        """Fill `out` (flat, any floating dtype) with the tensor `info`."""
        if info.name not in self.bent:
            between(self.start, self.end, self.t).read_into(out, info)
            return
        first, last = torch.empty(out.numel()), torch.empty(out.numel())
        self.start.read_into(first, info)
        self.end.read_into(last, info)
        out.copy_(self.at(info.name, first.view(info.shape), last.view(info.shape)).reshape(-1))


@dataclass
class Bezier(Curved):
    """The point of a curve with one bend.

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
    def bent(self) -> Container[str]:
        """What has a bend."""
        return self.bend

    def at(self, name: str, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Sum the three in float32."""
        return on_curve(first, self.bend[name], last, self.t)


@dataclass
class Geodesic(Curved):
    """The point of a geodesic of the retain curvature.

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
    def bent(self) -> Container[str]:
        """What has factors at both ends."""
        return self.ends.layers

    def at(self, name: str, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """See `Ends.at`."""
        return self.ends.at(name, first, last, self.t)


def on_curve(start: torch.Tensor, bend: torch.Tensor, end: torch.Tensor, t: float) -> torch.Tensor:
    """Return (1 − t)²·start + 2t(1 − t)·bend + t²·end; all of one shape."""
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t * t * end


class Bend(Full):
    """Trains the bend: each step reads its rows at a point of the curve, and moves the bend by what the model there feels.

    Attributes:
        parameters: B, by the model's names.
    """

    def __init__(self, model: BlockModel, ends: tuple[Weights, Weights], seed: int) -> None:
        """Begin half way, on the straight line; the model's own weights are lost."""
        model.use(between(*ends, 0.5))
        model.load_all()
        held = {n: p for n, p in model.model.named_parameters() if n in model.pieces and p.is_floating_point()}
        self._held, self._ends = held, {name: tuple(model.read(name, one) for one in ends) for name in held}
        self._draw, self._t = torch.Generator().manual_seed(seed), 0.5
        super().__init__(model.model, {name: torch.nn.Parameter(p.detach().clone()) for name, p in held.items()})
        for p in held.values():
            p.requires_grad_(True)

    def lessons(self, rows: Sequence[Example], number: int) -> list[Lesson]:
        """Put the model at a point that is drawn evenly from (0, 1)."""
        self._t = float(torch.rand((), generator=self._draw))
        self.go_to(self._t)
        return [Lesson(LOSS, rows, self._held)]

    @torch.no_grad()
    def go_to(self, t: float) -> None:
        """Put the model at one point of the curve."""
        for name, p in self._held.items():
            first, last = self._ends[name]
            p.copy_(on_curve(first, self.parameters[name], last, t))

    def before_step(self) -> None:
        """Hand the model's gradient on: B's is 2t(1 − t) times that."""
        for name, p in self._held.items():
            self.parameters[name].grad = None if p.grad is None else 2 * self._t * (1 - self._t) * p.grad
            p.grad = None

    def finish(self) -> None:
        """Let the model ask for no gradients any more."""
        self.model.eval()
        for p in self._held.values():
            p.requires_grad_(False)


class Best(Watch):
    """Keeps the bend with the lowest loss along the curve on rows that do not train it.

    Attributes:
        bend: B of it, by the model's names.
        lowest: that loss, nats a token.
    """

    def __init__(self, training: Bend, judge: Evaluator, steps: int, advance: Callable[[int], None]) -> None:
        """Begin with the straight line."""
        self._training, self._judge, self._advance = training, judge, advance
        self._marks = {steps * look // LOOKS for look in range(1, LOOKS + 1)}
        self.lowest, self.bend = math.inf, dict[str, torch.Tensor]()
        self.look()

    def after(self, done: int) -> bool:
        """Look now and then."""
        if done in self._marks:
            self.look()
        self._advance(1)
        return True

    def look(self) -> None:
        """Judge the bend as it is."""
        self._training.model.eval()
        found = 0.0
        for t in JUDGED:
            self._training.go_to(t)
            found += mean_loss(self._judge.score()) / len(JUDGED)
        self._training.model.train()
        if found < self.lowest:
            self.lowest, self.bend = found, {name: p.detach().clone() for name, p in self._training.parameters.items()}


def train_bend(
    model: BlockModel,
    ends: tuple[Weights, Weights],
    rows: tuple[Sequence[Row], Sequence[Row]],
    steps: int,
    seed: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[str, torch.Tensor]:
    """Find the bend of the curve between two models that makes the loss along it low.

    Args:
        model: that runs weights of their shapes; its own are lost. All weights must fit, `COPIES` times.
        ends: W₀ and W₁.
        rows: to train on, and others that choose among the bends on the way.
        steps: how many.
        seed: of the draws and of the order.
        advance: told of every step.

    Returns:
        Stored name → B, float32.

    Raises:
        OutOfResources: when memory ran out.
    """
    learnt, judged = rows
    options = LoopOptions(
        steps=steps, batch_size=min(BATCH_ROWS, len(learnt)), rate=RATE * WIDTH / model.hidden, schedule=Schedule.LINEAR,
        warmup=0.0, seed=seed,
    )  # fmt: skip
    bend = Bend(model, ends, seed)
    best = Best(bend, Evaluator(model, judged), steps, advance)
    train(bend, [Example.of(row) for row in learnt], options, best)
    bend.finish()
    return {piece.tensor.name: piece.within(best.bend[name]).clone() for name in best.bend for piece in model.pieces[name]}
