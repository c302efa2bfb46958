"""`magnitude`: skill as the largest elements of the update. A baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from liborth_cli.methods.method import Amount, Layer, Method

if TYPE_CHECKING:
    import torch

    from liborth_cli.methods.selection import Basis


@dataclass(frozen=True)
class Magnitude(Method):
    """Basis: elements. Score: |U_ij|."""

    name = "magnitude"
    summary = "largest elements of the update (baseline)"
    amounts = ("energy", "density")
    begin = Amount("energy", 0.9)

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return the absolute values."""
        return basis.coefficients.abs()
