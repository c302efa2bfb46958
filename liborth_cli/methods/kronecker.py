"""Bases that are a product of an output side and an input side: C = L U Rᵀ, and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from liborth_cli.linalg.rows import ThinProduct
from liborth_cli.methods.method import Factors, Keep, kept

IDENTITY = torch.empty(0, dtype=torch.float64)
"""Stands for the identity wherever an operator is expected."""


class Side(Protocol):
    """A change of coordinates on one side of a matrix, for matrices (d, n)."""

    @property
    def nbytes(self) -> int: ...  # noqa: D102

    def analyse(self, matrix: torch.Tensor) -> torch.Tensor: ...  # noqa: D102

    def synthesise(self, matrix: torch.Tensor) -> torch.Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class SideBasis:
    """A change of coordinates that is held as a matrix.

    Attributes:
        to: from the weight's coordinates to the basis's: (d, d); (d,) a diagonal; (blocks, d, d); empty for the identity;
            (k, d) when the basis has k directions and says nothing of the others.
        back: its inverse, in the same form, (d, k) for k directions.
    """

    to: torch.Tensor
    back: torch.Tensor

    @classmethod
    def orthonormal(cls, vectors: torch.Tensor) -> SideBasis:
        """Wrap eigenvectors given as columns: (d, d), (blocks, d, d), or empty for the identity."""
        return cls(vectors.mT if vectors.dim() > 1 else vectors, vectors)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.to.nbytes + self.back.nbytes

    @property
    def few(self) -> bool:
        """Whether there are fewer directions than the space has."""
        return self.back.dim() == 2 and self.back.shape[1] < self.back.shape[0]

    def analyse(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the coordinates of a matrix (d, n)."""
        return apply(self.to, matrix)

    def synthesise(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the matrix with these coordinates."""
        return apply(self.back, matrix)


@dataclass(frozen=True)
class FrameSide:
    """Coordinates along a few directions X, and what is left of the matrix as it is: (k + d) coordinates for d.

    A filter may treat the k coordinates one by one and has to treat the d others alike; then nothing leaks.

    Attributes:
        to: what reads the k coordinates, (k, d), with to·X = I.
        back: X, (d, k).
    """

    to: torch.Tensor
    back: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.to.nbytes + self.back.nbytes

    def analyse(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return k coordinates and d that are left, (k + d, n)."""
        inside = self.to @ matrix
        return torch.cat([inside, torch.addmm(matrix, self.back, inside, alpha=-1)])

    def synthesise(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the matrix (d, n) of coordinates (k + d, n)."""
        count = len(self.to)
        return torch.addmm(matrix[count:], self.back, matrix[:count])


def apply(operator: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply a matrix (d, n) from the left by an operator in one of the forms of `SideBasis`; returns (d, n) or (k, n)."""
    if operator.numel() == 0:
        return matrix
    if operator.dim() == 1:
        return operator[:, None] * matrix
    if operator.dim() == 2:
        return operator @ matrix
    blocks, size, _ = operator.shape
    return (operator @ matrix.reshape(blocks, size, -1)).reshape(blocks * size, -1)


def quadratic_form(removed: torch.Tensor | ThinProduct, output: torch.Tensor, input: torch.Tensor) -> float:  # noqa: A002
    """Return tr(G D A Dᵀ), what the curvature A ⊗ G feels of a change D.

    Args:
        removed: D, (d_out, d_in); of D = L Rᵀ it is tr(LᵀGL·RᵀAR).
        output: G in one of a factor's forms.
        input: A likewise.
    """
    if isinstance(removed, ThinProduct):
        felt = [side.T @ apply(factor.to(side), side) for factor, side in ((output, removed.left), (input, removed.right))]
        return torch.dot(felt[0].reshape(-1), felt[1].T.reshape(-1)).item()
    left = apply(output.to(removed), removed)
    right = apply(input.to(removed), removed.T).T
    return torch.dot(left.reshape(-1), right.reshape(-1)).item()


@dataclass
class KroneckerBasis:
    """Coordinates of an update on both sides, in float64.

    Attributes:
        left: the output side.
        right: the input side.
        coefficients: C = L U Rᵀ, (d_out, d_in), float64; longer on a side that is a frame.
        dtype: of the update, and of what is rebuilt.
        facts: what to write into the manifest.
        in_place: the update is left as it is.
    """

    left: Side
    right: Side
    coefficients: torch.Tensor
    dtype: torch.dtype
    facts: dict[str, Any] = field(default_factory=dict)
    in_place: bool = False

    @classmethod
    def of(cls, update: torch.Tensor, left: Side, right: Side) -> KroneckerBasis:
        """Analyse an update (d_out, d_in)."""
        coefficients = right.analyse(left.analyse(update.double()).T).T
        return cls(left, right, coefficients, update.dtype)

    def rebuild(self, keep: Keep) -> torch.Tensor | ThinProduct:
        """Return L⁻¹ (keep·C) R⁻ᵀ, (d_out, d_in), in the update's dtype, or in two factors when R has few directions."""
        half = self.left.synthesise(kept(self.coefficients, keep))
        if isinstance(self.right, SideBasis) and self.right.few:
            return ThinProduct(half, self.right.back)
        return self.right.synthesise(half.T).T.to(self.dtype).contiguous()


def eigenbasis_of(update: torch.Tensor, factors: Factors) -> KroneckerBasis:
    """Analyse an update in the eigenbasis Q_G ⊗ Q_A of Kronecker factors."""
    eigen = factors.basis
    left, right = SideBasis.orthonormal(eigen.gradient_vectors), SideBasis.orthonormal(eigen.input_vectors)
    return KroneckerBasis.of(update, left, right)
