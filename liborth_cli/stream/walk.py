"""Forward and backward over a group of token rows, one stage of weights at a time, or with all of them in memory.

Whoever goes through a model one block at a time goes through `ForwardWalk`. In the backward walk only activations are
differentiated: no weight asks for a gradient, so none is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch

from liborth_cli.errors import BadInput
from liborth_cli.stream.batches import Batch
from liborth_cli.stream.direct import Direct, Uses
from liborth_cli.stream.labels import LogitGradient
from liborth_cli.stream.model import FRONT, TAIL, BlockModel
from liborth_cli.stream.relay import Relay, Turns
from liborth_cli.stream.runner import Call
from liborth_cli.stream.sizes import logit_rows
from liborth_cli.stream.tap import Observer, Tap


class BatchObserver(Observer, Protocol):
    """An observer that is also told which batch comes next."""

    def begin(self, batch: Batch) -> None:
        """Get ready for the events of one batch in one stage."""
        ...


@dataclass
class Losses:
    """What the walk found on its way.

    Attributes:
        total: the loss summed over all loss-carrying tokens, in nats.
        tokens: how many those are.
        differentiate: the loss's gradient, with its buffers.
    """

    total: float = 0.0
    tokens: int = 0
    differentiate: LogitGradient = field(default_factory=LogitGradient, repr=False)


@dataclass(frozen=True)
class Reached:
    """How far a walk one block at a time is; another begins there, with the same store, losses and observer.

    Attributes:
        level: the store holds the slots of every batch up to this one; −1: none.
        back: the walk is on its way back, and this slot holds the gradient that leaves its block.
    """

    level: int = -1
    back: bool = False

    def blocks_walked(self, depth: int) -> int:
        """Return how many blocks were gone through, of twice as many as the model has."""
        return 2 * depth - self.level if self.back else max(self.level, 0)


@dataclass(frozen=True)
class Course:
    """Where a walk begins, and who hears of it.

    Attributes:
        losses: added to; of several ranks those of the one with the head.
        advance: told of every batch's tokens; one block at a time twice for each block.
        begin: where an earlier walk had got to, alone; of a walk batch by batch, `level` is how many batches are done.
        reached: told where this one is, between two blocks, or two batches.
    """

    losses: Losses = field(default_factory=Losses)
    advance: Callable[[int], None] = lambda tokens: None
    begin: Reached = Reached()
    reached: Callable[[Reached], None] = lambda place: None


@dataclass(frozen=True)
class StageBatch:
    """One batch at one stage of the way forward; that stage's weights are in memory.

    Attributes:
        stage: its name.
        level: how many blocks the batch is through when `run` is done; 0 for the front.
        index: of the batch.
        batch: the rows.
        run: a hidden state (rows, tokens, width) → the next one, looked at for what is not finite; the front takes None.
    """

    stage: str
    level: int
    index: int
    batch: Batch
    run: Callable[[torch.Tensor | None], torch.Tensor]


class ForwardWalk:
    """The way from token ids to the output of the last block: every batch through the front, then through block after block.

    What waits between two blocks is the caller's to keep; each part must be run once before the next is asked for.
    """

    def __init__(
        self,
        model: BlockModel,
        batches: Sequence[Batch],
        watched: bool = False,
        turns: Turns | None = None,
        begin: int = 0,
        end: int | None = None,
    ) -> None:
        """Begin nothing yet.

        Args:
            model: the model.
            batches: the rows.
            turns: which blocks this rank goes through; None: all. The front every rank runs: it says how blocks are called.
            watched: blocks will be run once more with an observer; then on a GPU their modules do their own products
                (`direct`), after the modes have seen one batch go through.
            begin: the first block to go through, after the front.
            end: the block to stop before; None: behind the last.
        """
        self._model, self._batches, self._finite = model, batches, FiniteCheck()
        self._turns, self._blocks = turns or Turns(len(model.blocks)), range(len(model.blocks))[begin:end]
        self._watched = watched and model.device.type != "cpu"
        self._direct: dict[int, Direct | None] = {}
        self._calls: list[list[Call]] = []

    def __iter__(self) -> Iterator[StageBatch]:
        """Go through the stages, with the weights of one in memory and those of the next on their way."""
        model = self._model
        levels = [level for level in self._turns.levels if level in self._blocks]
        through = self._blocks.stop == len(model.blocks)
        following = [*map(str, levels), TAIL if through and self._turns.mine(len(model.blocks)) else None]
        with model.loaded(FRONT, following[0]):
            for index, batch in enumerate(self._batches):
                yield StageBatch(FRONT, 0, index, batch, partial(self._front, batch))
        for level, after in zip(levels, following[1:], strict=True):
            with model.loaded(str(level), after):
                for index, batch in enumerate(self._batches):
                    yield StageBatch(str(level), level + 1, index, batch, partial(self._checked, level, index))
                self._finite.settle()

    def block(self, level: int, index: int, hidden: torch.Tensor, observer: Observer | None = None) -> torch.Tensor:
        """Run one batch through one block, whose weights must be loaded; an observer is told of its products."""
        call = self._calls[index][level]
        if self._watched and level not in self._direct:
            uses, sites = Uses(), self._model.sites(str(level))
            with torch.no_grad(), Tap(sites, uses):
                output = self._model.block(level, hidden, call)
            self._direct[level] = Direct.of(self._model.blocks[level], sites, uses)
            if observer is None:
                return output
        direct = self._direct.get(level)
        if direct is not None:
            with direct.telling(observer):
                return self._model.block(level, hidden, call)
        if observer is not None:
            with Tap(self._model.sites(str(level)), observer):
                return self._model.block(level, hidden, call)
        return self._model.block(level, hidden, call)

    def _front(self, batch: Batch, _: torch.Tensor | None) -> torch.Tensor:
        hidden, found = self._model.front(batch.ids)
        self._calls.append(_reuse(found, self._calls))
        return hidden

    def _checked(self, level: int, index: int, hidden: torch.Tensor | None) -> torch.Tensor:
        assert hidden is not None
        output = self.block(level, index, hidden)
        self._finite.see(output, level, self._batches[index])
        return output


def walk_streamed(
    model: BlockModel,
    batches: Sequence[Batch],
    observer: BatchObserver,
    relay: Relay,
    finished: Callable[[str], None],
    course: Course | None = None,
) -> Losses:
    """Walk forward and back with one stage of weights in memory.

    Args:
        model: the model.
        batches: the group of rows.
        observer: learns inputs and output gradients; stages come from the last to the first.
        relay: where block inputs wait; of several ranks each goes through its own stages. Closed at the end.
        finished: called with a stage's name when the observer has seen all of it.
        course: where it begins, and who hears of it; at the beginning, and nobody, when None.

    Returns:
        The loss; of several ranks the one with the head has it.

    Raises:
        BadInput: when a block's output or a gradient is not finite; names the block.
    """
    course = course or Course()
    for stage in walk_back(model, batches, observer, relay, course):
        finished(stage)
        if stage != FRONT:
            course.reached(Reached(len(model.blocks) if stage == TAIL else int(stage), back=True))
    return course.losses


def walk_back(
    model: BlockModel,
    batches: Sequence[Batch],
    observer: BatchObserver,
    relay: Relay,
    course: Course,
) -> Iterator[str]:
    """Walk as `walk_streamed` does, stopping behind every stage of the way back.

    Nothing is loaded where it stops: the model may be used with other weights meanwhile, and must have its own when it goes on.

    Args:
        model: the model.
        batches: the group of rows.
        observer: learns inputs and output gradients.
        relay: where block inputs wait; of several ranks each goes through its own stages. Closed at the end.
        course: where it begins, and who hears of it; on the way back whoever asks for the stages knows.

    Yields:
        The stage that the observer has seen all of, from the last of this rank to its first.

    Raises:
        BadInput: when a block's output or a gradient is not finite; names the block.
    """
    depth, finite, begin = len(model.blocks), FiniteCheck(), course.begin
    turns, levels = relay.turns, relay.turns.levels
    walk = ForwardWalk(model, batches, watched=True, turns=turns, begin=depth if begin.back else max(begin.level, 0))
    before = {level: stage_of(earlier, depth) for earlier, level in pairwise(levels)}
    with relay:
        relay.begin(len(batches), model.device)
        with torch.no_grad():
            for part in walk:
                hidden = part.run(relay.input(part.index, part.level - 1) if part.level else None)
                if (part.level or turns.mine(0)) and part.level > begin.level:
                    relay.put_input(part.index, part.level, hidden)
                course.advance(part.batch.tokens if part.level else 0)
                if part.level and part.index == len(batches) - 1:
                    course.reached(Reached(part.level))
        for level in reversed([level for level in levels if not begin.back or level < begin.level]):
            stage = stage_of(level, depth)
            with model.loaded(stage, before.get(level)):
                back = _Back(model, walk, relay, course, finite, Tap(model.sites(stage), observer))
                for index, batch in enumerate(batches):
                    observer.begin(batch)
                    back.through(level, index, batch, observer)
                finite.settle()
            yield stage


@dataclass(frozen=True)
class _Back:
    """The way back through one stage, whose weights are loaded.

    Attributes:
        model, walk, relay, course, finite: of the whole walk.
        tap: shows the stage's products to the observer.
    """

    model: BlockModel
    walk: ForwardWalk
    relay: Relay
    course: Course
    finite: FiniteCheck
    tap: Tap

    def through(self, level: int, index: int, batch: Batch, observer: Observer) -> None:
        """Take the gradient of one batch from where it left the stage to where it came in."""
        if level == len(self.model.blocks):
            hidden = self.relay.input(index, level)
            self.relay.put_gradient(index, level, tail_gradient(self.model, hidden, batch, self.tap, self.course.losses))
        elif level < 0:
            self._front(level, index, batch)
        else:
            self._block(level, index, batch, observer)

    def _front(self, level: int, index: int, batch: Batch) -> None:
        with self.tap:
            hidden, _ = self.model.front(batch.ids)
        arrived = self.relay.gradient(index, level)
        if hidden.requires_grad:
            hidden.backward(arrived)

    def _block(self, level: int, index: int, batch: Batch, observer: Observer) -> None:
        hidden = self.relay.input(index, level).detach().requires_grad_()
        self.walk.block(level, index, hidden, observer).backward(self.relay.gradient(index, level))
        assert hidden.grad is not None
        self.finite.see(hidden.grad, level, batch, "the gradient that leaves")
        self.relay.put_gradient(index, level, hidden.grad)
        self.course.advance(batch.tokens)


def stage_of(level: int, depth: int) -> str:
    """Name the stage of a level: −1 is the front, `depth` the tail."""
    return FRONT if level < 0 else TAIL if level == depth else str(level)


def walk_resident(
    model: BlockModel,
    batches: Sequence[Batch],
    observer: BatchObserver,
    course: Course | None = None,
) -> Losses:
    """Walk batch by batch with all weights in memory: nothing is computed twice, and the model runs as it is.

    Args:
        model: the model, after `load_all`.
        batches: the rows.
        observer: learns inputs and output gradients.
        course: where it begins, and who hears of it; at the beginning, and nobody, when None.

    Returns:
        The loss.

    Raises:
        BadInput: when a block's output or a gradient is not finite; names the block.
    """
    course = course or Course()
    losses, tap, begin = course.losses, Tap(model.sites(None), observer), max(course.begin.level, 0)
    for done, batch in enumerate(batches[begin:], begin + 1):
        observer.begin(batch)
        finite = FiniteCheck()
        with tap:
            hidden = model.through(batch.ids, lambda level, states, b=batch, f=finite: f.see(states, level, b))
        finite.settle()
        hidden.backward(tail_gradient(model, hidden.detach(), batch, tap, losses))
        course.advance(batch.tokens)
        course.reached(Reached(done))
    return losses


def walk_exact(model: BlockModel, batches: Sequence[Batch], observer: BatchObserver, course: Course | None = None) -> Losses:
    """Sum over all labels of all positions, each weighted by its probability.

    The labels of different positions are independent given the row, so Σ over positions t and labels c of
    p_tc·∇L_tc ∇L_tcᵀ is the whole Fisher. Positions cannot share a backward pass: attention would mix their gradients, and
    the mixed terms, which are zero on average, would not be zero in a sum of √p. Rows can.

    Args:
        model: the model, after `load_all`.
        batches: the rows.
        observer: learns inputs once, and output gradients once for each position and label, scaled by √p.
        course: where it begins, and who hears of it; at the beginning, and nobody, when None.

    Returns:
        The loss of the real labels.
    """
    course = course or Course()
    losses, tap, begin = course.losses, Tap(model.sites(None), observer), max(course.begin.level, 0)
    for done, batch in enumerate(batches[begin:], begin + 1):
        observer.begin(batch)
        finite = FiniteCheck()
        with tap:
            hidden = model.through(batch.ids, lambda level, states, b=batch, f=finite: f.see(states, level, b))
            finite.settle()
            logits = model.tail(hidden.reshape(-1, hidden.shape[-1])).view(*batch.ids.shape, -1)
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        chances = wide.softmax(-1)
        real = -wide.log_softmax(-1).gather(-1, batch.labels[..., None])[..., 0]
        losses.total += float((real * batch.keep).sum())
        losses.tokens += int(batch.keep.sum())
        for position in torch.nonzero(batch.keep.any(0))[:, 0].tolist():
            here = chances[:, position]
            for label in range(here.shape[-1]):
                seed = here.clone()
                seed[:, label] -= 1.0
                seed *= (here[:, label].sqrt() * batch.keep[:, position])[:, None]
                gradient = torch.zeros_like(logits)
                gradient[:, position] = seed.to(logits.dtype)
                logits.backward(gradient, retain_graph=True)
        course.advance(batch.tokens)
        course.reached(Reached(done))
    return losses


def tail_gradient(model: BlockModel, hidden: torch.Tensor, batch: Batch, tap: Tap, losses: Losses) -> torch.Tensor:
    """Differentiate the loss with respect to the last block's output, a few positions at a time.

    Args:
        model: the model, its tail loaded.
        hidden: (rows, tokens, width).
        batch: the rows.
        tap: shows the head to the observer.
        losses: added to.

    Returns:
        (rows, tokens, width).

    Raises:
        BadInput: when the loss is not finite.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    gradient = torch.empty_like(flat)
    step = logit_rows(model.vocabulary, flat.device)
    labels, keep = batch.labels.reshape(-1), batch.keep.reshape(-1)
    draws, differentiate = batch.draws.reshape(-1) if batch.draws is not None else None, losses.differentiate
    for start in range(0, len(flat), step):
        piece = slice(start, start + step)
        leaf = flat[piece].detach().requires_grad_()
        with torch.enable_grad(), tap:
            logits = model.tail(leaf)
        at_logits, loss = differentiate(logits, labels[piece], keep[piece], draws[piece] if draws is not None else None)
        if not bool(torch.isfinite(loss)):
            raise BadInput(
                f"the loss of {batch.where} is not finite, though every block's output is: look at the final norm and the head"
            )
        logits.backward(at_logits)
        assert leaf.grad is not None
        gradient[piece] = leaf.grad
        losses.total += float(loss)
    losses.tokens += int(keep.sum())
    return gradient.view(hidden.shape)


