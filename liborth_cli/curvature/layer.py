"""What a factor set holds of one layer, in memory.

Shapes are those of the mathematical weight W (d_out, d_in), y = W x, whatever way round the file holds it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from liborth_cli.errors import BadInput
from liborth_cli.linalg.eigen import leading_eigh
from liborth_cli.linalg.rows import Samples

Covariance = torch.Tensor | Samples
"""A covariance of one side: (d, d), (blocks, d, d), a diagonal (d,), or the few samples it is made of."""


@dataclass(frozen=True)
class Eigenbasis:
    """A = Q_A Λ_A Q_Aᵀ and G = Q_G Λ_G Q_Gᵀ.

    Attributes:
        input_values: λ_A, descending, (d_in,).
        input_vectors: Q_A, columns, (d_in, d_in); empty for the identity.
        gradient_values: λ_G, (d_out,), or (heads, d_out / heads).
        gradient_vectors: Q_G, (d_out, d_out), or one for each head; empty for the identity.
    """

    input_values: torch.Tensor
    input_vectors: torch.Tensor
    gradient_values: torch.Tensor
    gradient_vectors: torch.Tensor


@dataclass(frozen=True)
class KroneckerFactors:
    """The curvature of one weight matrix: the Fisher of vec(W) is about A ⊗ G.

    Attributes:
        name: the layer's name in the set.
        tensor: the stored tensor it belongs to.
        matrix: which matrix of a stored stack of experts, or None.
        transposed: whether the file holds W as (d_in, d_out) (Conv1D, embeddings).
        tokens: how many tokens were averaged, weighted; for an expert those routed to it.
        shares_input_with: the layers that have the same A, this one included.
        input_covariance: A = E[a aᵀ], (d_in, d_in); (d_in,) for an embedding, whose A is the diagonal of frequencies.
        gradient_covariance: G = E[g gᵀ], (d_out, d_out); (d_out,) where only its diagonal is kept; (heads, d, d) by head.
        input_moment: E[‖g‖²·a aᵀ], (d_in, d_in), or None.
        gradient_moment: E[‖a‖²·g gᵀ], shaped like G, or None.
        second_moments: E[(q_G,iᵀ g)²(q_A,jᵀ a)²] in the cached eigenbasis, (d_out, d_in), or None.
        cached_basis: the eigenbasis stored with the factors, or None.
    """

    name: str
    tensor: str
    matrix: int | None
    transposed: bool
    tokens: float
    shares_input_with: tuple[str, ...]
    input_covariance: torch.Tensor
    gradient_covariance: torch.Tensor
    input_moment: torch.Tensor | None = None
    gradient_moment: torch.Tensor | None = None
    second_moments: torch.Tensor | None = None
    cached_basis: Eigenbasis | None = None

    @cached_property
    def basis(self) -> Eigenbasis:
        """The eigenbasis: the cached one, or computed now, in float64."""
        if self.cached_basis is not None:
            return self.cached_basis
        return Eigenbasis(*eigenbasis(self.input_covariance), *eigenbasis(self.gradient_covariance))

    def curvature(self, kind: str = "kfac") -> torch.Tensor:
        """Return the curvature of every direction (i, j) of the eigenbasis, (d_out, d_in), float64.

        Args:
            kind: "kfac" is λ_G,i·λ_A,j; "marginal" keeps the exact row and column sums of the corrected eigenvalues and
                multiplies them; "exact" are the corrected eigenvalues of EK-FAC (arXiv 1806.03884).

        Raises:
            BadInput: when the set was made without what that needs.
        """
        if kind == "kfac":
            return torch.outer(self.basis.gradient_values.flatten(), self.basis.input_values)
        if kind == "exact":
            if self.second_moments is None:
                raise BadInput(f"{self.name}: the factor set has no exact moments; make it with --moments exact")
            return self.second_moments.double()
        if self.input_moment is None or self.gradient_moment is None:
            raise BadInput(f"{self.name}: the factor set has no marginal moments; make it with --moments marginal")
        columns = quadratic(self.input_moment, self.basis.input_vectors)
        rows = quadratic(self.gradient_moment, self.basis.gradient_vectors)
        return torch.outer(rows, columns) / rows.sum().clamp(min=torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class SampledFactors:
    """A and G of few tokens that were kept one by one, neither of them multiplied out.

    Attributes:
        input_covariance: A, (d_in, d_in).
        gradient_covariance: G, (d_out, d_out).
        tokens: how many there are, weighted.
    """

    input_covariance: Samples
    gradient_covariance: Samples
    tokens: float = 0.0


@dataclass(frozen=True)
class DiagonalFisher:
    """The diagonal of the Fisher of one weight matrix, every token a sample.

    Attributes:
        name: the layer's name in the set.
        tokens: how many tokens were averaged, weighted.
        values: E[g_i²·a_j²], (d_out, d_in).
    """

    name: str
    tokens: float
    values: torch.Tensor


@dataclass(frozen=True)
class TokenGradients:
    """Inputs and output gradients of one matrix: the weight gradient of token t is g_t a_tᵀ.

    Attributes:
        inputs: a, (tokens, d_in).
        gradients: g of the summed loss, times the root of the token's weight, (tokens, d_out).
        weight: of all tokens together.
    """

    inputs: torch.Tensor
    gradients: torch.Tensor
    weight: float = 1.0

    def flipped(self) -> TokenGradients:
        """Return what is felt of Wᵀ."""
        return replace(self, inputs=self.gradients, gradients=self.inputs)

    def of_bias(self) -> TokenGradients:
        """Return what is felt of the bias added to the matrix's output, a column (d_out, 1): its input is 1."""
        return replace(self, inputs=self.inputs.new_ones(len(self.inputs), 1))


