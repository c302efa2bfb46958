"""`contrastive`: remove what forget data feel most for each unit of what retain data feel.

To first order in the Kronecker factors, removing D from the update costs ½ tr(G_r D A_r Dᵀ) on the retain data and gains
½ tr(G_f D A_f Dᵀ) on the forget data. The kept part X that minimises

    tr(G_r (X−U) A_r (X−U)ᵀ) + λ · tr(G_f X A_f Xᵀ)

is a filter in the generalised eigenbases of (A_f, A_r) and (G_f, G_r), where both forms are diagonal: C_ij / (1 + λ·γ_i·α_j).
Everything is done in float64: one Cholesky, two triangular solves and one eigendecomposition for each factor.
Where the forget factors are measured decides whether it works: on the path, not at the fine-tuned point (docs/methods.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from liborth_cli.errors import BadInput
from liborth_cli.methods.kronecker import KroneckerBasis, SideBasis
from liborth_cli.methods.method import Amount, Basis, Layer


@dataclass
class JointBasis(KroneckerBasis):
    """The coordinates in which retain and forget curvature are both diagonal.

    Attributes:
        ratios: ρ_ij = γ_i·α_j, (d_out, d_in).
    """

    ratios: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Contrastive:
    """Basis: generalised eigenvectors. Score: ρ_ij = γ_i·α_j, forget curvature per unit of retain curvature."""

    summary: str = "directions the forget data feel most per unit of retain curvature are memory"
    amounts: tuple[str, ...] = ("strength", "threshold")
    needs: tuple[str, ...] = ("retain", "forget")
    memory_side: str = "top"
    damping: float = 1e-4

    def basis(self, layer: Layer, amount: Amount) -> Basis:
        """Return the update's coordinates in the joint basis."""
        retain, forget = layer.need("retain"), layer.need("forget")
        left, gamma = joint_basis(retain.gradient_covariance, forget.gradient_covariance, self.damping, layer.name)
        right, alpha = joint_basis(retain.input_covariance, forget.input_covariance, self.damping, layer.name)
        found = KroneckerBasis.of(layer.update, left, right)
        return JointBasis(found.left, found.right, found.coefficients, found.dtype, ratios=torch.outer(gamma, alpha))

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return ρ, (d_out, d_in)."""
        assert isinstance(basis, JointBasis)
        return basis.ratios


def joint_basis(retain: torch.Tensor, forget: torch.Tensor, damping: float, name: str) -> tuple[SideBasis, torch.Tensor]:
    """Diagonalise two covariances at once: XᵀRX = I and XᵀFX = diag(ratios).

    R is damped by `damping` times its mean eigenvalue; F is scaled to the trace of R.

    Args:
        retain: R, (d, d), (blocks, d, d), or a diagonal (d,).
        forget: F, the same form.
        damping: relative to R's mean eigenvalue.
        name: of the layer, for messages.

    Returns:
        The coordinates X⁻¹ (analyse) and back X (synthesise), acting on one side of the update, and the ratios, flat, (d,).

    Raises:
        BadInput: when the forms differ, or R is not positive.
    """
    if retain.shape != forget.shape:
        raise BadInput(f"{name}: retain factors are {list(retain.shape)} and forget factors {list(forget.shape)}")
    r, f = retain.double(), forget.double()
    if r.dim() == 1:
        f = f * (r.sum() / f.sum().clamp(min=torch.finfo(torch.float64).tiny))
        r = r + damping * r.mean()
        _check(bool((r > 0).all()) and bool(torch.isfinite(r).all()), name)
        root = r.sqrt()
        return SideBasis(root, 1 / root), f / r
    size = r.shape[-1]
    trace_r, trace_f = (m.diagonal(dim1=-2, dim2=-1).sum() for m in (r, f))
    f = f * (trace_r / trace_f.clamp(min=torch.finfo(torch.float64).tiny))
    mean = trace_r / (r.numel() / size)
    eye = torch.eye(size, dtype=r.dtype, device=r.device)
    lower, info = torch.linalg.cholesky_ex(r + damping * mean * eye)
    _check(not bool(info.any()), name)
    half = torch.linalg.solve_triangular(lower, f, upper=False)
    middle = torch.linalg.solve_triangular(lower, half.mT.contiguous(), upper=False)
    ratios, vectors = torch.linalg.eigh((middle + middle.mT) / 2)
    synthesise = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
    analyse = vectors.mT @ lower.mT
    return SideBasis(analyse, synthesise), ratios.clamp(min=0).flatten()


def _check(positive: bool, name: str) -> None:
    if not positive:
        raise BadInput(f"{name}: a retain factor is not positive; measure it on more tokens, or raise --damping")
