"""What a factor set holds of one layer, in memory.

Shapes are those of the mathematical weight W (d_out, d_in), y = W x, whatever way round the file holds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from liborth_cli.curvature.eigen import eigenbasis, quadratic
from liborth_cli.errors import BadInput


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
