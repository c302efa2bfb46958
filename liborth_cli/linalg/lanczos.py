"""Lanczos tridiagonalisation of a symmetric operator, and the spectral density it gives.

From a random start v the tridiagonal T of m steps is a Gauss quadrature of the spectrum as v sees it: the eigenvalues θ of T
are its nodes and the squared first components of T's eigenvectors its weights (Golub & Welsch 1969). Averaged over random
starts this is stochastic Lanczos quadrature (Lin, Saad & Yang 2016, arXiv 1308.5467; for networks Ghorbani et al. 2019,
arXiv 1901.10159). scipy.sparse.linalg.eigsh hides T and its vectors, which are the quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Quadrature:
    """What one start saw of a spectrum, m nodes.

    Attributes:
        nodes: θ, ascending, (m,).
        weights: share of the spectrum at each, (m,), summing to 1.
        residuals: ‖H y − θ y‖ of the Ritz vector at each, (m,): an eigenvalue lies no further than that from θ.
    """

    nodes: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray


PIECE = 1 << 16
"""Numbers that are summed in their own precision."""
KEPT = 0.5**0.5
"""Share of its norm that a vector keeps where one orthogonalisation was enough (Daniel et al. 1976, Math. Comp. 30)."""


def lanczos(
    product: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, steps: int, reorthogonalise: bool = True
) -> Quadrature:
    """Run Lanczos from one start.

    Without reorthogonalisation converged eigenvalues come back as copies; the copies share the right weight between them
    (Greenbaum 1989), so the density stays right, and three vectors are held in place of all.

    Args:
        product: v ↦ H v, both (n,).
        start: any vector but 0, (n,).
        steps: at most; fewer when the space is exhausted.
        reorthogonalise: keep all vectors, and make each new one orthogonal to them, twice where once is not enough.
    """
    diagonal: list[float] = []
    off: list[float] = []
    vector = start / _norm(start)
    previous, steps = torch.zeros_like(vector), min(steps, start.numel())
    kept = torch.empty(steps if reorthogonalise else 0, start.numel(), dtype=start.dtype, device=start.device)
    for step in range(steps):
        kept[step : step + 1] = vector
        image = product(vector)
        alpha = _dot(image, vector)
        diagonal.append(alpha)
        image = image.sub(vector, alpha=alpha).sub_(previous, alpha=off[-1] if off else 0.0)
        if reorthogonalise:
            for _ in range(2):
                before = _norm(image)
                image -= kept[: step + 1].T @ (kept[: step + 1] @ image)
                if _norm(image) > KEPT * before:
                    break
        beta = _norm(image)
        off.append(beta)
        scale = max(map(abs, diagonal)) + max(off)
        if beta <= 10 * torch.finfo(start.dtype).eps * scale:
            off[-1] = 0.0
            break
        previous, vector = vector, image / beta
    tridiagonal = np.diag(diagonal) + np.diag(off[:-1], 1) + np.diag(off[:-1], -1)
    nodes, rotation = np.linalg.eigh(tridiagonal)
    return Quadrature(nodes, rotation[0] ** 2, np.abs(off[-1] * rotation[-1]))


def _dot(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return xᵀy, both (n,), in float64 from pieces: one float32 sum of millions of numbers is off by 1e-4."""
    pieces = [torch.dot(a, b) for a, b in zip(x.split(PIECE), y.split(PIECE), strict=True)]
    return float(torch.stack(pieces).double().sum())


def _norm(x: torch.Tensor) -> float:
    return math.sqrt(_dot(x, x))


def merged(runs: Sequence[Quadrature]) -> tuple[np.ndarray, np.ndarray]:
    """Average the quadratures of several starts: all nodes, ascending, and their weights, summing to 1."""
    nodes = np.concatenate([run.nodes for run in runs])
    weights = np.concatenate([run.weights for run in runs]) / len(runs)
    order = np.argsort(nodes)
    return nodes[order], weights[order]


def eigenvalues_above(run: Quadrature, edge: float, tolerance: float = 1e-2) -> tuple[list[float], bool]:
    """Return the eigenvalues above an edge that a run has found, descending, and whether all of its nodes there have converged.

    Args:
        run: with reorthogonalisation, or copies within `tolerance` are taken for one.
        edge: smallest value of interest.
        tolerance: largest residual of a converged node, as a share of its value.
    """
    found: list[float] = []
    complete = True
    for node, residual in sorted(zip(run.nodes, run.residuals, strict=True), reverse=True):
        if node <= edge:
            break
        if residual > tolerance * abs(node):
            complete = False
        elif not found or found[-1] - node > tolerance * 0.1 * abs(node):
            found.append(float(node))
    return found, complete
