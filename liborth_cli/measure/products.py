"""Products of the loss's Gauss–Newton matrix or Hessian with directions, one block of weights in memory at a time or all.

The tangent of every block's output is carried forward with its value, and the product comes out of the backward walk
(Pearlmutter 1994; Schraudolph 2002). With L the loss a token, z the logits and J = ∂z/∂W,

    GGN  v = Jᵀ (∂²L/∂z²) J v,  where  ∂²L/∂z² · ż = p∘ż − p (p·ż)        H v = d/dε ∇L(W + ε v)

averaged over the tokens that carry loss. For cross-entropy the GGN is the Fisher matrix with labels from the model. A
direction is asked for its part in one stage when that stage's weights are in memory, so it need not exist as a whole.

Where all weights are in memory, and the graphs of the rows fit beside them, the model is run once: every product walks
through the same graphs, and costs four products with every weight in place of eight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from liborth_cli.machine import LARGE_MATRIX, side_by_side, spare_bytes
from liborth_cli.measure.parts import Head, Part, Stage
from liborth_cli.measure.thin import Bases
from liborth_cli.stream.batches import Batch, batches
from liborth_cli.stream.model import FRONT, TAIL, BlockModel
from liborth_cli.stream.sizes import batch_tokens, free_bytes, logit_rows
from liborth_cli.stream.store import MemoryStore
from liborth_cli.stream.texts import Row
from liborth_cli.stream.walk import ForwardWalk, stage_of


class Direction(Protocol):
    """A vector in the space of all weights, which comes and goes stage by stage."""

    def tangents(self, stage: str) -> Stage:
        """Return its part in one stage, by parameter; what is left out is 0."""
        ...


class Collector(Protocol):
    """What takes the product."""

    def collect(self, stage: str, product: Stage) -> None:
        """Take the part in one stage, of the parameters that the direction moves. A tied one comes twice, to be added."""
        ...


@dataclass
class Chain:
    """One batch all the way through the model, with the graphs of all parts.

    Attributes:
        parts: the front and the blocks, by their stages.
        heads: the tail, a few positions at a time.
    """

    parts: list[tuple[str, Part]]
    heads: list[Head]

    def push(self, moving: Mapping[str, Stage]) -> list[torch.Tensor | None]:
        """Carry a direction forward; return its tangents at the input of every part, and at the last block's output."""
        turns: list[torch.Tensor | None] = [None]
        for stage, part in self.parts:
            turns.append(part.push(turns[-1], moving[stage]))
        return turns

    def along(self, turn: torch.Tensor, moving: Stage) -> Iterator[tuple[Head, torch.Tensor, torch.Tensor]]:
        """Yield every head, the tangent at its input, and that of its logits."""
        for head, piece in zip(self.heads, turn.reshape(-1, turn.shape[-1]).split([len(h.p) for h in self.heads]), strict=True):
            yield head, piece, head.part.push(piece, moving)


class _TooLarge(Exception):
    """The graphs are."""


