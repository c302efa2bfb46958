"""Block Krylov iteration on a symmetric matrix, for matrices too large to tridiagonalise.

Golub & Underwood 1977; Musco & Musco 2015 (arXiv 1504.05477) show why a few blocks give near-optimal low-rank
approximation even where the spectrum has no gap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RitzPairs:
    """Approximate leading eigenpairs of G.

    Attributes:
        values: θ, descending, (j,).
        vectors: Y with orthonormal columns, (n, j).
        residuals: G Y − Y diag(θ), (n, j).
    """

    values: torch.Tensor
    vectors: torch.Tensor
    residuals: torch.Tensor


def block_krylov(g: torch.Tensor, count: int, block: int, depth: int, generator: torch.Generator) -> RitzPairs:
    """Find leading Ritz pairs in span[X, GX, …, G^(depth−1) X] for a random X.

    Args:
        g: symmetric, (n, n).
        count: how many Ritz pairs to return, at most block·depth.
        block: columns of X.
        depth: number of blocks.
        generator: CPU generator for X.

    Returns:
        The pairs, with their residuals.
    """
    size = g.shape[0]
    basis = torch.empty(size, block * depth, dtype=g.dtype, device=g.device)
    image = torch.empty_like(basis)
    x = torch.randn(size, block, generator=generator, dtype=torch.float32).to(g)
    for step in range(depth):
        done = basis[:, : step * block]
        for _ in range(2):
            x = torch.linalg.qr(x - done @ (done.T @ x))[0]
        here = slice(step * block, (step + 1) * block)
        basis[:, here] = x
        x = torch.mm(g, x)
        image[:, here] = x
    small = basis.T @ image
    values, rotation = torch.linalg.eigh(((small + small.T) / 2).double())
    values, rotation = values.flip(0)[:count], rotation.flip(1)[:, :count].to(g.dtype)
    vectors = basis @ rotation
    residuals = image @ rotation - vectors * values.to(g.dtype)
    return RitzPairs(values, vectors, residuals)
