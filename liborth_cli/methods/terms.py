"""Curvature that is a sum of Kronecker products: one for each use of a tied matrix, one for each set of forget data.

A sum of Kronecker products is none itself. Its *basis* is taken from factors averaged side by side, and its *values* are
the exact diagonal of the sum in that basis: what EK-FAC (arXiv 1806.03884) does for one product. With one term, or terms
that commute, nothing is lost (docs/decisions/0020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from liborth_cli.curvature.layer import eigenbasis, quadratic, trace
from liborth_cli.methods.method import Factors


@dataclass(frozen=True)
class Term:
    """One Kronecker product G ⊗ A of a sum whose traces add up to 1.

    Attributes:
        share: of the sum's trace, tr G·tr A over the sum of all.
        output: G, (d_out, d_out), in any form of a factor; its own scale.
        input: A, (d_in, d_in), likewise.
    """

    share: float
    output: torch.Tensor
    input: torch.Tensor


@dataclass(frozen=True)
class Eigen:
    """Eigenbasis of a merged sum (see `liborth_cli.curvature.factors.Eigenbasis`)."""

    input_values: torch.Tensor
    input_vectors: torch.Tensor
    gradient_values: torch.Tensor
    gradient_vectors: torch.Tensor


@dataclass(frozen=True)
class SummedFactors:
    """The curvature of a matrix that is used more than once: Σ_u A_u ⊗ G_u, all in the orientation of the first.

    Attributes:
        parts: the factors of each use.
        input_covariance: the mean of the A_u at mean eigenvalue 1, weighted by share; scaled to the sum's trace.
        gradient_covariance: the mean of the G_u at mean eigenvalue 1, weighted by share.
        second_moments: None; exact moments are not kept for what is used twice.
    """

    parts: tuple[Factors, ...]
    input_covariance: torch.Tensor
    gradient_covariance: torch.Tensor
    second_moments: None = None

    @classmethod
    def of(cls, parts: Sequence[Factors]) -> SummedFactors:
        """Merge the factors of several uses, all in the same orientation."""
        terms, tiny = _terms(parts), torch.finfo(torch.float64).tiny
        shares = [t.share for t in terms]
        a, g = average(shares, [t.input for t in terms]), average(shares, [t.output for t in terms])
        scale = sum(trace(p.input_covariance) * trace(p.gradient_covariance) for p in parts)
        return cls(tuple(parts), a * (scale / max(trace(a) * trace(g), tiny)), g)

    @cached_property
    def basis(self) -> Any:
        """The eigenbasis of the merged factors."""
        return Eigen(*eigenbasis(self.input_covariance), *eigenbasis(self.gradient_covariance))

    def curvature(self, kind: str = "kfac") -> torch.Tensor:
        """Return Σ_u (q_G,iᵀ G_u q_G,i)·(q_A,jᵀ A_u q_A,j), (d_out, d_in), float64: exact in the merged basis."""
        total = None
        for part in self.parts:
            rows = quadratic(_like(part.gradient_covariance, self.gradient_covariance), self.basis.gradient_vectors)
            columns = quadratic(_like(part.input_covariance, self.input_covariance), self.basis.input_vectors)
            total = torch.outer(rows, columns) + (0 if total is None else total)
        assert total is not None
        return total


def terms_of(factors: Factors) -> list[Term]:
    """Return the Kronecker products that a curvature is the sum of."""
    return _terms(factors.parts if isinstance(factors, SummedFactors) else (factors,))


def _terms(parts: Sequence[Factors]) -> list[Term]:
    weights = [trace(p.gradient_covariance) * trace(p.input_covariance) for p in parts]
    whole = sum(weights)
    shares = [w / whole if whole > 0 else 1 / len(parts) for w in weights]
    return [Term(s, p.gradient_covariance, p.input_covariance) for s, p in zip(shares, parts, strict=True)]


def unit(factor: torch.Tensor) -> torch.Tensor:
    """Scale a factor (d, d), (blocks, d, d) or (d,) to mean eigenvalue 1, in float64; zero stays zero."""
    return factor.to(torch.float64, copy=True).mul_(mean_scale(factor))


def mean_scale(factor: torch.Tensor) -> float:
    """Return what a factor is multiplied by to have the mean eigenvalue 1; 1 for zero."""
    size = factor.shape[0] * factor.shape[-1] if factor.dim() == 3 else factor.shape[0]
    return size / (trace(factor) or size)


def average(weights: Sequence[float], factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Average factors of one side, each at mean eigenvalue 1; a diagonal among matrices becomes one of them."""
    if len(factors) == 1:
        return unit(factors[0])
    widest = max(factors, key=torch.Tensor.dim)
    total = sum(w * _like(unit(f), widest) for w, f in zip(weights, factors, strict=True)) / sum(weights)
    assert isinstance(total, torch.Tensor)
    return total


def _like(factor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.diag(factor) if factor.dim() == 1 and other.dim() == 2 else factor
