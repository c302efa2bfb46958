"""`diagonal`: LibOrtho v1, kept as the thing to beat.

The founding review (§3.1) scores each weight by its impact U_ij² / H_jj under a diagonal Hessian. A diagonal depends on the
coordinates: L = (x + y)² has curvatures 4 and 0, and a diagonal sees 2 and 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liborth_cli.methods.method import Amount, Basis, ElementBasis, Layer


@dataclass(frozen=True)
class Diagonal:
    """Basis: elements. Score: U_ij²·H_ij, what the retain loss would feel of each element."""

    summary: str = "elements the retain loss would feel most are skill (diagonal Fisher; the thing to beat)"
    amounts: tuple[str, ...] = ("mass", "energy", "density")
    needs: tuple[str, ...] = ("diagonal",)
    memory_side: str = "tail"

    def basis(self, layer: Layer, amount: Amount) -> Basis:
        """Return the elements themselves."""
        return ElementBasis(layer.update)

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return U²·H, (d_out, d_in)."""
        return basis.coefficients.double().square() * layer.need("diagonal").values.double()
