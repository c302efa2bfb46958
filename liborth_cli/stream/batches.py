"""Rows into groups that fit in memory, and groups into batches of rows of one length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from liborth_cli.stream.labels import row_seed, uniforms
from liborth_cli.stream.texts import Row


@dataclass(frozen=True)
class Batch:
    """Rows of one length: nothing is ever padded, so every position is a token.

    Attributes:
        ids: what the model reads, (rows, tokens).
        labels: the real next tokens, (rows, tokens).
        keep: which positions carry loss, (rows, tokens), bool.
        draws: numbers in [0, 1) that sampled labels are drawn with, (rows, tokens); None takes the real ones.
        weight: how often every token of these rows counts.
        where: a name for messages.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    keep: torch.Tensor
    draws: torch.Tensor | None
    weight: float
    where: str

    @property
    def tokens(self) -> int:
        """Number of positions."""
        return self.ids.numel()


Counted = TypeVar("Counted", Row, Batch)


def groups(rows: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    """Cut the rows, in their order, into groups of at most so many positions; a longer row is a group by itself."""
    group: list[Row] = []
    held = 0
    for row in rows:
        if group and held + row.tokens > tokens:
            yield group
            group, held = [], 0
        group.append(row)
        held += row.tokens
    if group:
        yield group


def parts(every: Sequence[Counted], tokens: int) -> Iterator[list[Counted]]:
    """Cut rows or batches, in their order, into parts of so many positions and more; the last has what is left."""
    part = list[Counted]()
    for one in every:
        part.append(one)
        if sum(other.tokens for other in part) >= tokens:
            yield part
            part = []
    if part:
        yield part


def batches(rows: Sequence[Row], tokens: int, seed: int | None, device: torch.device) -> list[Batch]:
    """Put rows of the same length and weight together, so that nothing is ever padded (docs/decisions/0010).

    Args:
        rows: one group.
        tokens: positions in a batch, at most; a longer row is a batch by itself.
        seed: of the sampled labels; None takes the real ones.
        device: where the batches go.

    Returns:
        The batches, longest rows first.
    """
    alike: dict[tuple[int, float], list[Row]] = defaultdict(list)
    for row in rows:
        alike[row.tokens, row.weight].append(row)
    result = []
    for (length, weight), some in sorted(alike.items(), key=lambda item: item[0], reverse=True):
        count = max(tokens // length, 1)
        for start in range(0, len(some), count):
            part = some[start : start + count]
            ids = torch.from_numpy(np.stack([row.ids for row in part]))
            keep = torch.from_numpy(np.stack([row.keep for row in part]))
            draws = None
            if seed is not None:
                draws = torch.stack([uniforms(row_seed(seed, row.ids.tobytes()), length) for row in part]).to(device)
            where = part[0].where if len(part) == 1 else f"{part[0].where} … {part[-1].where}"
            ids = ids.to(device)
            result.append(Batch(ids[:, :-1], ids[:, 1:], keep.to(device), draws, weight, where))
    return result
