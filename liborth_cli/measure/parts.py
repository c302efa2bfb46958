"""One part of a model at one input, as a graph that products with its Jacobian walk through as often as they like."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from liborth_cli.measure.thin import Bases, Thin
from liborth_cli.stream.model import BlockModel

Stage = dict[str, torch.Tensor]
"""A direction, a product or weights in one stage, by parameter."""


class Part:
    """One part of the model at one input, and products with its Jacobian, J = ∂(output)/∂(input, weights).

    J v comes from differentiating twice backwards: J v = ∂⟨v, Jᵀu⟩/∂u. Forward-mode differentiation takes a fifth less time
    on blocks of 64, but loads for five seconds, and leans on torch.jit, which is going away.

    Attributes:
        hidden: the input; None for the front.
        output: what comes out.
    """

    def __init__(
        self,
        model: BlockModel,
        run: Callable[[Any], torch.Tensor],
        hidden: torch.Tensor | None,
        weights: Stage,
        bases: Bases | None = None,
    ) -> None:
        """Run the part.

        Args:
            model: it belongs to, with its weights loaded.
            run: the part.
            hidden: as the attribute.
            weights: those of its parameters that products have to do with.
            bases: of weights that move within few directions; their part of a direction, and of a product, is the core.
        """
        thin = {name: Thin.of(weights[name], basis) for name, basis in (bases or {}).items() if name in weights}
        self._leaves = {n: thin[n].core if n in thin else w.detach().requires_grad_() for n, w in weights.items()}
        self.hidden = None if hidden is None else hidden.detach().requires_grad_()
        with torch.enable_grad(), model.replaced(self._leaves | thin):
            self.output = run(self.hidden)
        self._u, self._pulled = torch.empty(0), dict[str, torch.Tensor | None]()

    @property
    def _ends(self) -> dict[str, torch.Tensor]:
        """What J differentiates for; the input has no name."""
        return self._leaves if self.hidden is None else {**self._leaves, "": self.hidden}

    def differentiate(self, u: torch.Tensor | None = None) -> Part:
        """Form Jᵀu in a way that can be differentiated again, at the gradient u of the output; at 0 when None."""
        if self._ends and self.output.requires_grad:
            self._u = (torch.zeros_like(self.output) if u is None else u.detach()).requires_grad_()
            found = torch.autograd.grad(self.output, list(self._ends.values()), self._u, create_graph=True, allow_unused=True)
            self._pulled = dict(zip(self._ends, found, strict=True))
        return self

    @property
    def slope(self) -> torch.Tensor:
        """The gradient at the input, of the u that `differentiate` was given."""
        assert self.hidden is not None
        found = self._pulled.get("")
        return torch.zeros_like(self.hidden) if found is None else found.detach()

    def push(self, tangent: torch.Tensor | None, moving: Stage) -> torch.Tensor:
        """Return J v.

        Args:
            tangent: v at the input.
            moving: v at the weights.
        """
        sides = self._sides(tangent, moving)
        if not sides:
            return torch.zeros_like(self.output)
        return torch.autograd.grad([p for p, _ in sides], self._u, [t for _, t in sides], retain_graph=True)[0]

    def pull(
        self, gradient: torch.Tensor, moved: Iterable[str], curved: tuple[torch.Tensor | None, Stage] = (None, {})
    ) -> tuple[torch.Tensor, Stage]:
        """Return Jᵀ times a gradient of the output: at the input (of the front: as it came), and at some weights.

        Args:
            gradient: of the output.
            moved: the names of those weights.
            curved: a tangent at the input and at the weights; the derivative of Jᵀu along it is added.
        """
        wanted = {name: self._ends[name] for name in moved}
        wanted |= {"": self.hidden} if self.hidden is not None else {}
        if not wanted:
            return gradient, {}
        sides = self._sides(*curved)
        ends, starts = [self.output, *(p for p, _ in sides)], [gradient, *(t for _, t in sides)]
        found = torch.autograd.grad(ends, list(wanted.values()), starts, retain_graph=True, allow_unused=True)
        product = {
            name: torch.zeros_like(leaf) if each is None else each
            for (name, leaf), each in zip(wanted.items(), found, strict=True)
        }
        return product.pop("", gradient), product

    def _sides(self, tangent: torch.Tensor | None, moving: Stage) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pair what `differentiate` found with the tangents."""
        turns = moving if tangent is None else {**moving, "": tangent}
        pairs = ((self._pulled.get(name), turn) for name, turn in turns.items())
        return [(p, turn) for p, turn in pairs if p is not None and p.requires_grad]


@dataclass
class Head:
    """The tail at some positions of a batch, and the loss behind it.

    Attributes:
        part: the tail, (positions, hidden) → logits (positions, vocabulary).
        scale: what every position counts, (positions, 1); 0 where there is no loss.
        labels: the real next tokens, (positions,).
        p: what the model expects, (positions, vocabulary).
    """

    part: Part
    scale: torch.Tensor
    labels: torch.Tensor
    p: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Take the softmax once."""
        self.p = torch.softmax(self.part.output.detach(), -1)

    @property
    def slope(self) -> torch.Tensor:
        """The gradient of the loss at the logits."""
        slope = self.p.clone()
        slope[torch.arange(len(slope)), self.labels] -= 1.0
        return slope * self.scale

    def form(self, change: torch.Tensor) -> torch.Tensor:
        """Return żᵀ (∂²L/∂z²) ż of every position, (positions,), float64."""
        return (change * self.curve(change)).sum(-1).double()

    def curve(self, change: torch.Tensor) -> torch.Tensor:
        """Multiply ż with the second derivative of cross-entropy at z, p∘ż − p (p·ż); (positions, vocabulary)."""
        return self.p * (change - (self.p * change).sum(-1, keepdim=True))
