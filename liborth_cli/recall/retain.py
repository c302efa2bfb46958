"""What a step may cost: retain rows of each kind, the slope that it must not climb, and the loss that must not rise.

Retain rows are of two kinds, those that fine-tuning improved and the others, and each counts by itself: where fine-tuning has
left a text far from its best, a step can win on it what it loses of the skill. So do the improved ones of files that are small
beside the others: a mean over all tokens does not feel what becomes of a few hundred, and who gives them a file of their
own wants them kept. A small file that fine-tuning did not improve has nothing to lose, and counts with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from liborth_cli.measure.scores import Evaluator, mean_loss
from liborth_cli.recall.kernel import KernelWalk
from liborth_cli.recall.moves import Moves
from liborth_cli.stream.batches import parts
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Weights

KINDS = 2
"""Of retain rows, where both models tell them apart."""
IMPROVED, OTHERS, SMALL = range(3)
"""Sorts of rows: those that fine-tuning improved, those that it did not, and of the first those of small files."""
LEARNT = 2 / 3
"""Share of a small file's rows that fine-tuning improved, from which on they are a kind."""
SLOPE_TOKENS, MEMORY = 2048, 0.85
"""Retain tokens of a kind on which the slope of their loss is measured at every step, others each time; and how much of the
mean of the steps before stays."""
HALVINGS = 4
"""How often a step that costs too much is halved before it is given up."""


@dataclass(frozen=True)
class Kind:
    """Retain rows of one kind.

    Attributes:
        parts: the rows, some for each step in turn.
        held_out: those that are only measured.
    """

    parts: list[list[Row]]
    held_out: Evaluator

    def climb(self, walk: KernelWalk, slope: Moves, number: int) -> None:
        """Add what the rows of step `number` say to the mean slope of the steps before."""
        walk.climb(self.parts[number % len(self.parts)], slope, min(MEMORY, number / (number + 1)))


def kinds(
    model: BlockModel,
    ends: tuple[Weights, Weights | None],
    retain: Sequence[Row],
    held_out: Sequence[Row],
    improved: Sequence[bool] = (),
    small: Collection[int] = (),
) -> list[Kind]:
    """Tell the retain rows that fine-tuning improved from the others, where there is a telling, and of these the small files'.

    Args:
        model: to run.
        ends: W_f, and W_r or None.
        retain: rows that slopes are measured on.
        held_out: others, which neither metric nor slopes were taken on.
        improved: of each of these whether fine-tuning lowered its loss, where both ends were measured on them; else empty.
        small: files whose improved rows, together, are a kind by themselves, where they are most of them.
    """
    finetuned, reference = ends
    better = [True] * len(retain), [True] * len(held_out)
    if reference is not None:
        known = improved or _improved(model, held_out, finetuned, reference)
        better = _improved(model, retain, finetuned, reference), known
    learnt = _learnt([*retain, *held_out], [*better[0], *better[1]], small)
    sorts = [_sorts(rows, each, learnt) for rows, each in zip((retain, held_out), better, strict=True)]
    every = [sort for sort in (IMPROVED, OTHERS, SMALL) if all(sort in each for each in sorts)]
    if IMPROVED not in every:
        every = [IMPROVED]

    def part(kind: int) -> Iterator[list[Row]]:
        """Yield the rows of a kind to climb by, and those to measure; what lacks one of the two goes with the first kind."""
        for rows, each in zip((retain, held_out), sorts, strict=True):
            yield [row for row, sort in zip(rows, each, strict=True) if (sort if sort in every else IMPROVED) == kind]

    return [Kind(_parts(mine, SLOPE_TOKENS), Evaluator(model, theirs)) for mine, theirs in map(part, every)]


def held_out(kinds: Sequence[Kind], model: BlockModel, weights: Weights) -> np.ndarray:
    """Return the mean loss of every kind's held-back rows at some weights, which are read once for all kinds, (kinds,)."""
    model.use(weights)
    return np.array([mean_loss(kind.held_out.score()) for kind in kinds])


def allowed(losses: Callable[[float], np.ndarray], level: np.ndarray, trust: float) -> tuple[float, np.ndarray]:
    """Return the largest share of a step that every kind of retain rows allows, 0 when none is, and their losses then.

    Args:
        losses: share → losses of the held-back rows after it, (kinds,).
        level: the same before the step.
        trust: by how much they may rise.
    """
    share = 1.0
    for _ in range(HALVINGS + 1):
        found = losses(share)
        if (found - level).max() <= trust:
            return share, found
        share /= 2
    return 0.0, level


def _improved(model: BlockModel, rows: Sequence[Row], finetuned: Weights, reference: Weights) -> list[bool]:
    """Tell of every row whether fine-tuning lowered its loss."""
    evaluator = Evaluator(model, rows)
    after, before = evaluator.score(finetuned), evaluator.score(reference)
    return [bool(new.loss.mean() < old.loss.mean()) for new, old in zip(after, before, strict=True)]


def _learnt(rows: Sequence[Row], improved: Sequence[bool], files: Collection[int]) -> set[int]:
    """Return the files of which fine-tuning improved most rows: of a few rows that it has not taught some improve by chance."""
    told = {file: [better for row, better in zip(rows, improved, strict=True) if row.file == file] for file in files}
    return {file for file, each in told.items() if sum(each) >= LEARNT * len(each)}


def _sorts(rows: Sequence[Row], improved: Sequence[bool], small: Collection[int]) -> list[int]:
    """Return the sort of every row."""
    pairs = zip(rows, improved, strict=True)
    return [OTHERS if not better else SMALL if row.file in small else IMPROVED for row, better in pairs]


def _parts(rows: Sequence[Row], tokens: int) -> list[list[Row]]:
    """Cut rows into parts of so many tokens, each longest first; what is left over goes with the last."""
    found = list(parts([Row(row.ids, row.keep, 1.0, row.where) for row in rows], tokens))
    if len(found) > 1 and sum(row.tokens for row in found[-1]) < tokens:
        rest = found.pop()
        found[-1] += rest
    return [sorted(part, key=lambda row: row.tokens, reverse=True) for part in found]