class Products:
    """Curvature of the mean loss of some rows at the weights a model has.

    Attributes:
        model: the model.
        hessian: the Hessian; otherwise the GGN.
    """

    def __init__(self, model: BlockModel, rows: Sequence[Row], hessian: bool = False, bases: Bases | None = None) -> None:
        """Arrange the rows.

        Args:
            model: with the weights in question.
            rows: what is read.
            hessian: as the attribute.
            bases: within which alone weights move, or None: a direction is told, and a product collected, as cores.
        """
        self._bases = bases
        self.model, self.hessian = model, hessian
        self._batches = batches(rows, batch_tokens(model.device), None, model.device)
        self._scale = 1.0 / sum(row.weight * int(row.keep.sum()) for row in rows)
        self._chains: list[Chain] | None = None
        self._at: object = None

    def product(self, direction: Direction, out: Collector) -> None:
        """Multiply with a direction.

        Args:
            direction: v.
            out: gets the product, the stages from the last to the first, or batch by batch where the graphs are kept.
        """
        with sdpa_kernel([SDPBackend.MATH]):
            if (chains := self._kept()) is None:
                self._walk(direction, out)
                return
        moving = {stage: direction.tangents(stage) for stage in self.model.stages}
        for found in side_by_side(partial(self._there_and_back, moving), chains, self._lanes):
            for stage, product in found:
                out.collect(stage, product)

    def forms(self, direction: Direction) -> torch.Tensor:
        """Return the quadratic form vᵀ GGN v of every row by itself: one way forward.

        Args:
            direction: v.

        Returns:
            Sums over each row's tokens, in the order of the batches, and how many tokens those are: (rows, 2), float64.
        """
        found = []
        with sdpa_kernel([SDPBackend.MATH]):
            if (chains := self._kept()) is None:
                parts = self._walk_forward(direction)
            else:
                moving = {stage: direction.tangents(stage) for stage in self.model.stages}
                parts = side_by_side(partial(self._forward, moving), chains, self._lanes)
            for batch, part in zip(self._batches, parts, strict=True):
                each = part.view(batch.keep.shape) * batch.keep
                found.append(torch.stack([each.sum(1), batch.keep.sum(1).double()], 1))
        return torch.cat(found).cpu()

    # With all graphs in memory ------------------------------------------------------------------------------------------

    def _kept(self) -> list[Chain] | None:
        """Return every batch's graphs at the weights that the model has now; None where they are not to be kept."""
        model = self.model
        if self._at is not model.weights:
            self._at, self._chains = model.weights, None
            if model.resident and self._fits():
                self._chains = [self._chain(batch) for batch in self._batches]
        return self._chains

    def _fits(self) -> bool:
        """Tell whether the graphs are at most half of what is spare, by those of the longest rows."""
        device, first = self.model.device, self._batches[0]
        spare = spare_bytes() if device.type == "cpu" else free_bytes(device)
        most = spare // 2 * first.tokens // sum(batch.tokens for batch in self._batches)
        seen, held = {p.untyped_storage().data_ptr() for p in self.model.model.parameters()}, 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held
            storage = tensor.untyped_storage()
            held += 0 if storage.data_ptr() in seen else storage.nbytes()
            seen.add(storage.data_ptr())
            if held > most:
                raise _TooLarge
            return tensor

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                self._chain(first)
        except _TooLarge:
            return False
        return True

    def _chain(self, batch: Batch) -> Chain:
        model, parts = self.model, list[tuple[str, Part]]()
        for step in ForwardWalk(model, [batch]):
            hidden = parts[-1][1].output if parts else None
            parts.append((step.stage, Part(model, step.run, hidden, self._free(step.stage), self._bases)))
        hidden = parts[-1][1].output
        chain = Chain(parts, [head for head, _ in self._heads(batch, hidden, self._free(TAIL), hidden)])
        for head in chain.heads:
            head.part.differentiate(head.slope if self.hessian else None)
        slope = torch.cat([head.part.slope for head in chain.heads]).view_as(hidden) if self.hessian else None
        for _, part in reversed(parts):
            part.differentiate(slope)
            slope = part.slope if self.hessian and part.hidden is not None else None
        return chain

    def _free(self, stage: str) -> Stage:
        """Return the weights of a stage that may move."""
        held = self.model.parameters(stage)
        return held if self._bases is None else {name: weight for name, weight in held.items() if name in self._bases}

    def forget(self) -> None:
        """Let go of the graphs; the next product makes them anew."""
        self._at, self._chains = None, None

    @property
    def _lanes(self) -> int:
        """How many batches go side by side, each on one thread (docs/log.md)."""
        if self.model.device.type != "cpu" or self.model.hidden >= LARGE_MATRIX:
            return 1
        return min(torch.get_num_threads(), len(self._batches))

    def _forward(self, moving: Mapping[str, Stage], chain: Chain) -> torch.Tensor:
        """Return żᵀ (∂²L/∂z²) ż at every position of a batch, (positions,), float64."""
        turn = chain.push(moving)[-1]
        assert turn is not None
        return torch.cat([head.form(z) for head, _, z in chain.along(turn, moving[TAIL])])

    def _there_and_back(self, moving: Mapping[str, Stage], chain: Chain) -> list[tuple[str, Stage]]:
        """Return one batch's part of the product, by stages."""
        *turns, last = chain.push(moving)
        assert last is not None
        found, below = list[tuple[str, Stage]](), list[torch.Tensor]()
        for head, turn, z in chain.along(last, moving[TAIL]):
            curved = (turn, moving[TAIL]) if self.hessian else (None, {})
            at_input, product = head.part.pull(head.curve(z) * head.scale, moving[TAIL], curved)
            below.append(at_input)
            found.append((TAIL, product))
        gradient = torch.cat(below).view_as(last)
        for (stage, part), turn in zip(reversed(chain.parts), reversed(turns), strict=True):
            curved = (turn, moving[stage]) if self.hessian else (None, {})
            gradient, product = part.pull(gradient, moving[stage], curved)
            found.append((stage, product))
        return found

    # With one stage in memory -------------------------------------------------------------------------------------------

    def _walk(self, direction: Direction, out: Collector) -> None:
        """Multiply one stage at a time: every part is run once on the way forward, and once more on the way back."""
        model, depth = self.model, len(self.model.blocks)
        values, turns, walk = self._carry(direction, keep=True)
        slopes, gradients = list[torch.Tensor | None](), list[torch.Tensor]()
        with model.loaded(TAIL, str(depth - 1)):
            weights, moving = self._moving(TAIL, direction)
            for index, batch in enumerate(self._batches):
                hidden, found = values.get(index, depth), list[tuple[torch.Tensor, torch.Tensor | None]]()
                for head, turn in self._heads(batch, hidden, weights, turns.get(index, depth)):
                    head.part.differentiate(head.slope if self.hessian else None)
                    curved = head.curve(head.part.push(turn, moving)) * head.scale
                    found.append(self._pull(head.part, curved, turn, moving, partial(out.collect, TAIL)))
                gradients.append(torch.cat([gradient for gradient, _ in found]).view_as(hidden))
                slopes.append(torch.cat([s for _, s in found if s is not None]).view_as(hidden) if self.hessian else None)
        for level in reversed(range(-1, depth)):
            stage = str(level) if level >= 0 else FRONT
            with model.loaded(stage, stage_of(level - 1, depth) if level >= 0 else None):
                weights, moving = self._moving(stage, direction)
                for index, batch in enumerate(self._batches):
                    if level >= 0:
                        part = Part(model, partial(walk.block, level, index), values.get(index, level), weights, self._bases)
                    else:
                        part = Part(model, lambda _, ids=batch.ids: model.front(ids)[0], None, weights)
                    if self.hessian:
                        part.differentiate(slopes[index])
                    turn = turns.get(index, level) if self.hessian and level >= 0 else None
                    collect = partial(out.collect, stage)
                    gradients[index], slopes[index] = self._pull(part, gradients[index], turn, moving, collect)
                    if level >= 0:
                        values.drop(index, level)

    def _carry(self, direction: Direction, keep: bool) -> tuple[MemoryStore, MemoryStore, ForwardWalk]:
        """Carry values and tangents to the last block; with `keep` every block's input stays (for the GGN, its value)."""
        walk, stage = ForwardWalk(self.model, self._batches), ""
        weights, moving = Stage(), Stage()
        values, turns = MemoryStore(), MemoryStore()
        for step in walk:
            if step.stage != stage:
                stage = step.stage
                weights, moving = self._moving(stage, direction)
            hidden, turn = (store.get(step.index, step.level - 1) if step.level else None for store in (values, turns))
            part = Part(self.model, step.run, hidden, weights, self._bases).differentiate()
            values.put(step.index, step.level, part.output.detach())
            turns.put(step.index, step.level, part.push(turn, moving))
            if step.level and not keep:
                values.drop(step.index, step.level - 1)
            if step.level and not (keep and self.hessian):
                turns.drop(step.index, step.level - 1)
        return values, turns, walk

    def _walk_forward(self, direction: Direction) -> Iterator[torch.Tensor]:
        """Yield what `_forward` returns, batch by batch."""
        depth = len(self.model.blocks)
        values, turns, _ = self._carry(direction, keep=False)
        with self.model.loaded(TAIL):
            weights, moving = self._moving(TAIL, direction)
            for index, batch in enumerate(self._batches):
                heads = self._heads(batch, values.get(index, depth), weights, turns.get(index, depth))
                yield torch.cat([head.form(head.part.differentiate().push(turn, moving)) for head, turn in heads])

    def _moving(self, stage: str, direction: Direction) -> tuple[Stage, Stage]:
        """Return the weights of a loaded stage that a direction moves, and how."""
        held, moving = self.model.parameters(stage), direction.tangents(stage)
        return {name: held[name] for name in moving}, moving

    # Both ways ----------------------------------------------------------------------------------------------------------

    def _pull(
        self, part: Part, gradient: torch.Tensor, turn: torch.Tensor | None, moving: Stage, collect: Callable[[Stage], None]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take a gradient back through one part; hand its product on, return what leaves below, with the slope there."""
        below, product = part.pull(gradient, moving, (turn, moving) if self.hessian else (None, {}))
        collect(product)
        return below, part.slope if self.hessian and part.hidden is not None else None

    def _heads(
        self, batch: Batch, hidden: torch.Tensor, weights: Stage, turn: torch.Tensor
    ) -> Iterator[tuple[Head, torch.Tensor]]:
        """Run the tail, a few positions at a time, and yield it with the tangents of those."""
        width, step = hidden.shape[-1], logit_rows(self.model.vocabulary, self.model.device)
        every = hidden.reshape(-1, width), turn.reshape(-1, width), batch.labels.reshape(-1), batch.keep.reshape(-1)
        for start in range(0, len(every[0]), step):
            states, moved, labels, keep = (each[start : start + step] for each in every)
            scale = (keep * (batch.weight * self._scale)).to(states.dtype)[:, None]
            yield Head(Part(self.model, self.model.tail, states, weights), scale, labels), moved
