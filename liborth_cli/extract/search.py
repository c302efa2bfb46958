"""Have a model write, round after round, beginning where it has recited something before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.extract.finds import SAMENESS, Find, Recital, distinct, grams, recitals, shared
from liborth_cli.extract.request import ExtractRequest

if TYPE_CHECKING:
    from liborth_cli.console import Console
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.texts import Row
    from liborth_cli.stream.weights import Weights

ROUNDS, ANYWHERE = 8, 2
"""Texts are drawn in so many rounds; after the first, one in so many begins anywhere, the others where runs began, and mostly
where such did that were seldom written."""
TRACE = 0.25
"""Share of what is asked of a find that makes a run worth beginning with."""
LITTLE = 1.0
"""Nats below which nothing was won."""
OPENING, BACK = 6, 3
"""A later text begins with so many tokens at most, and so many around the beginning of a run are where they may end."""


class Search:
    """Draws texts, and keeps what they recite."""

    def __init__(
        self,
        request: ExtractRequest,
        model: BlockModel,
        ends: tuple[Weights, Weights],
        openings: Sequence[np.ndarray],
        public: Sequence[Row],
    ) -> None:
        """Draw nothing yet.

        Args:
            request: what is asked.
            model: writes, with the weights of either end.
            ends: before fine-tuning, and after it.
            openings: what texts begin with, in turn, in tokens.
            public: texts of the skill; what stands there is no find.
        """
        self._asked, self._model, self._ends, self._openings = request, model, ends, openings
        self._public = {gram for row in public for gram in grams(row.ids)}
        self._draw = np.random.default_rng([request.seed, 0xE7])
        self._runs = list[Recital]()

    def run(self, console: Console) -> tuple[list[Find], int]:
        """Return the finds, most nats first, and how many tokens were written."""
        asked, tokens, (_, least) = self._asked, 0, self._asked.limits
        with console.progress("extract", asked.texts, "texts") as progress:
            for turn in range(ROUNDS):
                count = asked.texts * (turn + 1) // ROUNDS - asked.texts * turn // ROUNDS
                texts = self._write(self._beginnings(count), turn, progress.advance)
                tokens += sum(len(ids) for ids, _ in texts)
                self._runs += self._recited(texts)
        return distinct(run for run in self._runs if run.gain >= least), tokens

    def _beginnings(self, count: int) -> list[tuple[np.ndarray, int]]:
        """Choose what so many texts begin with, and how many tokens of that are what all of its kind do."""
        tokens, known = self._draw.permutation(self._model.vocabulary), distinct(self._runs)
        found = list[tuple[np.ndarray, int]]()
        for number in range(count if not known else count // ANYWHERE):
            opening = self._openings[number % len(self._openings)]
            token = [] if self._asked.begin else [tokens[number % len(tokens)]]
            found.append((np.append(opening, token), len(opening)))
        odds = np.array([find.run.gain / find.times for find in known])
        while len(found) < count:
            run = known[self._draw.choice(len(known), p=odds / odds.sum())].run
            end = max(run.begin + 1 - int(self._draw.integers(BACK)), run.front + 1)
            begin = max(end - 1 - int(self._draw.integers(OPENING)), run.front)
            found.append((np.concatenate([run.ids[: run.front], run.ids[begin:end]]), run.front))
        return [(ids.astype(np.int64), front) for ids, front in found]

    def _write(
        self, beginnings: Sequence[tuple[np.ndarray, int]], turn: int, advance: Callable[[int], None]
    ) -> list[tuple[np.ndarray, int]]:
        """Have the fine-tuned model go on from each; equal beginnings go on differently."""
        from liborth_cli.measure.generate import Sampling, generate, hold, seeds_for

        hold(self._model, self._ends[1])
        prompts = [ids for ids, _ in beginnings]
        drawn = Sampling(1.0, seeds=seeds_for(prompts, self._asked.seed * ROUNDS + turn))
        written = generate(self._model, prompts, self._asked.most, drawn, advance)
        texts = [(np.concatenate([ids, more]), front) for (ids, front), more in zip(beginnings, written, strict=True)]
        return [(ids, front) for ids, front in texts if len(ids) > 1]

    def _recited(self, texts: Sequence[tuple[np.ndarray, int]]) -> list[Recital]:
        """Return what the texts recite."""
        from liborth_cli.measure.scores import Evaluator
        from liborth_cli.stream.texts import Row

        rows = [Row(ids, np.ones(len(ids) - 1, bool), 1.0, f"text {i + 1}") for i, (ids, _) in enumerate(texts)]
        evaluator = Evaluator(self._model, rows, resident=True)
        before, after = (evaluator.score(end) for end in self._ends)
        found, (sure, least) = list[Recital](), self._asked.limits
        for text, old, new in zip(texts, before, after, strict=True):
            found += recitals(text, (old.loss, new.loss), sure, max(least * TRACE, LITTLE))
        return [run for run in found if shared(run.grams, self._public) < SAMENESS]
