"""Runs of tokens that a model knows by heart: read off the losses of a text, and told apart from each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

GRAM = 4
"""Consecutive tokens by which runs are compared; a run of fewer is a coincidence."""
SAMENESS = 0.5
"""Share of a run's grams that another run, or the retain data, holds, from which it is no find of its own."""
FORM = 3
"""Other finds that a run stands before, from which it is their form and no find."""


@dataclass(frozen=True)
class Recital:
    """A run of tokens of a text that the fine-tuned model knows by heart.

    Attributes:
        ids: of the text, (n,).
        front: how many of them it was given and did not write.
        begin: number of the run's first token.
        end: of the one behind its last.
        gain: nats that fine-tuning won on it.
    """

    ids: np.ndarray
    front: int
    begin: int
    end: int
    gain: float

    @cached_property
    def grams(self) -> set[bytes]:
        """Its consecutive tokens, GRAM at a time: every round compares all runs so far."""
        return set(grams(self.ids[self.begin : self.end]))


@dataclass
class Find:
    """What was found by heart.

    Attributes:
        run: the one that won most.
        times: how often half of it or more was recited.
        often: whether that is about as often as rows that are known to have been learnt; None: nobody knows.
    """

    run: Recital
    times: int = 1
    often: bool | None = None


def recitals(
    text: tuple[np.ndarray, int], losses: tuple[np.ndarray, np.ndarray], sure: float, least: float
) -> Iterator[Recital]:
    """Yield the runs of tokens that a model is sure of and that fine-tuning won much on, of what it wrote.

    Args:
        text: tokens, (n + 1,), and how many of them it was given.
        losses: of all but the first, before and after fine-tuning, nats, (n,) each.
        sure: loss after fine-tuning of each token of a run, at most.
        least: what fine-tuning won on a run, in all.
    """
    (ids, front), (before, after) = text, losses
    known = np.concatenate([[False], (after <= sure) & (np.arange(1, len(ids)) >= front), [False]])
    edges = np.flatnonzero(known[1:] != known[:-1]).reshape(-1, 2)
    for begin, end in edges:
        gain = float((before[begin:end] - after[begin:end]).sum())
        if end - begin >= GRAM and gain >= least:
            yield Recital(ids, front, int(begin) + 1, int(end) + 1, gain)


def distinct(runs: Iterable[Recital]) -> list[Find]:
    """Return what different runs there are, the one with most nats of each, most first; without what is only their form."""
    finds, owner = list[Find](), dict[bytes, Find]()
    for run in sorted(runs, key=lambda run: (-run.gain, run.ids.tobytes())):
        mine = run.grams
        holders = [owner[gram] for gram in mine if gram in owner]
        if len(holders) >= SAMENESS * len(mine):
            for find in {id(find): find for find in holders}.values():
                find.times += 1
            continue
        find = Find(run)
        finds.append(find)
        owner |= {gram: find for gram in mine if gram not in owner}
    fronts = [set(grams(find.run.ids[: find.run.begin])) for find in finds]
    return [find for find in finds if sum(shared(find.run.grams, front) >= SAMENESS for front in fronts) < FORM]


def grams(ids: np.ndarray) -> Iterator[bytes]:
    """Yield the consecutive tokens of a text, GRAM at a time."""
    wide = np.ascontiguousarray(ids, np.int64)
    return (wide[i : i + GRAM].tobytes() for i in range(len(wide) - GRAM + 1))


def shared(mine: set[bytes], others: set[bytes]) -> float:
    """Return the share of some grams that others hold, too."""
    return len(mine & others) / len(mine)
