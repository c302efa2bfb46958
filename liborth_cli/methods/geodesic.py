"""Geodesics between two weights, in a metric that is the K-FAC curvature at each of them.

With the factors of one point there is nothing to bend: the metric A ⊗ G is the same everywhere, its Christoffel symbols, which
are derivatives of it, are zero, and ẍ = −Γẋẋ = 0 leaves the straight line. A path bends where the metric changes on the way.

With factors at both ends, (A₀, G₀) and (A₁, G₁), the generalised eigenvectors of (A₀, A₁) and (G₀, G₁) are coordinates in
which the metric is diagonal at both: 1 at the start and ρ_ij = γ_i·α_j at the end. Between them each coordinate x, counted from
0 to 1, has the metric 1 + (ρ − 1)x. It depends on that coordinate alone, so the geodesic has a constant speed in each
coordinate's own length ∫√(1 + (ρ − 1)x) dx, and

    x(t) = ((1 + t(ρ^(3/2) − 1))^(2/3) − 1)/(ρ − 1):

fast where the retain loss is flat, slow where it is sharp, exact at both ends. ρ = 1 everywhere is the straight line.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liborth_cli.curvature.layer import KroneckerFactors
from liborth_cli.errors import BadInput
from liborth_cli.linalg.eigen import cholesky
from liborth_cli.methods.kronecker import apply

DAMPING = 1e-2
"""Added to the factors at both ends, relative to the mean eigenvalue at the start (docs/decisions/0024)."""
NOT_POSITIVE = "{}: a retain factor is not positive; measure it on more tokens"
NEAR = 1e-4
"""Closer to ρ = 1 than this, the path is the straight line to 2e-5."""


@dataclass(frozen=True)
class Coordinates:
    """Coordinates of one side in which the metrics of both ends are diagonal.

    Attributes:
        to: from the weight's coordinates to these, in one of the forms of a factor.
        back: the other way.
        ratios: the metric at the end; 1 at the start, flat, (d,).
    """

    to: torch.Tensor
    back: torch.Tensor
    ratios: torch.Tensor


def joint(start: torch.Tensor, end: torch.Tensor, name: str, damping: float = DAMPING) -> Coordinates:
    """Diagonalise the factors of one side at both ends.

    Args:
        start: (d, d), (blocks, d/blocks, d/blocks), or a diagonal (d,).
        end: of the same form.
        name: of the layer, for messages.
        damping: relative to the mean eigenvalue of `start`.

    Raises:
        BadInput: when a factor is not positive.
    """
    r, f = start.double(), end.double()
    if r.dim() == 1:
        small = damping * r.mean()
        r, f = r + small, f + small
        if not bool((r > 0).all()):
            raise BadInput(NOT_POSITIVE.format(name))
        return Coordinates(r.sqrt(), r.rsqrt(), f / r)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    small = damping * diagonal.mean() * torch.eye(r.shape[-1]).to(r)
    lower = cholesky(r + small)
    if lower is None:
        raise BadInput(NOT_POSITIVE.format(name))
    half = torch.linalg.solve_triangular(lower, f + small, upper=False)
    middle = torch.linalg.solve_triangular(lower, half.mT.contiguous(), upper=False)
    ratios, vectors = torch.linalg.eigh((middle + middle.mT) / 2)
    back = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
    return Coordinates(vectors.mT @ lower.mT, back, ratios.clamp(min=0).flatten())


def pace(ratios: torch.Tensor, t: float) -> torch.Tensor:
    """Return how far each coordinate is, x(t), shaped like `ratios`: 0 at t = 0 and 1 at t = 1.

    Args:
        ratios: ρ, the metric at the end over that at the start, not negative.
        t: in [0, 1].
    """
    rho = ratios.double()
    far = (rho - 1).abs() > NEAR
    safe = torch.where(far, rho, 2.0)
    return torch.where(far, ((1 + t * (safe.pow(1.5) - 1)).clamp(min=0).pow(2 / 3) - 1) / (safe - 1), t)


@dataclass(frozen=True)
class Chart:
    """Coordinates of a whole matrix in which the metrics of both ends are diagonal: the same for every t.

    Attributes:
        left: of its outputs.
        right: of its inputs.
    """

    left: Coordinates
    right: Coordinates

    @classmethod
    def of(cls, start: KroneckerFactors, end: KroneckerFactors, *, damping: float = DAMPING) -> Chart:
        """Diagonalise the factors at W(0) and W(1), of the same forms; see `joint`, errors too."""
        return cls(
            joint(start.gradient_covariance, end.gradient_covariance, start.name, damping),
            joint(start.input_covariance, end.input_covariance, start.name, damping),
        )

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(part.nbytes for side in (self.left, self.right) for part in (side.to, side.back, side.ratios))

    def travelled(self, difference: torch.Tensor, t: float) -> torch.Tensor:
        """Return how far the geodesic has gone, W(t) − W(0), (d_out, d_in), float64.

        Args:
            difference: W(1) − W(0), (d_out, d_in).
            t: in [0, 1].
        """
        left, right = self.left, self.right
        # A difference is a vector: with X the columns of `back`, D = X_G C X_Aᵀ.
        inside = apply(right.to, apply(left.to, difference.double()).T).T
        inside = inside * pace(torch.outer(left.ratios, right.ratios), t)
        return apply(right.back, apply(left.back, inside).T).T
