"""`diagonal`: the loss each weight's update makes under a diagonal Hessian, U²·H. Kept to be compared with.

LibOrtho's first version divided by H in its place: `impact`. A diagonal depends on coordinates: L = (x + y)² has
curvatures 4 and 0, and a diagonal sees 2 and 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from liborth_cli.methods.method import Amount, Layer, Method

if TYPE_CHECKING:
    import torch

    from liborth_cli.methods.selection import Basis


@dataclass(frozen=True)
class Diagonal(Method):
    """Basis: elements. Score: U_ij²·H_ij, what the retain loss would feel of each element."""

    name = "diagonal"
    summary = "elements the retain loss would feel most are skill (diagonal Fisher; a control)"
    amounts = ("mass", "threshold", "energy", "density")
    begin = Amount("mass", 0.9)
    needs = ("diagonal",)

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return U²·H, (d_out, d_in)."""
        return basis.coefficients.double().square() * layer.need("diagonal").values.double()
