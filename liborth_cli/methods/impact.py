"""`impact`: LibOrtho's first version, as its document has it: |residual|² / H_jj, a weight at a time.

What has more impact than τ is taken for memory. `--threshold τ` is one number for all matrices, as there; `--density` and
`--mass` find one for each matrix. The optimal brain surgeon's saliency is U²/(H⁻¹)_jj; here (H⁻¹)_jj multiplies, so a weight
that the retain loss hardly feels counts most. `diagonal` ranks by U²·H in its place. Kept to be compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from liborth_cli.methods.method import Amount, Layer, Method

if TYPE_CHECKING:
    import torch

    from liborth_cli.methods.selection import Basis

FLOOR, LEAST = 1e-6, 1e-30
"""Added to H, relative to its mean over the matrix, and the least of that: nothing is divided by zero."""


@dataclass(frozen=True)
class Impact(Method):
    """Basis: elements. Score: U_ij²/H_ij."""

    name = "impact"
    summary = "elements of high U²/H are memory (LibOrtho's first version; a control)"
    amounts = ("threshold", "density", "mass", "energy")
    begin = Amount("density", 0.1)
    needs = ("diagonal",)
    memory_side = "top"

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return U²/H, (d_out, d_in)."""
        curvature = layer.need("diagonal").values.double()
        floor = max(FLOOR * float(curvature.mean()), LEAST)
        return basis.coefficients.double().square().div_(curvature + floor)
