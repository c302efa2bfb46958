"""Rows longer than the context, scored as a decoder that keeps the last `context` tokens would see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from liborth_cli.measure.scores import Evaluator, RowScore
from liborth_cli.stream.blocks import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Weights


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

    def __init__(self, model: BlockModel, rows: Sequence[Row], context: int, resident: bool | None = None) -> None:
        """Cut the long rows into windows.

        Args:
            model: as for `Evaluator`.
            rows: of any length.
            context: most positions the model reads.
            resident: as for `Evaluator`.
        """
        groups = [windows(row, context) for row in rows]
        self.model, self.rows = model, list(rows)
        self._inner = Evaluator(model, [window for group in groups for window in group], resident)
        self._ends = np.cumsum([len(group) for group in groups]).tolist()

    def score(self, weights: Weights | None = None, advance: Callable[[int], None] = lambda tokens: None) -> list[RowScore]:
        """Score every row; see `Evaluator.score`."""
        found = self._inner.score(weights, advance)
        return [_join(found[start:end]) for start, end in zip([0, *self._ends], self._ends, strict=False)]


def _join(parts: Sequence[RowScore]) -> RowScore:
    if len(parts) == 1:
        return parts[0]
    return RowScore(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("loss", "hit", "mean", "deviation")))
