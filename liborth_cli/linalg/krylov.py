"""Block Krylov iteration on a symmetric matrix, for matrices too large to tridiagonalise.

Golub & Underwood 1977; Musco & Musco 2015 (arXiv 1504.05477) show why a few blocks give near-optimal low-rank
approximation even where the spectrum has no gap. scipy.sparse.linalg iterates to a tolerance on vectors, which a flat spectrum
does not reach; torch.svd_lowrank returns no residuals, so nothing could be proven of what it finds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from liborth_cli.linalg.eigen import leading_eigh


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


def krylov_basis(
    multiply: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an orthonormal basis Q of span[X, MX, …, M^(depth−1) X] and M·Q, both (n, b·depth), for X (n, b).

    Every block is orthogonalised twice against the ones before it, which keeps Q orthonormal to rounding.
    """
    size, block = x.shape
    basis, image = (torch.empty(size, block * depth, dtype=x.dtype, device=x.device) for _ in range(2))
    for step in range(depth):
        done = basis[:, : step * block]
        for _ in range(2):
            x = torch.linalg.qr(x - done @ (done.T @ x))[0]
        here = slice(step * block, (step + 1) * block)
        basis[:, here] = x
        x = multiply(x)
        image[:, here] = x
    return basis, image


def block_krylov(g: torch.Tensor, count: int, block: int, depth: int, generator: torch.Generator) -> RitzPairs:
    """Find leading Ritz pairs in span[X, GX, …, G^(depth−1) X] for a random X.

    Args:
        g: symmetric, (n, n).
        count: how many Ritz pairs to return, at most block·depth.
        block: columns of X.
        depth: number of blocks.
        generator: CPU generator for X.
    """
    size = g.shape[0]
    x = torch.randn(size, block, generator=generator, dtype=torch.float32).to(g)
    basis, image = krylov_basis(lambda block: torch.mm(g, block), x, depth)
    small = basis.T @ image
    values, rotation = leading_eigh(((small + small.T) / 2).double(), count)
    rotation = rotation.to(g.dtype)
    vectors = basis @ rotation
    residuals = image @ rotation - vectors * values.to(g.dtype)
    return RitzPairs(values, vectors, residuals)
