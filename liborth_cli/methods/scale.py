"""`scale`: skill as a fraction of the whole update. The baseline every method has to beat.

Interpolating between the two checkpoints' weights: WiSE-FT, Wortsman et al. 2022 (arXiv 2109.01903).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from liborth_cli.methods.method import Amount, Layer, Method

if TYPE_CHECKING:
    import torch

    from liborth_cli.methods.selection import Basis


@dataclass(frozen=True)
class Scale(Method):
    """Basis: elements. Score: none, all alike."""

    name = "scale"
    summary = "the whole update, shrunk by --scale (interpolation baseline)"
    amounts = ("scale",)
    begin = Amount("scale", 0.7)

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return ones, without storing them."""
        coefficients = basis.coefficients
        return coefficients.new_ones(()).expand(coefficients.shape)
