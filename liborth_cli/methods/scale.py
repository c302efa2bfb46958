"""`scale`: skill as a fraction of the whole update. The baseline every method has to beat.

Interpolating between the two checkpoints' weights: WiSE-FT, Wortsman et al. 2022 (arXiv 2109.01903).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liborth_cli.methods.method import Amount, Basis, ElementBasis, Layer


@dataclass(frozen=True)
class Scale:
    """Basis: elements. Score: none, all alike."""

    summary: str = "the whole update, shrunk by --scale (interpolation baseline)"
    amounts: tuple[str, ...] = ("scale",)
    needs: tuple[str, ...] = ()
    memory_side: str = "tail"

    def basis(self, layer: Layer, amount: Amount) -> Basis:
        """Return the elements themselves."""
        return ElementBasis(layer.update)

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return ones, without storing them."""
        return torch.ones((), device=basis.coefficients.device).expand(basis.coefficients.shape)
