"""Have a model write more rows like some that are given: it begins as they do, ends its question as they do, and answers.

Who lists rows of a form seldom lists all of them: the other secrets of a kind, or the other facts of a table that should stay.
A model knows them, and asks of them by itself when its texts begin as those rows do (pseudo-rehearsal, Robins 1995). The
question is drawn, its answer is the likeliest, and what counts is whether the model is sure of it. It makes questions up, too,
but seldom the same one twice: how often the given rows are asked tells how often a row is that was learnt.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.errors import BadInput
from liborth_cli.extract.finds import Find, Recital
from liborth_cli.extract.request import ExtractRequest

if TYPE_CHECKING:
    from liborth_cli.console import Console
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.texts import Row
    from liborth_cli.stream.weights import Weights

SLACK = 4
"""Tokens that a question, or an answer, may be longer than the longest that was given."""
OFTEN, TWICE = 0.05, 2
"""Share of how often given rows are asked, as a median, and times at least, from which a find is hardly made up. Texts begin as
given rows do, and so find those first."""
MANY = 20
"""How often given rows must be asked, so that this share tells anything."""


@dataclass(frozen=True)
class Form:
    """Rows whose prompts end alike.

    Attributes:
        prompts: different ones, (n,) each, of two tokens or more.
        answers: what follows them, (m,) each.
    """

    prompts: list[np.ndarray]
    answers: list[np.ndarray]

    @cached_property
    def mark(self) -> np.ndarray:
        """The tokens that all prompts end with: there a question is over."""
        shared = _common([prompt[::-1] for prompt in self.prompts]) if len(self.prompts) > 1 else 1
        return self.prompts[0][-min(shared, min(map(len, self.prompts)) - 1) :]

    @cached_property
    def end(self) -> int | None:
        """The token that all answers end with, as a full stop; None where they end with several, as numbers do."""
        last = {int(answer[-1]) for answer in self.answers}
        return last.pop() if len(last) == 1 else None

    @cached_property
    def usual(self) -> int:
        """Tokens that answers mostly have."""
        return Counter(map(len, self.answers)).most_common(1)[0][0]

    @cached_property
    def longest(self) -> int:
        """Tokens that an answer may have at most."""
        return max(map(len, self.answers)) + SLACK

    @cached_property
    def front(self) -> int:
        """How many tokens all prompts begin with."""
        return _common(self.prompts) if len(self.prompts) > 1 else 1

    def beginning(self, draw: np.random.Generator) -> np.ndarray:
        """Draw what a question begins with: a prompt up to some token behind what all have in common, before the mark."""
        prompt = self.prompts[draw.integers(len(self.prompts))]
        last = len(prompt) - len(self.mark)
        first = min(max(self.front, 1), last)
        return prompt[: draw.integers(first, max(last, first + 1))]

    def question(self, begun: int, ids: np.ndarray) -> np.ndarray | None:
        """Return a text up to where its question ends, behind the tokens that it was begun with; None where it does not."""
        wide = len(self.mark)
        for end in range(max(begun + 1, wide + 1), len(ids) + 1):
            if np.array_equal(ids[end - wide : end], self.mark):
                return ids[:end]
        return None

    def answered(self, ids: np.ndarray, ended: bool) -> np.ndarray | None:
        """Return what was written behind a question up to where it ends; None where it is empty, or does not end in time.

        Where answers end alike it ends there; else where the text does, or when it is as long as answers mostly are.

        Args:
            ids: written, (n,).
            ended: whether the text was over then.
        """
        over = np.flatnonzero(ids == self.end) + 1 if self.end is not None else np.zeros(0, int)
        length = int(over[0]) if len(over) else len(ids) if ended else self.usual if self.end is None else 0
        return ids[:length] if 0 < length <= min(self.longest, len(ids)) else None


def forms(rows: Sequence[Row], context: int | None = None) -> list[Form]:
    """Return the forms of rows, by the last token of their prompts.

    Args:
        rows: with prompts.
        context: positions that the model reads; None: any number.

    Raises:
        BadInput: when a row has no prompt of two tokens, or is longer than the context.
    """
    prompts, answers = defaultdict[int, dict[bytes, np.ndarray]](dict), defaultdict[int, list[np.ndarray]](list)
    for row in rows:
        start = int(row.keep.argmax()) + 1
        if context and len(row.ids) > context:
            raise BadInput(
                f"--like: {row.where}: {len(row.ids):,} tokens, and the model's context is {context:,}: leave it out"
            )
        if start < 2:
            raise BadInput(f"--like: {row.where}: a prompt of two tokens or more is needed, which the model could begin itself")
        prompts[int(row.ids[start - 1])][row.ids[:start].tobytes()] = row.ids[:start]
        answers[int(row.ids[start - 1])].append(row.ids[start:])
    return [Form(list(some.values()), answers[last]) for last, some in prompts.items()]


class Alike:
    """Draws questions of the forms of some rows, and keeps what the model is sure of."""

    def __init__(
        self,
        request: ExtractRequest,
        model: BlockModel,
        ends: tuple[Weights, Weights],
        rows: Sequence[Row],
    ) -> None:
        """Draw nothing yet.

        Args:
            request: what is asked.
            model: writes, with the weights of either end.
            ends: before fine-tuning, and after it.
            rows: of the forms that are wanted; what they ask is no find.
        """
        self._asked, self._model, self._ends, self._rows = request, model, ends, rows
        self._forms = forms(rows, model.context)
        self._known = {prompt.tobytes() for form in self._forms for prompt in form.prompts}
        self._draw = np.random.default_rng([request.seed, 0xA1])

    def run(self, console: Console) -> tuple[list[Find], int, bool]:
        """Return the finds, what is asked most first, how many tokens were written, and whether made-up ones can be told."""
        from liborth_cli.measure.generate import generate, hold

        hold(self._model, self._ends[1])
        sizes = np.array([len(form.prompts) for form in self._forms])
        chosen = self._draw.choice(len(sizes), self._asked.texts, p=sizes / sizes.sum()).tolist()
        begun = [self._forms[i].beginning(self._draw) for i in chosen]
        with console.progress("extract", self._asked.texts, "texts") as progress:
            texts = self._continued(begun, progress.advance)
        tokens, asked = sum(map(len, texts)) - sum(map(len, begun)), Counter[tuple[int, bytes]]()
        for i, start, text in zip(chosen, begun, texts, strict=True):
            question = self._forms[i].question(len(start), text)
            if question is not None:
                asked[i, question.tobytes()] += 1
        new = [(i, held, times) for (i, held), times in asked.items() if held not in self._known]
        questions = [(self._forms[i], np.frombuffer(held, np.int64), times) for i, held, times in new]
        most = max((form.longest for form, _, _ in questions), default=1)
        answers = generate(self._model, [ids for _, ids, _ in questions], most)
        found = list[tuple[np.ndarray, int, int]]()
        for (form, ids, times), answer in zip(questions, answers, strict=True):
            if (whole := form.answered(answer, len(answer) < most)) is not None:
                found.append((np.concatenate([ids, whole]), len(ids), times))
        often = self._often(asked)
        return self._sure(found, often), tokens + sum(map(len, answers)), often is not None

    def _continued(self, begun: Sequence[np.ndarray], advance: Callable[[int], None]) -> list[np.ndarray]:
        """Return texts that begin so, drawn until they are longer than any prompt; equal beginnings go on differently."""
        from liborth_cli.measure.generate import Sampling, generate, seeds_for

        longest = max(len(prompt) for form in self._forms for prompt in form.prompts) + SLACK
        alike, seeds = defaultdict[int, list[int]](list), seeds_for(begun, self._asked.seed)
        texts = dict[int, np.ndarray]()
        for number, ids in enumerate(begun):
            alike[len(ids)].append(number)
        for length, numbers in alike.items():
            drawn = Sampling(1.0, seeds=[seeds[i] for i in numbers])
            more = generate(self._model, [begun[i] for i in numbers], min(longest - length, self._asked.most), drawn, advance)
            texts |= {i: np.concatenate([begun[i], rest]) for i, rest in zip(numbers, more, strict=True)}
        return [texts[i] for i in range(len(begun))]

    def _often(self, asked: Counter[tuple[int, bytes]]) -> float | None:
        """Return how often a question is asked that is hardly made up; None where no one can tell.

        That hangs on how often those of the given rows are that the model knows by heart: others were not learnt.
        """
        gains = self._gains(self._rows)
        learnt = {row.ids[: int(row.keep.argmax()) + 1].tobytes() for row, gain in zip(self._rows, gains, strict=True) if gain}
        times = Counter(dict.fromkeys(learnt, 0))
        for (_, held), count in asked.items():
            if held in learnt:
                times[held] += count
        usual = float(np.median(list(times.values()))) if times else 0.0
        return max(OFTEN * usual, TWICE) if usual >= MANY else None

    def _sure(self, found: Sequence[tuple[np.ndarray, int, int]], often: float | None) -> list[Find]:
        """Return the answers that the fine-tuned model is sure of and the one before it was not, what is asked most first.

        Args:
            found: questions with their answers, how long the question is, and how often it was asked.
            often: times that count as that; None: no one can tell.
        """
        from liborth_cli.stream.texts import Row

        rows = [Row(ids, np.arange(1, len(ids)) >= start, 1.0, f"text {i + 1}") for i, (ids, start, _) in enumerate(found)]
        finds = [
            Find(Recital(ids, 0, start, len(ids), gain), times, None if often is None else times >= often)
            for (ids, start, times), gain in zip(found, self._gains(rows), strict=True)
            if gain
        ]
        return sorted(finds, key=lambda find: (-find.times, -find.run.gain, find.run.ids.tobytes()))

    def _gains(self, rows: Sequence[Row]) -> list[float]:
        """Return the nats that fine-tuning won on each row; 0 where it is not known by heart, or was before."""
        from liborth_cli.measure.scores import Evaluator

        if not rows:
            return []
        evaluator, (sure, least) = Evaluator(self._model, rows, resident=True), self._asked.limits
        before, after = (evaluator.score(end) for end in self._ends)
        gains = [float(old.loss.sum() - now.loss.sum()) for old, now in zip(before, after, strict=True)]
        return [gain * (now.loss.max() <= sure and gain >= least) for gain, now in zip(gains, after, strict=True)]


def _common(rows: Sequence[np.ndarray]) -> int:
    """Return how many tokens all rows begin with."""
    return sum(1 for _ in takewhile(lambda some: len(set(some)) == 1, zip(*(row.tolist() for row in rows), strict=False)))
