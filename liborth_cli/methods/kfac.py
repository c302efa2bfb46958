"""`kfac`: coordinates along the curvature of retain data, ranked by that curvature.

The Fisher of a linear layer is about A ⊗ G (Martens & Grosse 2015, arXiv 1503.05671); its eigenvectors are q_A ⊗ q_G and the
curvature of direction (i, j) is λ_G,i·λ_A,j. Merullo et al. 2025 (arXiv 2510.24256) drop low curvature to drop recitation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from liborth_cli.methods.method import Amount, Layer, Method

if TYPE_CHECKING:
    import torch

    from liborth_cli.methods.selection import Basis


@dataclass(frozen=True)
class Kfac(Method):
    """Basis: Q_G ⊗ Q_A of the retain factors. Score: the curvature of each direction."""

    name = "kfac"
    summary = "directions of high retain curvature are skill (K-FAC)"
    amounts = ("mass", "threshold", "energy", "density")
    begin = Amount("mass", 0.9)
    needs = ("retain",)

    def basis(self, layer: Layer, amount: Amount) -> Basis:
        """Return the update's coordinates in the eigenbasis of the retain factors."""
        from liborth_cli.methods.kronecker import eigenbasis_of

        return eigenbasis_of(layer.update, layer.need("retain"))

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return λ_G,i·λ_A,j, (d_out, d_in)."""
        return layer.need("retain").curvature("kfac")
