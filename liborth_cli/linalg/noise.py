"""Where noise ends in a singular spectrum: the Marchenko–Pastur bulk, its edge, and the optimal hard threshold.

The singular values of an m×n matrix of independent noise with variance s²/n fill the interval s·[1−√c, 1+√c], c = m/n ≤ 1
(Marchenko & Pastur 1967). The noise level s is read off the median singular value, so nothing has to be known about it. No
library that is installed anyway has the law, its median or the threshold.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch


@functools.lru_cache(maxsize=1024)
def bulk_median(aspect: float) -> float:
    """Return the median of the Marchenko–Pastur law for eigenvalues at unit variance and c = m/n in (0, 1]."""
    low, high = (1 - math.sqrt(aspect)) ** 2, (1 + math.sqrt(aspect)) ** 2
    angle = np.linspace(0.0, math.pi, 20_001)
    x = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    half = (high - low) / 2 * np.sin(angle)
    density = np.divide(half**2, 2 * math.pi * aspect * x, out=np.zeros_like(x), where=x > 0)
    if low == 0.0:
        density[0] = density[1]
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(angle))])
    return float(np.interp(mass[-1] / 2, mass, x))


def bulk_edge(values: torch.Tensor, shape: tuple[int, int]) -> float:
    """Return the singular value where the noise bulk ends, ŝ·(1 + √c), from all singular values of a matrix (m, n)."""
    aspect = min(shape) / max(shape)
    return _median(values) / math.sqrt(bulk_median(aspect)) * (1 + math.sqrt(aspect))


def covariance_edge(mean: float, size: int, samples: int) -> float:
    """Return where the eigenvalues of a covariance (n, n) of T samples of pure noise would end: mean·(1 + √(n/T))²."""
    return mean * (1 + math.sqrt(size / samples)) ** 2


def optimal_threshold(values: torch.Tensor, shape: tuple[int, int]) -> float:
    """Return the hard threshold that minimises the squared error when the noise level is unknown.

    Gavish & Donoho 2014 (arXiv 1305.5870), equations 3 and 11: ω(c) times the median of all singular values of a matrix (m, n).
    """
    c = min(shape) / max(shape)
    factor = math.sqrt(2 * (c + 1) + 8 * c / ((c + 1) + math.sqrt(c * c + 14 * c + 1)))
    return _median(values) * factor / math.sqrt(bulk_median(c))


def effective_rank(values: torch.Tensor) -> float:
    """Return exp of the entropy of the energies σ_i²/Σσ² (Roy & Vetterli 2007): the only thing called effective rank here."""
    share = values.double().square()
    total = share.sum()
    if total == 0:
        return 0.0
    share = share / total
    return math.exp(-torch.special.xlogy(share, share).sum().item())


def _median(values: torch.Tensor) -> float:
    ordered = values.double().sort().values
    middle = len(ordered) // 2
    return ((ordered[middle] + ordered[-middle - 1]) / 2).item()
