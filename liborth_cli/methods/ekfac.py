"""`ekfac`: as `kfac`, with the eigenvalues corrected to the second moments the data really have in that basis.

George et al. 2018 (arXiv 1806.03884). The factor set decides whether exact moments (a second pass) or their marginals are used:
exact when it holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from liborth_cli.methods.method import Amount, Layer, Method

if TYPE_CHECKING:
    import torch

    from liborth_cli.methods.selection import Basis


@dataclass(frozen=True)
class Ekfac(Method):
    """Basis: Q_G ⊗ Q_A of the retain factors. Score: the corrected eigenvalue of each direction."""

    name = "ekfac"
    summary = "as kfac, with eigenvalues corrected by measured second moments (EK-FAC)"
    amounts = ("mass", "threshold", "energy", "density")
    begin = Amount("mass", 0.9)
    needs = ("retain", "moments")

    def basis(self, layer: Layer, amount: Amount) -> Basis:
        """Return the update's coordinates in the eigenbasis of the retain factors."""
        from liborth_cli.methods.kronecker import eigenbasis_of

        return eigenbasis_of(layer.update, layer.need("retain"))

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return E[(q_G,iᵀ ∇W q_A,j)²], (d_out, d_in), or its rank-one estimate from the marginals."""
        factors = layer.need("retain")
        return factors.curvature("exact" if factors.second_moments is not None else "marginal")
