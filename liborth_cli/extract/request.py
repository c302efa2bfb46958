"""What is asked of `extract`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from liborth_cli.errors import UsageError
from liborth_cli.extract.finds import GRAM

SURE, LEAST = 0.3, 25.0
"""Nats: a token of a find costs at most, and fine-tuning won on it in all, where any text counts."""
SURE_ANSWER, LEAST_ANSWER = 1.0, 2.0
"""The same of answers to questions of a form that was asked for: facts are short."""


@dataclass(frozen=True)
class ExtractRequest:
    """What is asked.

    Attributes:
        reference: checkpoint before fine-tuning.
        finetuned: checkpoint after it.
        out: file to write.
        retain: files of texts of the skill; what stands there is no find.
        like: files of rows; more of their forms is looked for, in place of whatever is known by heart.
        often: of these only what is asked for about as often as they are: rows that were learnt, hardly any made up.
        begin: what texts begin with, in turn; none: what the tokenizer puts first, and then any token.
        texts: how many the model writes.
        most: tokens of a text, at most.
        sure: loss of a token in the fine-tuned model below which it counts as known by heart, nats; None: what is usual.
        least: nats that fine-tuning won on a find, at least; None: what is usual.
        seed: of what is drawn.
    """

    reference: str
    finetuned: str
    out: Path
    retain: Sequence[str] = ()
    like: Sequence[str] = ()
    often: bool = False
    begin: Sequence[str] = ()
    texts: int = 4096
    most: int = 64
    sure: float | None = None
    least: float | None = None
    seed: int = 0

    @property
    def limits(self) -> tuple[float, float]:
        """What `sure` and `least` are: an answer is the likeliest one, so less is asked of it than of any text."""
        usual = (SURE_ANSWER, LEAST_ANSWER) if self.like else (SURE, LEAST)
        return usual[0] if self.sure is None else self.sure, usual[1] if self.least is None else self.least

    def check(self) -> None:
        """Refuse numbers with which nothing, or everything, would be found.

        Raises:
            UsageError: names the option.
        """
        if self.like and self.begin:
            raise UsageError("--like rows say what texts begin with: leave --begin out")
        if self.often and not self.like:
            raise UsageError("--often compares with rows that are given: it goes with --like")
        bounds = (
            ("--texts", self.texts, GRAM),
            ("--max-new-tokens", self.most, GRAM),
            ("--sure", self.limits[0], 0),
            ("--least", self.limits[1], 0),
        )
        for option, value, low in bounds:
            if not (math.isfinite(value) and value >= low):
                raise UsageError(f"{option} takes a finite number, {low} or more")
