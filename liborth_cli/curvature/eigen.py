"""Eigenbases of factors, always in float64: at 1e-7 of the largest, float32 eigenvalues are noise."""

from __future__ import annotations

import torch

from liborth_cli.linalg.eigen import leading_eigh


def eigenbasis(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Diagonalise a covariance.

    Args:
        factor: (d, d); (blocks, d, d) for one matrix a head; or (d,) for a matrix that is diagonal.

    Returns:
        Eigenvalues, (d,) or (blocks, d), float64, descending and never negative; and orthonormal eigenvectors as columns,
        (d, d) or (blocks, d, d), float64. For a diagonal the eigenvalues stay in their place and the vectors are empty, (0,),
        which stands for the identity.
    """
    if factor.dim() == 1:
        return factor.double().clamp(min=0.0), torch.empty(0, dtype=torch.float64)
    if factor.dim() == 3:
        values, vectors = zip(*(eigenbasis(block) for block in factor), strict=True)
        return torch.stack(values), torch.stack(vectors)
    values, vectors = leading_eigh(factor.to(torch.float64, copy=True), len(factor))
    return values.clamp(min=0.0), vectors


def effective_rank(factor: torch.Tensor) -> float:
    """Return (Σλ)² / Σλ² from the matrix (or its diagonal, or its blocks) itself: how many directions share the trace."""
    squares = float(factor.double().square().sum())
    return trace(factor) ** 2 / squares if squares else 0.0


def trace(factor: torch.Tensor) -> float:
    """Return Σλ, for a matrix, a diagonal or a stack of blocks."""
    if factor.dim() == 1:
        return float(factor.double().sum())
    return float(factor.diagonal(dim1=-2, dim2=-1).double().sum())


def quadratic(matrix: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return q_iᵀ M q_i for every column q_i; for blocks, one block after the other; the diagonal for the identity.

    Args:
        matrix: (d, d), (blocks, d, d), or a diagonal (d,).
        vectors: columns, shaped like the matrix; empty for the identity.
    """
    if matrix.dim() == 1:
        return matrix.double()
    return (vectors * (matrix.double() @ vectors)).sum(-2).flatten()
