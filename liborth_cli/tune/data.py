"""Rows to train on: the evaluation split, the seeded order, and batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch

from liborth_cli.errors import BadInput
from liborth_cli.stream.texts import Row

R = TypeVar("R", bound=Row)

IGNORED = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True)
class Batch:
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
    def of(cls, rows: Sequence[Row], device: torch.device) -> Batch:
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
    """Hash what a row says: the same text is the same sequence, wherever and however often it stands."""
    return hashlib.sha256(row.ids.tobytes()).digest()


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Take a share of the rows out for evaluation. Copies of one text always stay on one side.

    Args:
        rows: all rows.
        share: of the distinct texts, in [0, 1).
        seed: decides which.

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
