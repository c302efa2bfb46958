"""`contrastive`: remove what forget data feel most for each unit of what retain data feel.

To first order in the Kronecker factors, removing D from the update costs ½ tr(G_r D A_r Dᵀ) on the retain data and gains
½ tr(G_f D A_f Dᵀ) on the forget data. The kept part X that minimises

    tr(G_r (X−U) A_r (X−U)ᵀ) + λ · Σ_k tr(G_k X A_k Xᵀ)

over the sets k of forget data, each scaled to the trace of the retain curvature, is for one set a filter in the generalised
eigenbases of (A_f, A_r) and (G_f, G_r), where both forms are diagonal: C_ij / (1 + λ·γ_i·α_j). For several sets, or several
uses of a tied matrix, the basis is that of their average and ρ is exact in it (`joint`). All in float64.

A hard cut takes the same ρ along *orthonormal* directions, the eigenvectors of R^(−½) F R^(−½): in the coordinates of the
filter a cut is oblique and can blow the kept part up (docs/decisions/0021).
Where the forget factors are measured decides whether it works: on the path, not at the fine-tuned point (docs/methods.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from liborth_cli.methods.method import Amount, Layer, Method, setting

if TYPE_CHECKING:
    import torch

    from liborth_cli.methods.selection import Basis


@dataclass(frozen=True)
class Contrastive(Method):
    """Basis: generalised eigenvectors. Score: ρ_ij = γ_i·α_j, forget curvature per unit of retain curvature."""

    name = "contrastive"
    summary = "directions the forget data feel most per unit of retain curvature are memory"
    amounts = ("strength", "threshold")
    needs = ("retain", "forget")
    memory_side = "top"
    default = Amount("strength", 0.1)
    cuts = True

    sides: str = setting("both", "use the factors of one side only.", choices=("both", "input", "output"))
    damping: float = setting(1e-2, "added to retain factors, relative to their mean eigenvalue.", low=0)
    factor_rank: int | None = setting(None, "directions taken of factors over 4 times as wide.", low=1)

    def basis(self, layer: Layer, amount: Amount) -> Basis:
        """Return the update's coordinates in the joint basis."""
        from liborth_cli.methods.joint import joint_basis

        cut = amount.hard or amount.kind == "threshold"
        return joint_basis(layer, cut, self.sides, self.damping, self.factor_rank)

    def dose_bytes(self, shape: tuple[int, int], full: Sequence[int], tokens: float) -> int:
        """Return what few directions of both sides take, where the tokens are few (docs/decisions/0026)."""
        from liborth_cli.linalg.rows import few

        kept = [int(tokens) if tokens <= few(size) else size for size in shape]
        vectors = sum(size * count for size, count in zip(shape, kept, strict=True) if count < size or size in full)
        return 8 * (vectors + 2 * kept[0] * kept[1])

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return ρ, shaped like the coefficients."""
        from liborth_cli.methods.joint import JointBasis

        assert isinstance(basis, JointBasis)
        return basis.ratios