def eigenbasis(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Diagonalise a covariance.

    Args:
        factor: (d, d); (blocks, d, d) for one matrix a head; or (d,) for a matrix that is diagonal.

    Returns:
        Eigenvalues, (d,) or (blocks, d), float64, descending and never negative; and orthonormal eigenvectors as columns,
        (d, d) or (blocks, d, d), float64. For a diagonal the eigenvalues stay in their place and the vectors are empty, (0,),
        which stands for the identity.
    """
    if factor.dim() == 1:
        return factor.double().clamp(min=0.0), torch.empty(0, dtype=torch.float64)
    if factor.dim() == 3:
        values, vectors = zip(*(eigenbasis(block) for block in factor), strict=True)
        return torch.stack(values), torch.stack(vectors)
    values, vectors = leading_eigh(factor.to(torch.float64, copy=True), len(factor))
    return values.clamp(min=0.0), vectors


def participation_ratio(factor: torch.Tensor) -> float:
    """Return (Σλ)² / Σλ² from the matrix (or its diagonal, or its blocks) itself: how many directions share the trace."""
    squares = float(factor.double().square().sum())
    return trace(factor) ** 2 / squares if squares else 0.0


def trace(factor: Covariance) -> float:
    """Return Σλ, for a matrix, a diagonal, a stack of blocks or samples."""
    if isinstance(factor, Samples):
        return factor.trace()
    if factor.dim() == 1:
        return float(factor.double().sum())
    return float(factor.diagonal(dim1=-2, dim2=-1).double().sum())


def quadratic(matrix: Covariance, vectors: torch.Tensor) -> torch.Tensor:
    """Return q_iᵀ M q_i for every column q_i; for blocks, one block after the other; the diagonal for the identity.

    Args:
        matrix: (d, d), (blocks, d, d), or a diagonal (d,).
        vectors: columns, shaped like the matrix; empty for the identity.
    """
    if isinstance(matrix, Samples):
        return (matrix.rows.to(vectors) @ vectors).square().sum(0)
    if matrix.dim() == 1:
        return matrix.double()
    return (vectors * (matrix.double() @ vectors)).sum(-2).flatten()
