"""Symmetric eigenproblems, in LAPACK on the CPU and in torch elsewhere."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch


def leading_eigh(g: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the largest eigenvalues of a symmetric matrix and their vectors.

    Args:
        g: symmetric, (n, n), float32 or float64; overwritten.
        count: how many, at most n.

    Returns:
        Eigenvalues (count,), descending, and orthonormal eigenvectors (n, count).
    """
    size = g.shape[0]
    if g.is_cuda or 2 * count > size:
        values, vectors = _full(g)
        return values.flip(0)[:count], vectors.flip(1)[:, :count].contiguous()
    values, vectors = scipy.linalg.eigh(
        g.numpy(), subset_by_index=[size - count, size - 1], driver="evr", overwrite_a=True, check_finite=False
    )
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(np.ascontiguousarray(vectors[:, ::-1]))


def eigenvalues(g: torch.Tensor) -> torch.Tensor:
    """Compute all eigenvalues of a symmetric matrix (n, n), descending, (n,)."""
    if g.is_cuda:
        return torch.linalg.eigvalsh(g).flip(0)
    return torch.from_numpy(scipy.linalg.eigvalsh(g.numpy(), check_finite=False)[::-1].copy())


def is_positive_definite(g: torch.Tensor) -> bool:
    """Try a Cholesky factorisation of a symmetric matrix (n, n); overwrites it."""
    if g.is_cuda:
        return not torch.linalg.cholesky_ex(g)[1].item()
    potrf = scipy.linalg.lapack.spotrf if g.dtype == torch.float32 else scipy.linalg.lapack.dpotrf
    return potrf(g.numpy().T, lower=1, overwrite_a=1, clean=0)[1] == 0


def _full(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if g.is_cuda:
        values, vectors = torch.linalg.eigh(g)
        return values, vectors
    values, vectors = scipy.linalg.eigh(g.numpy(), driver="evd", overwrite_a=True, check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(np.ascontiguousarray(vectors))
