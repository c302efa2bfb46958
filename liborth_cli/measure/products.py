"""Products of the loss's Gauss–Newton matrix or Hessian with a direction, one block of weights in memory at a time.

The tangent of every block's output is carried forward with its value, and the product comes out of the backward walk
(Pearlmutter 1994; Schraudolph 2002). With L the loss a token, z the logits and J = ∂z/∂W,

    GGN  v = Jᵀ (∂²L/∂z²) J v,  where  ∂²L/∂z² · ż = p∘ż − p (p·ż)        H v = d/dε ∇L(W + ε v)

averaged over the tokens that carry loss. For cross-entropy the GGN is the Fisher matrix with labels from the model. A
direction is asked for its part in one stage when that stage's weights are in memory, so it need not exist as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from liborth_cli.stream.batches import Batch, batches
from liborth_cli.stream.model import FRONT, TAIL, BlockModel
from liborth_cli.stream.sizes import batch_tokens, logit_rows
from liborth_cli.stream.store import MemoryStore
from liborth_cli.stream.texts import Row
from liborth_cli.stream.walk import ForwardWalk


class Direction(Protocol):
    """A vector in the space of all weights, which comes and goes stage by stage."""

    def tangents(self, stage: str) -> dict[str, torch.Tensor]:
        """Return its part in one stage, by parameter; what is left out is 0."""
        ...


class Collector(Protocol):
    """What takes the product."""

    def collect(self, stage: str, product: dict[str, torch.Tensor]) -> None:
        """Take the part in one stage, by parameter. A tied parameter comes twice, and the two must be added."""
        ...


class Products:
    """Curvature of the mean loss of some rows at the weights a model has.

    Attributes:
        model: the model.
        hessian: the Hessian; otherwise the GGN.
    """

    def __init__(self, model: BlockModel, rows: Sequence[Row], hessian: bool = False) -> None:
        """Arrange the rows.

        Args:
            model: with the weights in question.
            rows: what is read.
            hessian: as the attribute.
        """
        self.model, self.hessian = model, hessian
        self._batches = batches(rows, batch_tokens(model.device), None, model.device)
        self._scale = 1.0 / sum(row.weight * int(row.keep.sum()) for row in rows)

    def product(self, direction: Direction, out: Collector) -> None:
        """Multiply with a direction.

        Args:
            direction: v.
            out: gets the product, the stages from the last to the first.
        """
        model, depth = self.model, len(self.model.blocks)
        with sdpa_kernel([SDPBackend.MATH]):
            values, tangents, walk = self._forward(direction, keep=True)
            with model.loaded(TAIL, str(depth - 1)):
                weights, moving = model.parameters(TAIL), direction.tangents(TAIL)
                for index, batch in enumerate(self._batches):
                    pair = self._tail(batch, values.get(index, depth), tangents.get(index, depth), weights, moving, out)
                    values.put(index, depth, pair[0])
                    tangents.put(index, depth, pair[1])
            for level in reversed(range(depth)):
                stage = str(level)
                with model.loaded(stage, str(level - 1) if level else FRONT):
                    weights, moving = model.parameters(stage), direction.tangents(stage)
                    for index in range(len(self._batches)):
                        inputs = values.get(index, level), tangents.get(index, level)
                        gradient = values.get(index, level + 1), tangents.get(index, level + 1)
                        pair, found = self._backward(partial(walk.block, level, index), inputs, gradient, weights, moving)
                        out.collect(stage, found)
                        values.put(index, level, pair[0])
                        tangents.put(index, level, pair[1])
            with model.loaded(FRONT):
                weights, moving = model.parameters(FRONT), direction.tangents(FRONT)
                for index, batch in enumerate(self._batches):
                    gradient = values.get(index, 0), tangents.get(index, 0)
                    found = self._backward(
                        lambda _, ids=batch.ids: model.front(ids)[0], (None, None), gradient, weights, moving
                    )[1]
                    out.collect(FRONT, found)

    def forms(self, direction: Direction) -> torch.Tensor:
        """Return the quadratic form vᵀ GGN v of every row by itself: one forward walk.

        Args:
            direction: v.

        Returns:
            Sums over each row's tokens, in the order of the batches, and how many tokens those are: (rows, 2), float64.
        """
        model, depth, found = self.model, len(self.model.blocks), []
        with sdpa_kernel([SDPBackend.MATH]):
            values, tangents, _ = self._forward(direction, keep=False)
            with model.loaded(TAIL):
                weights, moving = model.parameters(TAIL), direction.tangents(TAIL)
                for index, batch in enumerate(self._batches):
                    parts = []
                    for hidden, turn, _, _ in self._pieces(batch, values.get(index, depth), tangents.get(index, depth)):
                        logits, change = self._jvp(model.tail, hidden, turn, weights, moving)
                        parts.append((change * _curve(logits, change)).sum(-1).double())
                    each = torch.cat(parts).view(batch.keep.shape) * batch.keep
                    found.append(torch.stack([each.sum(1), batch.keep.sum(1).double()], 1))
        return torch.cat(found).cpu()

    # Forward ------------------------------------------------------------------------------------------------------------

    def _forward(self, direction: Direction, keep: bool) -> tuple[MemoryStore, MemoryStore, ForwardWalk]:
        """Carry values and tangents to the last block; with `keep` every block's input stays (for the GGN, its value)."""
        walk, stage, depth = ForwardWalk(self.model, self._batches), "", len(self.model.blocks)
        weights, moving = {}, {}
        values, tangents = MemoryStore(), MemoryStore()
        for part in walk:
            if part.stage != stage:
                stage = part.stage
                weights, moving = self.model.parameters(stage), direction.tangents(stage)
            hidden, turn = (store.get(part.index, part.level - 1) if part.level else None for store in (values, tangents))
            value, tangent = self._jvp(part.run, hidden, turn, weights, moving)
            values.put(part.index, part.level, value)
            tangents.put(part.index, part.level, tangent)
            if part.level and not keep:
                values.drop(part.index, part.level - 1)
            if part.level and not (keep and self.hessian):
                tangents.drop(part.index, part.level - 1)
        if not self.hessian:
            for index in range(len(self._batches)):
                for level in range(depth):
                    tangents.put(index, level, tangents.get(index, depth)[:0])
        return values, tangents, walk

    def _jvp(
        self, run: Any, hidden: Any, tangent: Any, weights: dict[str, torch.Tensor], moving: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a part's output and its tangent, by differentiating twice backwards: J v = ∂⟨v, Jᵀu⟩/∂u.

        Forward-mode differentiation takes a fifth less time on blocks of 64, but loads for five seconds, and leans on
        torch.jit, which is going away.
        """
        leaves = {name: weights[name].detach().requires_grad_() for name in moving}
        wanted, turns = [*leaves.values()], [*moving.values()]
        if hidden is not None:
            hidden = hidden.detach().requires_grad_()
            wanted, turns = [*wanted, hidden], [*turns, tangent]
        with torch.enable_grad(), self.model.replaced(leaves):
            output = run(hidden)
            if not wanted or not output.requires_grad:
                return output.detach(), torch.zeros_like(output)
            u = torch.zeros_like(output, requires_grad=True)
            pulled = torch.autograd.grad(output, wanted, u, create_graph=True, allow_unused=True)
            sides = [(p, t) for p, t in zip(pulled, turns, strict=True) if p is not None]
            change = torch.autograd.grad([p for p, _ in sides], u, [t for _, t in sides])[0]
        return output.detach(), change.detach()

    # Backward -----------------------------------------------------------------------------------------------------------

    def _backward(
        self,
        run: Any,
        inputs: tuple[Any, Any],
        gradient: tuple[torch.Tensor, torch.Tensor],
        weights: dict[str, torch.Tensor],
        moving: dict[str, torch.Tensor],
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]:
        """Pull a gradient (for the Hessian: with its tangent) back through one part.

        Returns:
            The gradient at the part's input, with its tangent (empty for the GGN), and the product with its weights.
        """
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        hidden = None if inputs[0] is None else inputs[0].detach().requires_grad_()
        wanted = [*leaves.values()] + ([] if hidden is None else [hidden])
        with torch.enable_grad(), self.model.replaced(leaves):
            output = run(hidden)
            first = torch.autograd.grad(output, wanted, gradient[0], create_graph=self.hessian, allow_unused=True)
            found = first
            if self.hessian:
                # With S = ⟨g, output⟩ the tangent of ∇S is ∇⟨∇S, tangents⟩, and what the tangent of g pulls back is added.
                turns = [moving.get(name) for name in leaves] + ([] if hidden is None else [inputs[1]])
                sides = [
                    (f, t) for f, t in zip(first, turns, strict=True) if f is not None and t is not None and f.requires_grad
                ]
                ends, starts = [output, *(f for f, _ in sides)], [gradient[1], *(t for _, t in sides)]
                found = torch.autograd.grad(ends, wanted, starts, allow_unused=True)
        product = {name: _or_zero(each, leaf) for (name, leaf), each in zip(leaves.items(), found, strict=False)}
        if hidden is None:
            return gradient, product
        below = _or_zero(first[-1], hidden)
        return (below, _or_zero(found[-1], hidden) if self.hessian else below[:0]), product

    def _tail(
        self,
        batch: Batch,
        hidden: torch.Tensor,
        tangent: torch.Tensor,
        weights: dict[str, torch.Tensor],
        moving: dict[str, torch.Tensor],
        out: Collector,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Start the backward walk at the logits, a few positions at a time."""
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for value, turn, labels, keep in self._pieces(batch, hidden, tangent):
            scale = (keep * (batch.weight * self._scale)).to(value.dtype)[:, None]
            logits, change = self._jvp(self.model.tail, value, turn, weights, moving)
            curved = _curve(logits, change) * scale
            if self.hessian:
                slope = torch.softmax(logits, -1)
                slope[torch.arange(len(labels)), labels] -= 1.0
                gradient = slope * scale, curved
            else:
                gradient = curved, curved[:0]
            pair, product = self._backward(self.model.tail, (value, turn), gradient, weights, moving)
            out.collect(TAIL, product)
            found.append(pair)
        at_input = torch.cat([pair[0] for pair in found]).view(hidden.shape)
        turned = torch.cat([pair[1] for pair in found])
        return at_input, turned.view(hidden.shape) if self.hessian else turned

    def _pieces(
        self, batch: Batch, hidden: torch.Tensor, tangent: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        width = hidden.shape[-1]
        step = logit_rows(self.model.vocabulary, self.model.device)
        flat = hidden.reshape(-1, width), tangent.reshape(-1, width), batch.labels.reshape(-1), batch.keep.reshape(-1)
        for start in range(0, len(flat[0]), step):
            value, turn, labels, keep = (each[start : start + step] for each in flat)
            yield value, turn, labels, keep


def _or_zero(found: torch.Tensor | None, leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if found is None else found.detach()


def _curve(logits: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Multiply ż with the second derivative of cross-entropy at z: p∘ż − p (p·ż); (tokens, vocabulary)."""
    p = torch.softmax(logits, -1)
    return p * (change - (p * change).sum(-1, keepdim=True))
