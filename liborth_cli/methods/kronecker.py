"""Bases that are a product of an output side and an input side: C = L U Rᵀ, and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from liborth_cli.methods.method import Factors


@dataclass(frozen=True)
class SideBasis:
    """A change of coordinates on one side of a matrix.

    Attributes:
        analyse: from the weight's coordinates to the basis's: (d, d); (d,) a diagonal; (blocks, d, d); empty for the identity.
        synthesise: its inverse, in the same form.
    """

    analyse: torch.Tensor
    synthesise: torch.Tensor

    @classmethod
    def orthonormal(cls, vectors: torch.Tensor) -> SideBasis:
        """Wrap eigenvectors given as columns: (d, d), (blocks, d, d), or empty for the identity."""
        return cls(vectors.mT if vectors.dim() > 1 else vectors, vectors)


def apply(operator: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply a matrix (d, n) from the left by an operator in one of the forms of `SideBasis`; returns (d, n)."""
    if operator.numel() == 0:
        return matrix
    if operator.dim() == 1:
        return operator[:, None] * matrix
    if operator.dim() == 2:
        return operator @ matrix
    blocks, size, _ = operator.shape
    return (operator @ matrix.reshape(blocks, size, -1)).reshape(blocks * size, -1)


@dataclass
class KroneckerBasis:
    """Coordinates of an update on both sides, in float64.

    Attributes:
        left: the output side.
        right: the input side.
        coefficients: C = L U Rᵀ, (d_out, d_in), float64.
        dtype: of the update, and of what is rebuilt.
        facts: what to write into the manifest.
        in_place: the update is left as it is.
    """

    left: SideBasis
    right: SideBasis
    coefficients: torch.Tensor
    dtype: torch.dtype
    facts: dict[str, Any] = field(default_factory=dict)
    in_place: bool = False

    @classmethod
    def of(cls, update: torch.Tensor, left: SideBasis, right: SideBasis) -> KroneckerBasis:
        """Analyse an update (d_out, d_in)."""
        coefficients = apply(right.analyse, apply(left.analyse, update.double()).T).T
        return cls(left, right, coefficients, update.dtype)

    def rebuild(self, keep: torch.Tensor | float) -> torch.Tensor:
        """Return L⁻¹ (keep·C) R⁻ᵀ, (d_out, d_in), in the update's dtype."""
        kept = apply(self.left.synthesise, self.coefficients * keep)
        return apply(self.right.synthesise, kept.T).T.to(self.dtype).contiguous()


def eigenbasis_of(update: torch.Tensor, factors: Factors) -> KroneckerBasis:
    """Analyse an update in the eigenbasis Q_G ⊗ Q_A of Kronecker factors."""
    eigen = factors.basis
    left, right = SideBasis.orthonormal(eigen.gradient_vectors), SideBasis.orthonormal(eigen.input_vectors)
    return KroneckerBasis.of(update, left, right)
