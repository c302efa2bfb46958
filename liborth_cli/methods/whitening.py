"""Whiten one side of a matrix for a covariance R: R = L Lᵀ, and L⁻¹ x has covariance I."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liborth_cli.errors import BadInput
from liborth_cli.linalg.eigen import cholesky
from liborth_cli.methods.terms import unit


@dataclass(frozen=True)
class Whitening:
    """L of R = L Lᵀ, in one of the forms of a factor.

    Attributes:
        lower: (d, d) lower triangular; (blocks, d/blocks, d/blocks) likewise; or the square roots of a diagonal, (d,).
    """

    lower: torch.Tensor

    @classmethod
    def of(cls, covariance: torch.Tensor, damping: float, name: str) -> Whitening:
        """Factorise a covariance at mean eigenvalue 1, plus damping·I, in float64.

        Args:
            covariance: (d, d), (blocks, d/blocks, d/blocks), or a diagonal (d,).
            damping: relative to the mean eigenvalue.
            name: of the layer, for messages.

        Raises:
            BadInput: when it is not positive.
        """
        return cls.of_unit(unit(covariance), damping, name)

    @classmethod
    def of_unit(cls, r: torch.Tensor, damping: float, name: str) -> Whitening:
        """Factorise a covariance that is at mean eigenvalue 1 and in float64 already; overwrites it."""
        if not bool(r.any()) or not bool(torch.isfinite(r.sum())):
            raise not_positive(name)
        if r.dim() == 1:
            r = r + damping
            if not bool((r > 0).all()):
                raise not_positive(name)
            return cls(r.sqrt())
        r.diagonal(dim1=-2, dim2=-1).add_(damping)
        lower = cholesky(r)
        if lower is None:
            raise not_positive(name)
        return cls(lower)

    def whiten(self, x: torch.Tensor) -> torch.Tensor:
        """Return L⁻¹ x; x (d, n), float64."""
        return self._solve(x, False)

    def unwhiten(self, x: torch.Tensor) -> torch.Tensor:
        """Return L⁻ᵀ x: R⁻¹ once `whiten` was applied; x (d, n)."""
        return self._solve(x, True)

    def _solve(self, x: torch.Tensor, transposed: bool) -> torch.Tensor:
        if self.lower.dim() == 1:
            return x / self.lower[:, None]
        matrix = self.lower.mT if transposed else self.lower
        blocks = x.reshape(*matrix.shape[:-1], -1)
        return torch.linalg.solve_triangular(matrix, blocks, upper=transposed).reshape(x.shape)


def not_positive(name: str) -> BadInput:
    """Return the error for a retain factor that cannot be divided by."""
    return BadInput(f"{name}: a retain factor is not positive; measure it on more tokens, or raise --damping")