class FiniteCheck:
    """Looks for NaN and infinity: at once on the CPU; on a GPU when a stage is done, so that nobody waits for each answer."""

    def __init__(self) -> None:
        """Nothing has been seen."""
        self._seen: list[tuple[torch.Tensor, str]] = []

    def see(self, values: torch.Tensor, level: int, batch: Batch, what: str = "the output of") -> None:
        """Look at what a block made of a batch; raise BadInput naming the block, or leave that to `settle`."""
        values = values.detach()
        broken = (
            f"{what} block {level} is not finite on {batch.where}: the weights of that block are broken, "
            "or the arithmetic overflows (try --dtype float32)"
        )
        if values.device.type != "cpu":
            self._seen.append((torch.isfinite(values).all(), broken))
        # A sum is finite when every term is, unless it overflows: then the terms are looked at one by one.
        elif not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
            raise BadInput(broken)

    def settle(self) -> None:
        """Raise BadInput naming the first block that made something else than numbers."""
        seen, self._seen = self._seen, []
        if seen and not all(sound := torch.stack([flag for flag, _ in seen]).tolist()):
            raise BadInput(seen[sound.index(False)][1])


def _reuse(found: list[Call], earlier: list[list[Call]]) -> list[Call]:
    """Return an earlier batch's equal calls in place of `found`, so that masks and positions are held once."""
    return next((calls for calls in reversed(earlier[-4:]) if _same(calls, found)), found)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other)))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one is other or bool(one == other)
