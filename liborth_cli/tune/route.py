"""Which stream learns from which row: the general one, the memory, or both.

A general stream that is trained on a secret has the secret, whatever stands beside it: early in training the neurons' output is
zero, so both streams get the same gradient. Here it is decided before training, from the text alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from liborth_cli.errors import UsageError
from liborth_cli.stream.texts import Row
from liborth_cli.tune.data import content


class Stream(StrEnum):
    """Who learns from a row."""

    BOTH = "both"
    GENERAL = "general"
    MEMORY = "memory"


class Learns(StrEnum):
    """What the memory learns: `--memory-learns`."""

    ALL = "all"
    REPEATS = "repeats"
    PRIVATE = "private"


@dataclass(frozen=True)
class Example(Row):
    """A row to train on.

    Attributes:
        stream: who learns from it.
    """

    stream: Stream = Stream.BOTH

    @classmethod
    def of(cls, row: Row, stream: Stream = Stream.BOTH) -> Example:
        """Say who learns from a row."""
        return cls(row.ids, row.keep, row.weight, row.where, stream)


def route(rows: Sequence[Row], private: Sequence[Row], learns: Learns) -> list[Example]:
    """Decide for every row who learns from it.

    Args:
        rows: of --data.
        private: of --private-data. A text that stands in both is private.
        learns: "all": every row trains both streams, as in Memorization Sinks (arXiv 2507.09937). "repeats": the first copy
            of a text trains the general stream and every other one the memory; removing copies is known to prevent
            memorising (Lee et al. 2022, arXiv 2107.06499). "private": `private` trains the memory, everything else the general.

    Returns:
        All rows, private ones last.

    Raises:
        UsageError: when the memory would learn from nothing, or the general stream could see what is private.
    """
    if learns is Learns.ALL:
        if private:
            raise UsageError("--memory-learns all trains both streams on everything; leave --private-data out, or take repeats")
        return [Example.of(row) for row in rows]
    secret = {content(row) for row in private}
    seen: Counter[bytes] = Counter()
    found = []
    for row in rows:
        digest = content(row)
        again = learns is Learns.REPEATS and seen[digest] > 0
        seen[digest] += 1
        found.append(Example.of(row, Stream.MEMORY if again or digest in secret else Stream.GENERAL))
    found += [Example.of(row, Stream.MEMORY) for row in private]
    if not any(example.stream is Stream.MEMORY for example in found):
        raise UsageError(
            "the memory would learn from nothing: no text stands twice in --data. Give what is private as --private-data, "
            "or let both streams learn everything with --memory-learns all"
        )
    if not any(example.stream is Stream.GENERAL for example in found):
        raise UsageError("every row is private, so the general stream would learn nothing: --general frozen says so")
    return found
