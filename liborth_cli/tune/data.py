"""Rows to train on: which stream learns from which, what is held out, in which order, and in which batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import TypeVar

import torch

from liborth_cli.errors import BadInput, UsageError
from liborth_cli.stream.texts import Row
from liborth_cli.tune.options import Learns

R = TypeVar("R", bound=Row)

IGNORED = -100
"""Label of a position that carries no loss."""


class Stream(StrEnum):
    """Who learns from a row."""

    BOTH = "both"
    GENERAL = "general"
    MEMORY = "memory"


@dataclass(frozen=True)
class Example(Row):
    """A row to train on, and who learns from it."""

    stream: Stream = Stream.BOTH

    @classmethod
    def of(cls, row: Row, stream: Stream = Stream.BOTH) -> Example:
        """Say who learns from a row."""
        return cls(row.ids, row.keep, row.weight, row.where, row.file, row.ended, stream)


@dataclass(frozen=True)
class PaddedBatch:
    """Some rows, padded at their end to one length; a causal model never sees padding before a real token.

    Attributes:
        rows: the rows.
        ids: what the model reads, (rows, n).
        labels: what it predicts, (rows, n); `IGNORED` where there is no loss.
        weights: of each row's tokens, (rows,).
        tokens: Σ weight over the labels that count.
    """

    rows: tuple[Row, ...]
    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    tokens: float

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> PaddedBatch:
        """Pad rows to one length."""
        length = max(row.tokens for row in rows)
        ids = torch.zeros((len(rows), length), dtype=torch.int64)
        labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
        for i, row in enumerate(rows):
            real = torch.from_numpy(row.ids)
            ids[i, : row.tokens] = real[:-1]
            labels[i, : row.tokens] = real[1:].where(torch.from_numpy(row.keep), IGNORED)
        tokens = float(sum(row.weight * int(row.keep.sum()) for row in rows))
        weights = torch.tensor([row.weight for row in rows], dtype=torch.float32)
        return cls(tuple(rows), ids.to(device), labels.to(device), weights.to(device), tokens)


def content(row: Row) -> bytes:
    """Hash what a row says: the same text is the same sequence, wherever and however often it stands, and however it ends."""
    return hashlib.sha256((row.ids[:-1] if row.ended else row.ids).tobytes()).digest()


def assign_learners(rows: Sequence[Row], private: Sequence[Row], learns: Learns) -> list[Example]:
    """Decide for every row who learns from it, before training and from the text alone.

    A general stream that is trained on a secret has the secret, whatever stands beside it: early in training the neurons'
    output is zero, so both streams get the same gradient.

    Args:
        rows: of --data.
        private: of --private-data. A text that stands in both is private.
        learns: all: every row trains both streams, as in Memorization Sinks (arXiv 2507.09937). Repeats: the first copy
            of a text trains the general stream and every other one the memory; removing copies is known to prevent
            memorising (Lee et al. 2022, arXiv 2107.06499). Private: `private` trains the memory, everything else the general.

    Returns:
        All rows, private ones last.

    Raises:
        UsageError: when the memory would learn from nothing, or the general stream could see what is private.
    """
    if learns is Learns.ALL:
        if private:
            raise UsageError("--memory-learns all trains both streams on everything; leave --private-data out, or take repeats")
        return [Example.of(row) for row in rows]
    seen, secret = set(), {content(row) for row in private}
    found = []
    for row in rows:
        digest = content(row)
        again = learns is Learns.REPEATS and digest in seen
        seen.add(digest)
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


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Take a share of the distinct texts out for evaluation; copies of one text always stay on one side.

    Returns:
        The rows to train on, and those held out, both in their order.

    Raises:
        BadInput: when a side would be empty.
    """
    if share == 0.0:
        return list(rows), []
    key = str(seed).encode()
    ranked = sorted({content(row) for row in rows}, key=lambda digest: hashlib.sha256(key + digest).digest())
    out = set(ranked[: round(share * len(ranked))])
    train, held = [r for r in rows if content(r) not in out], [r for r in rows if content(r) in out]
    if not train or not held:
        raise BadInput(f"--eval-share {share:g} of {len(ranked)} different rows leaves one side empty")
    return train, held


def batch_rows(rows: Sequence[R], number: int, size: int, seed: int) -> list[R]:
    """Return the rows of one batch: every epoch is a new permutation, and batches run on from one into the next.

    Args:
        rows: all of them.
        number: which batch, from 0.
        size: rows in a batch.
        seed: decides the order, with the epoch.
    """
    found = []
    for position in range(number * size, (number + 1) * size):
        epoch, index = divmod(position, len(rows))
        found.append(rows[_permutation(len(rows), seed, epoch)[index]])
    return found


def alike(rows: Sequence[R]) -> list[list[R]]:
    """Group rows whose lengths are within a factor of 1.5, longest first: little is padded, and nothing else changes."""
    groups: list[list[R]] = []
    for row in sorted(rows, key=lambda row: -row.tokens):
        if not groups or 1.5 * row.tokens < groups[-1][0].tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    digest = hashlib.sha256(f"order/{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(count, generator=generator).tolist()
