"""`contrastive`: remove what forget data feel most for each unit of what retain data feel.

To first order in the Kronecker factors, removing D from the update costs ½ tr(G_r D A_r Dᵀ) on the retain data and gains
½ tr(G_f D A_f Dᵀ) on the forget data. The kept part X that minimises

    tr(G_r (X−U) A_r (X−U)ᵀ) + λ · Σ_k tr(G_k X A_k Xᵀ)

over the sets k of forget data, each scaled to the trace of the retain curvature, is for one set a filter in the generalised
eigenbases of (A_f, A_r) and (G_f, G_r), where both forms are diagonal: C_ij / (1 + λ·γ_i·α_j). For several sets, or several
uses of a tied matrix, the basis is that of their average and ρ is exact in it (`terms`). All in float64.

A hard cut takes the same ρ along *orthonormal* directions, the eigenvectors of R^(−½) F R^(−½): in the coordinates of the
filter a cut is oblique and can blow the kept part up (docs/decisions/0021).
Where the forget factors are measured decides whether it works: on the path, not at the fine-tuned point (docs/methods.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from liborth_cli.methods.joint import JointSide, Weighted, identity_side, joint_side
from liborth_cli.methods.kronecker import KroneckerBasis
from liborth_cli.methods.lowrank import rank_for
from liborth_cli.methods.method import Amount, Basis, Layer
from liborth_cli.methods.terms import Term, terms_of


@dataclass
class JointBasis(KroneckerBasis):
    """The coordinates in which retain and forget curvature are both diagonal.

    Attributes:
        ratios: ρ_ij, forget curvature per unit of retain curvature, shaped like the coefficients.
    """

    ratios: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Contrastive:
    """Basis: generalised eigenvectors. Score: ρ_ij = γ_i·α_j, forget curvature per unit of retain curvature.

    Attributes:
        sides: "both", or "input" or "output" to take the other side's factors as the identity.
        damping: added to the retain factors, relative to their mean eigenvalue.
        factor_rank: directions taken of factors more than four times as wide (`lowrank`); None decides by width.
    """

    summary: str = "directions the forget data feel most per unit of retain curvature are memory"
    amounts: tuple[str, ...] = ("strength", "threshold")
    needs: tuple[str, ...] = ("retain", "forget")
    memory_side: str = "top"
    sides: str = "both"
    damping: float = 1e-2
    factor_rank: int | None = None

    def basis(self, layer: Layer, amount: Amount) -> Basis:
        """Return the update's coordinates in the joint basis."""
        retain = terms_of(layer.need("retain"))
        forget = [replace(t, share=t.share * w) for factors, w in layer.weighed("forget") for t in terms_of(factors)]
        hard = amount.hard or amount.kind == "threshold"

        def side(which: str, key: object) -> JointSide:
            if self.sides not in ("both", which):
                return identity_side(layer.update.shape[which == "input"], len(retain), len(forget), layer.update.device)
            kept, lost = _weighted(retain, which), _weighted(forget, which)
            rank = rank_for(kept[0][1], self.factor_rank)
            make = lambda: joint_side(kept, lost, self.damping, layer.name, hard, rank)  # noqa: E731
            return layer.memo.get(key and (key, hard), make, lambda made: made.nbytes)

        left, right = side("output", None), side("input", layer.input_key)
        found = KroneckerBasis.of(layer.update, left.side, right.side)
        ratios = _sum(forget, left.forget, right.forget)
        if len(retain) > 1:
            ratios /= _sum(retain, left.retain, right.retain)
        facts = {"factor_error": max(left.errors + right.errors)} if left.errors or right.errors else {}
        return JointBasis(found.left, found.right, found.coefficients, found.dtype, facts, ratios=ratios)

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return ρ, shaped like the coefficients."""
        assert isinstance(basis, JointBasis)
        return basis.ratios


def _weighted(terms: list[Term], which: str) -> Weighted:
    return [(term.share, term.input if which == "input" else term.output) for term in terms]


def _sum(terms: list[Term], rows: list[torch.Tensor], columns: list[torch.Tensor]) -> torch.Tensor:
    """Return Σ share·rowᵀcolumn over the terms."""
    total = torch.outer(rows[0] * terms[0].share, columns[0])
    for term, row, column in zip(terms[1:], rows[1:], columns[1:], strict=True):
        total.addr_(row * term.share, column)
    return total
