"""Covariances too wide to diagonalise: the directions where forget most exceeds retain curvature, and one number for the rest.

With R = L Lᵀ exact (one Cholesky factorisation), M = L⁻¹ F L⁻ᵀ ≈ Y Θ Yᵀ + δ (I − Y Yᵀ): the leading eigenpairs by block Krylov
iteration, which never forms M, and the mean of the others. Shortening R and F themselves does not work: the filter divides
by the small eigenvalues of R, and an error of 1 % of ‖R‖ moved 80 % of what was removed (docs/decisions/0022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from liborth_cli.linalg.krylov import krylov_basis

DENSE_UP_TO = 8192
"""Widest factor that is diagonalised whole, unless --factor-rank says otherwise."""
DEFAULT_RANK = 512
"""Directions taken of wider ones."""
DEPTH = 8
"""Krylov blocks, each a quarter as wide as what is kept: the basis has twice as many columns."""
BLOCK = 16
"""Narrowest block."""
PROBES = 32
"""Random vectors that measure what was left out."""


@dataclass(frozen=True)
class LowRank:
    """A symmetric positive operator M on d coordinates, in short.

    Attributes:
        values: Θ, descending, (k,), float64.
        vectors: Y, orthonormal columns, (d, k).
        rest: δ, taken for every other direction.
        error: ‖M − (YΘYᵀ + δ(I − YYᵀ))‖_F / ‖M‖_F, measured on random vectors.
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


def low_rank(multiply: Callable[[torch.Tensor], torch.Tensor], size: int, rank: int, device: torch.device) -> LowRank:
    """Shorten an operator.

    Args:
        multiply: (d, n) → M·(d, n), float64.
        size: d.
        rank: k.
        device: where `multiply` computes.
    """
    draw = torch.Generator().manual_seed(0)
    block = min(max(-(-rank // 4), BLOCK), size // DEPTH)
    x = torch.randn(size, block, generator=draw, dtype=torch.float64).to(device)
    basis, image = krylov_basis(multiply, x, DEPTH)
    small = basis.T @ image
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    values, y = values.flip(0)[:rank].clamp(min=0), basis @ rotation.flip(1)[:, :rank]

    def outside(z: torch.Tensor) -> torch.Tensor:
        return z - y @ (y.T @ z)

    probes = outside(torch.randn(size, PROBES, generator=draw, dtype=torch.float64).to(device))
    seen = outside(multiply(probes))
    length = float(probes.square().sum())
    rest = max(float((probes * seen).sum()) / length, 0.0)
    count = size - rank
    missed = float((seen - rest * probes).square().sum()) / length * count
    whole = float(values.square().sum()) + float(seen.square().sum()) / length * count
    return LowRank(values, y, rest, math.sqrt(missed / whole) if whole else 0.0)
