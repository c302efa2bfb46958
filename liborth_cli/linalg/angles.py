"""Angles between the leading subspaces of two matrices."""

from __future__ import annotations

import torch

from liborth_cli.linalg.truncated import energy, leading_subspace


def principal_angles(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the principal angles between two subspaces in radians, ascending, (min(k, l),).

    Björck and Golub 1973: cosines are the singular values of Q_1ᵀQ_2. Small angles are taken from sines, of what Q_2 has
    outside the span of Q_1, because a cosine near 1 has lost them (Knyazev and Argentati 2002).

    Args:
        first: orthonormal columns, (d, k), float64.
        second: orthonormal columns, (d, l), float64.
    """
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    inner = first.T @ second
    cosines = torch.linalg.svdvals(inner)
    sines = torch.linalg.svdvals(second - first @ inner).flip(0)[: len(cosines)]
    return torch.where(cosines.square() >= 0.5, torch.asin(sines.clamp(0.0, 1.0)), torch.acos(cosines.clamp(-1.0, 1.0)))


def leading_spaces(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return bases of the leading column and row space of a matrix, and the share of its energy they hold.

    Args:
        matrix: (d_out, d_in), not zero.
        rank: k; fewer columns come back from a matrix of lower rank.

    Returns:
        Left singular directions (d_out, k), right ones (d_in, k), both float64; the share.
    """
    total = energy(matrix)
    found = leading_subspace(matrix, min(rank, *matrix.shape), total, torch.Generator().manual_seed(0))
    wide = matrix.shape[0] <= matrix.shape[1]
    shorter = found.vectors.double()
    longer = (found.coordinates.T if wide else found.coordinates).double()
    norms = longer.norm(dim=0)
    real = norms > 1e-6 * norms.max()
    longer = torch.linalg.qr(longer[:, real])[0]
    left, right = (shorter[:, real], longer) if wide else (longer, shorter[:, real])
    return left, right, found.captured / total
