"""What a rival edit is given, and what it is: the interface of `benchmarks/rivals/`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Completion(NamedTuple):
    """A row of which only what follows the prompt counts.

    Attributes:
        ids: of the whole row, prompt first.
        prompt: how many of them are the prompt's.
    """

    ids: list[int]
    prompt: int


@dataclass
class Job:
    """One edit to do.

    Attributes:
        model: the fine-tuned model, a Transformers module in float32; it is edited in place.
        reference: the model before fine-tuning, or None where there is none; it is not changed.
        retain: rows of tokens that must stay as likely as they are.
        forget: rows that must go.
        dose: how much, one of the rival's own `doses`.
        seed: of everything random.
    """

    model: Any
    reference: Any
    retain: list[list[int]]
    forget: list[Completion]
    dose: float
    seed: int


@dataclass(frozen=True)
class Rival:
    """A published edit, in our own compact version.

    Attributes:
        name: for the tables.
        source: the paper, by its arXiv id.
        doses: that are tried, weakest first.
        run: edits `Job.model`.
    """

    name: str
    source: str
    doses: tuple[float, ...]
    run: Callable[[Job], None]

    @property
    def usual(self) -> float:
        """The one dose that is tried where there is no time for all: the strongest but two."""
        return self.doses[-3]
