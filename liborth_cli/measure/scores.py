"""What a model thinks of every token of some rows: one forward pass, streamed or resident, and no decoding.

Greedy decoding gives a completion back exactly when every one of its tokens is the likeliest one after the true prefix, so
verbatim extraction, exact memorisation, losses and membership scores all follow from one teacher-forced pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import torch

from liborth_cli.errors import BadInput
from liborth_cli.machine import LARGE_MATRIX, available_bytes, process_bytes, side_by_side
from liborth_cli.ranks import ALONE, World
from liborth_cli.stream.batches import Batch, batches
from liborth_cli.stream.model import TAIL, BlockModel
from liborth_cli.stream.runner import Runner
from liborth_cli.stream.sizes import batch_tokens, logit_rows
from liborth_cli.stream.texts import Row
from liborth_cli.stream.walk import FiniteCheck, ForwardWalk
from liborth_cli.stream.weights import Weights

BATCH_TOKENS = 2048
"""Positions computed at a time on the CPU. Fixed, there and on a GPU: rows of one length always meet the same arithmetic, so no
option changes a score."""
WORTH_A_THREAD = 10**10
"""Multiplications of all rows together from which batches run side by side: a fifth of a second of one processor."""


@dataclass(frozen=True)
class RowScore:
    """What the model thinks of one row's loss-carrying tokens, n of them.

    Attributes:
        loss: −log p of the real token, in nats, (n,), float64.
        hit: whether the real token is the likeliest, (n,), bool.
        mean: Σ_v p_v log p_v over the vocabulary, (n,), float64; (0,) where moments were not asked for.
        deviation: standard deviation of log p_v under p, likewise.
    """

    loss: np.ndarray
    hit: np.ndarray
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    deviation: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(cls, table: np.ndarray) -> RowScore:
        """Take the columns of a table, (n, 2), or (n, 4) with moments."""
        return cls(table[:, 0], table[:, 1].astype(bool), *table[:, 2:].T)

    @property
    def table(self) -> np.ndarray:
        """Its columns, (n, 2) or (n, 4), float64."""
        moments = [self.mean, self.deviation] if len(self.mean) else []
        return np.stack([self.loss, self.hit, *moments], 1).astype(np.float64)


class Evaluator:
    """Scores one list of rows at any number of weights of the same shapes.

    Attributes:
        model: the model.
        rows: what it reads.
    """

    def __init__(
        self,
        model: BlockModel,
        rows: Sequence[Row],
        resident: bool | None = None,
        world: World = ALONE,
        *,
        moments: bool = False,
    ) -> None:
        """Put rows of one length together; nothing is padded (docs/decisions/0010).

        Args:
            model: built from the first weights that will be scored, or any of the same shapes.
            rows: what is read.
            resident: keep all weights in memory; None decides by what is free.
            world: the ranks that share the batches; all of them then call `score` at the same points, and get all scores.
            moments: also tell mean and deviation over the vocabulary, which takes as long again as the losses.
        """
        self.model, self.rows, self._world, self._moments = model, list(rows), world, moments
        self._order, self._batches = self._arrange()
        self._dealt = world.assign(range(len(self._batches)), lambda index: self._batches[index].tokens)
        self._mine = [self._batches[index] for index in self._dealt[world.rank]]
        if resident is None:
            resident = model.resident or 2 * model.nbytes < available_bytes() // world.siblings - process_bytes()
        self._resident = resident

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have this rank score all rows by itself, while others are at other weights; the same numbers."""
        shared, self._world, self._mine = (self._world, self._mine), ALONE, self._batches
        try:
            yield
        finally:
            self._world, self._mine = shared

    def score(self, weights: Weights | None = None, advance: Callable[[int], None] = lambda tokens: None) -> list[RowScore]:
        """Score every row.

        Args:
            weights: of the model; the ones it was built with, or used last, when None.
            advance: told of every batch's tokens.

        Returns:
            One score a row, in the order of `rows`.

        Raises:
            BadInput: when a block's output is not finite; names the block.
        """
        if weights is not None:
            self.model.use(weights)
        if self._resident and not self.model.resident:
            self.model.load_all()
        with torch.no_grad():
            return self._in_order(self._resident_pass(advance) if self._resident else self._streamed_pass(advance))

    def score_from(self, base: Weights, patches: Sequence[tuple[int, Weights]]) -> Iterator[list[RowScore]]:
        """Score every row at weights that agree up to some block: what comes before is computed once, for all of them.

        Between two blocks the hidden states of all rows are in memory.

        Args:
            base: the weights that all agree with.
            patches: the first block of each that may differ, ascending, and the weights.

        Yields:
            The scores of each in turn, as `score` has them.

        Raises:
            BadInput: as `score`.
        """
        reached, hidden = -1, dict[int, torch.Tensor]()
        for level, weights in patches:
            with torch.no_grad():
                if reached < level:
                    self.model.use(base)
                    self._walk(hidden, max(reached, 0), level)
                    reached = level
                self.model.use(weights)
                ends = dict(hidden)
                self._walk(ends, level, None)
                found = self._in_order(self._tails(ends))
            yield found

    def _in_order(self, mine: list[RowScore]) -> list[RowScore]:
        """Return the scores of all rows in their order, from those of this rank in the order of its batches."""
        scores: list[RowScore | None] = [None] * len(self.rows)
        for index, score in zip(self._order, self._of_all(mine), strict=True):
            scores[index] = score
        return [score for score in scores if score is not None]

    def _of_all(self, mine: list[RowScore]) -> list[RowScore]:
        """Return the scores of all batches, in their order, from every rank's."""
        if self._world.size == 1:
            return mine
        tables = [torch.from_numpy(score.table) for score in mine]
        found: dict[int, list[RowScore]] = {}
        for some, rows in zip(self._dealt, self._world.share(tables), strict=True):
            rest = iter(rows)
            for index in some:
                found[index] = [RowScore.of(next(rest).numpy()) for _ in range(len(self._batches[index].ids))]
        return [score for index in sorted(found) for score in found[index]]

    def _resident_pass(self, advance: Callable[[int], None]) -> list[RowScore]:
        found, runners = list[RowScore](), SimpleQueue[Runner]()

        def score(batch: Batch) -> list[RowScore]:
            runner, finite = runners.get(), FiniteCheck()
            try:
                with torch.no_grad():  # every thread says so for itself
                    hidden = runner.through(batch.ids, lambda level, states: finite.see(states, level, batch))
                    finite.settle()
                    return self._tail(hidden, batch, runner)
            finally:
                runners.put(runner)

        lanes = self._lanes(torch.get_num_threads())
        for runner in (self.model, *(self.model.twin() for _ in range(lanes - 1))):
            runners.put(runner)
        for batch, some in zip(self._mine, side_by_side(score, self._mine, lanes), strict=True):
            found += some
            advance(batch.tokens)
        return found

    def _lanes(self, threads: int) -> int:
        """Return how many batches run side by side, each on one thread: a score is the same to the bit with any number.

        BLAS spends its threads well on large matrices and badly on small ones (docs/log.md).
        """
        model, work = self.model, sum(batch.tokens for batch in self._mine) * self.model.elements
        if model.device.type != "cpu" or model.hidden >= LARGE_MATRIX or work < WORTH_A_THREAD:
            return 1
        return min(threads, len(self._mine))

    def _streamed_pass(self, advance: Callable[[int], None]) -> list[RowScore]:
        hidden: dict[int, torch.Tensor] = {}
        self._walk(hidden, 0, None, advance)
        return self._tails(hidden)

    def _walk(
        self,
        hidden: dict[int, torch.Tensor],
        begin: int,
        end: int | None,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """Take every batch's hidden state, from its token ids where there is none, from before one block to before another."""
        for part in ForwardWalk(self.model, self._mine, begin=begin, end=end):
            if part.level:
                hidden[part.index] = part.run(hidden[part.index])
            else:
                hidden.setdefault(part.index, part.run(None))
            advance(part.batch.tokens // len(self.model.blocks) if part.level else 0)

    def _tails(self, hidden: dict[int, torch.Tensor]) -> list[RowScore]:
        """Score all batches from the output of the last block."""
        with self.model.loaded(TAIL):
            return [score for index, batch in enumerate(self._mine) for score in self._tail(hidden[index], batch, self.model)]

    def _tail(self, hidden: torch.Tensor, batch: Batch, runner: Runner) -> list[RowScore]:
        """Score the rows of one batch, a few of the positions that carry loss at a time."""
        flat, labels = hidden[batch.keep], batch.labels[batch.keep]
        step = logit_rows(self.model.vocabulary, self.model.device)
        pieces = ((flat[i : i + step], labels[i : i + step]) for i in range(0, max(len(flat), 1), step))
        table = torch.cat([_score(runner.tail(states), some, self._moments) for states, some in pieces]).cpu().numpy()
        if not np.isfinite(table).all():
            raise BadInput(f"the scores of {batch.where} are not finite: look at the final norm and the head")
        ends = batch.keep.sum(1).cumsum(0).tolist()
        return [RowScore.of(table[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def _arrange(self) -> tuple[list[int], list[Batch]]:
        """Return the rows' numbers in the order of the batches, and the batches."""
        order = sorted(range(len(self.rows)), key=lambda i: (self.rows[i].tokens, self.rows[i].weight), reverse=True)
        return order, batches(self.rows, batch_tokens(self.model.device, BATCH_TOKENS), None, self.model.device)


def windows(row: Row, context: int) -> list[Row]:
    """Cut a row into windows that together predict each of its tokens once, from as much text before it as fits.

    The first window predicts everything the context reaches. Every later token gets a window of its own, whose only loss is
    its last prediction: the very input of a decoder that drops the oldest token.

    Args:
        row: of n predictions.
        context: most positions the model reads, at least 1.

    Returns:
        The windows with loss, in the order of the tokens.
    """
    if row.tokens <= context:
        return [row]
    last = np.zeros(context, bool)
    last[-1] = True
    cut = [Row(row.ids[: context + 1], row.keep[:context], row.weight, row.where)] if row.keep[:context].any() else []
    ends = (end for end in range(context + 1, row.tokens + 1) if row.keep[end - 1])
    return cut + [Row(row.ids[end - context : end + 1], last, row.weight, row.where) for end in ends]


class SlidingEvaluator(Evaluator):
    """An evaluator that takes rows longer than the context; one score a row, as always."""

    def __init__(
        self,
        model: BlockModel,
        rows: Sequence[Row],
        context: int,
        resident: bool | None = None,
        world: World = ALONE,
        *,
        moments: bool = False,
    ) -> None:
        """Cut the long rows into windows.

        Args:
            model: as for `Evaluator`.
            rows: of any length.
            context: most positions the model reads.
            resident: as for `Evaluator`.
            world: as for `Evaluator`.
            moments: as for `Evaluator`.
        """
        groups = [windows(row, context) for row in rows]
        self.model, self.rows = model, list(rows)
        self._inner = Evaluator(model, [window for group in groups for window in group], resident, world, moments=moments)
        self._ends = np.cumsum([len(group) for group in groups]).tolist()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """See `Evaluator.alone`."""
        with self._inner.alone():
            yield

    def score(self, weights: Weights | None = None, advance: Callable[[int], None] = lambda tokens: None) -> list[RowScore]:
        """Score every row; see `Evaluator.score`."""
        return self._joined(self._inner.score(weights, advance))

    def score_from(self, base: Weights, patches: Sequence[tuple[int, Weights]]) -> Iterator[list[RowScore]]:
        """See `Evaluator.score_from`."""
        return map(self._joined, self._inner.score_from(base, patches))

    def _joined(self, found: Sequence[RowScore]) -> list[RowScore]:
        return [_join(found[start:end]) for start, end in zip([0, *self._ends], self._ends, strict=False)]


def _join(parts: Sequence[RowScore]) -> RowScore:
    if len(parts) == 1:
        return parts[0]
    return RowScore.of(np.concatenate([part.table for part in parts]))


def mean_loss(scores: Sequence[RowScore]) -> float:
    """Return the mean loss a token, in nats."""
    return float(np.concatenate([score.loss for score in scores]).mean())


def _score(logits: torch.Tensor, labels: torch.Tensor, moments: bool) -> torch.Tensor:
    """Return (tokens, 2), float64: loss and hit; with mean and deviation of log p (tokens, 4)."""
    log_p = torch.log_softmax(logits.float(), -1)
    loss, hit = -log_p.gather(-1, labels[:, None])[:, 0], log_p.argmax(-1) == labels
    if not moments:
        return torch.stack([loss.double(), hit.double()], -1)
    p = log_p.exp()
    # A token that cannot come has log p = −inf and weight 0; it adds nothing to the moments.
    safe = log_p.clamp(min=torch.finfo(torch.float32).min)
    mean = (p * safe).sum(-1)
    variance = (p * (safe - mean[:, None]).square().nan_to_num(posinf=0.0)).sum(-1)
    return torch.stack([loss.double(), hit.double(), mean.double(), variance.clamp(min=0).sqrt().double()], -1)
