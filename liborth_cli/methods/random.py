"""`random`: elements drawn by lot until they hold the energy asked for. The placebo.

At equal --energy its memory part has the same norm as that of any other method, so whatever another method does better is
not due to the size of the edit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from liborth_cli.methods.method import Amount, Layer, Method

if TYPE_CHECKING:
    import torch

    from liborth_cli.methods.selection import Basis


@dataclass(frozen=True)
class Random(Method):
    """Basis: elements. Score: seeded noise."""

    name = "random"
    summary = "elements drawn by lot, norm-matched by --energy (placebo control)"
    amounts = ("energy", "density")
    begin = Amount("energy", 0.9)
    searched = False

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Draw one uniform number an element, from the layer's generator."""
        import torch

        noise = torch.rand(basis.coefficients.shape, generator=layer.generator, dtype=torch.float32)
        return noise.to(basis.coefficients.device)
