"""Covariances of few samples: W with F = W Wᵀ, found without an eigenproblem of F's size.

Cholesky factorisation with pivots, stopped when nothing is left (Harbrecht, Peters & Schneider 2012): every step takes the
row with the largest diagonal entry, and what is left of the diagonal is what is left of the trace. A covariance of k samples
is finished after k rows, and the others are never read.
"""

from __future__ import annotations

import torch

MOST = 2048
"""Directions beyond which F counts as full."""
LEFT = 1e-6
"""Share of the trace that may be missed. Covariances come in float32: about a tenth of that is their own rounding."""


def spanning_factor(f: torch.Tensor) -> torch.Tensor | None:
    """Factorise a positive matrix that has far fewer directions than its size.

    Args:
        f: F, symmetric and positive but for rounding, (d, d); or a diagonal, (d,).

    Returns:
        W, (d, k), float64, with tr(F − W Wᵀ) ≤ 1e-6 tr F; None when a third of F's directions do not do.
    """
    limit = min(len(f) // 3, MOST)
    if f.dim() == 1:
        return _columns(f.double(), limit)
    left = f.diagonal().double()
    enough = LEFT * float(left.sum())
    rows = left.new_empty(min(limit, 64), len(f))
    for count in range(limit + 1):
        if float(left.clamp(min=0).sum()) <= enough:
            return rows[:count].T
        if count == len(rows):
            rows = torch.cat([rows, rows.new_empty(min(count, limit - count), len(f))])
        if count < limit:
            pivot = int(left.argmax())
            done = rows[:count]
            rows[count] = (f[pivot].double() - done.T @ done[:, pivot]) / left[pivot].sqrt()
            left = left - rows[count].square()
    return None


def _columns(diagonal: torch.Tensor, limit: int) -> torch.Tensor | None:
    """Return one column for each entry of a diagonal that is not zero: of token frequencies, the tokens that occur."""
    places = diagonal.nonzero()[:, 0]
    if len(places) > limit:
        return None
    w = diagonal.new_zeros(len(diagonal), len(places))
    w[places, torch.arange(len(places), device=w.device)] = diagonal[places].clamp(min=0).sqrt()
    return w
