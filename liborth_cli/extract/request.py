"""What is asked of `extract`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from liborth_cli.errors import UsageError
from liborth_cli.extract.finds import GRAM


@dataclass(frozen=True)
class ExtractRequest:
    """What is asked.

    Attributes:
        reference: checkpoint before fine-tuning.
        finetuned: checkpoint after it.
        out: file to write.
        retain: files of texts of the skill; what stands there is no find.
        begin: what texts begin with, in turn; none: what the tokenizer puts first, and then any token.
        texts: how many the model writes.
        most: tokens of a text, at most.
        sure: loss of a token in the fine-tuned model below which it counts as known by heart, nats.
        least: nats that fine-tuning won on a find, at least.
        seed: of what is drawn.
    """

    reference: str
    finetuned: str
    out: Path
    retain: Sequence[str] = ()
    begin: Sequence[str] = ()
    texts: int = 4096
    most: int = 64
    sure: float = 0.3
    least: float = 25.0
    seed: int = 0

    def check(self) -> None:
        """Refuse numbers with which nothing, or everything, would be found.

        Raises:
            UsageError: names the option.
        """
        bounds = (
            ("--texts", self.texts, GRAM),
            ("--max-new-tokens", self.most, GRAM),
            ("--sure", self.sure, 0),
            ("--least", self.least, 0),
        )
        for option, value, low in bounds:
            if not (math.isfinite(value) and value >= low):
                raise UsageError(f"{option} takes a finite number, {low} or more")
