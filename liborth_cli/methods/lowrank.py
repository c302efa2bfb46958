"""A covariance too wide to diagonalise: its leading directions, and one number for all the others.

M ≈ Y Θ Yᵀ + δ (I − Y Yᵀ), with δ the mean of what is left of the trace. A multiple of the identity and no other diagonal: it
is the same in every coordinate system, and two such matrices are diagonalised together inside the directions they have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from liborth_cli.curvature.eigen import trace
from liborth_cli.linalg.krylov import block_krylov
from liborth_cli.linalg.truncated import energy

DENSE_UP_TO = 8192
"""Widest factor that is diagonalised whole, unless --factor-rank says otherwise."""
DEFAULT_RANK = 512
"""Directions taken of wider ones."""
DEPTH = 8
"""Krylov blocks, each a quarter as wide as what is kept: the basis has twice as many columns."""
BLOCK = 16
"""Narrowest block."""


@dataclass(frozen=True)
class LowRank:
    """A covariance (d, d) in short.

    Attributes:
        values: Θ, descending, (k,), float64.
        vectors: Y, orthonormal columns, (d, k).
        rest: δ, the curvature of every other direction.
        error: ‖M − (YΘYᵀ + δ(I − YYᵀ))‖_F / ‖M‖_F, measured.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    rest: float
    error: float


def rank_for(factor: torch.Tensor, asked: int | None) -> int | None:
    """Decide how many directions of a factor to take; None for all of them.

    Args:
        factor: in any form; only matrices (d, d) are ever shortened.
        asked: the user's number, for every matrix more than four times as wide; None leaves it to `DENSE_UP_TO`.
    """
    if factor.dim() != 2:
        return None
    if asked is None:
        return DEFAULT_RANK if len(factor) > DENSE_UP_TO else None
    return asked if len(factor) > 4 * asked else None


def low_rank(m: torch.Tensor, rank: int) -> LowRank:
    """Shorten a covariance.

    With Ritz pairs (Θ, Y) the squared error is ‖M‖² − ΣΘ² − δ²(d − k), whatever they are: Θ are Rayleigh quotients of
    orthonormal vectors. So the error is measured, not bounded, up to rounding (about 1e-3).

    Args:
        m: symmetric and positive, (d, d), float32 or float64.
        rank: k.
    """
    size = len(m)
    block = min(max(-(-rank // 4), BLOCK), size // DEPTH)
    pairs = block_krylov(m, rank, block, DEPTH, torch.Generator().manual_seed(0))
    values = pairs.values.double().clamp(min=0)
    rest = max(trace(m) - float(values.sum()), 0.0) / (size - rank)
    whole = energy(m)
    missing = max(whole - float(values.square().sum()) - rest * rest * (size - rank), 0.0)
    return LowRank(values, pairs.vectors, rest, math.sqrt(missing / whole) if whole else 0.0)
