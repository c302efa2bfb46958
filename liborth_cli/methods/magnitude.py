"""`magnitude`: skill as the largest elements of the update. A baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liborth_cli.methods.method import Amount, Basis, ElementBasis, Layer


@dataclass(frozen=True)
class Magnitude:
    """Basis: elements. Score: |U_ij|."""

    summary: str = "largest elements of the update (baseline)"
    amounts: tuple[str, ...] = ("energy", "density")
    needs: tuple[str, ...] = ()
    memory_side: str = "tail"

    def basis(self, layer: Layer, amount: Amount) -> Basis:
        """Return the elements themselves."""
        return ElementBasis(layer.update)

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return the absolute values."""
        return basis.coefficients.abs()
