"""A covariance as a metric: R = L Lᵀ, whitening by L, and when float32 is enough for it.

An edit minimises cost(X − U) + λ·gain(X), and the cost is the metric's, G ⊗ A. Let a factorisation stand for a metric that is
within ε of the one asked, ‖L⁻¹(L Lᵀ − R)L⁻ᵀ‖ ≤ ε on each side. Then the edit X′ it gives solves H′(X′ − X) = Δ(U − X), H′ the
Hessian and Δ within 2ε of the metric, so that it lies above the true minimum by no more than (2ε)² of the cost: the error
enters squared. Rounding in float32 gives ε of 1e-5 to 5e-3 at the damping that is the default, in half of the time; ε is
measured, and where it is too large all is done in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liborth_cli.curvature.layer import Covariance, trace
from liborth_cli.errors import BadInput
from liborth_cli.linalg.eigen import cholesky, solve_lower
from liborth_cli.linalg.rows import Samples

SINGLE_FROM = 512
"""Narrowest covariance for which float32 is tried."""
ROWS = 64
"""Numbers summed in float32, before what comes of it is added up in float64."""


def mean_scale(factor: Covariance) -> float:
    """Return what a factor is multiplied by to have the mean eigenvalue 1; 1 for zero."""
    size = factor.shape[0] * factor.shape[-1] if factor.dim() == 3 else factor.shape[0]
    return size / (trace(factor) or size)


def unit(factor: Covariance) -> torch.Tensor:
    """Scale a factor (d, d), (blocks, d, d) or (d,) to mean eigenvalue 1, in float64; zero stays zero."""
    if isinstance(factor, Samples):
        return factor.dense(torch.float64).mul_(mean_scale(factor))
    return factor.to(torch.float64, copy=True).mul_(mean_scale(factor))


@dataclass(frozen=True)
class Whitening:
    """L of R = L Lᵀ, in one of the forms of a factor.

    Attributes:
        lower: (d, d) lower triangular; (blocks, d/blocks, d/blocks) likewise; or the square roots of a diagonal, (d,).
    """

    lower: torch.Tensor

    @classmethod
    def of(cls, covariance: torch.Tensor, damping: float, name: str, excess: float = 0.0) -> Whitening:
        """Factorise a covariance at mean eigenvalue 1, plus damping·I.

        Args:
            covariance: (d, d), (blocks, d/blocks, d/blocks), or a diagonal (d,).
            damping: relative to the mean eigenvalue.
            name: of the layer, for messages.
            excess: how far above its minimum the objective may end, relative to it; above 0, float32 is used where it is
                shown to be enough. 0 computes in float64.

        Raises:
            BadInput: when it is not positive.
        """
        # A GPU that is asked for float64 has units for it, and nothing is gained there.
        single = covariance.dtype == torch.float32 and covariance.dim() == 2 and covariance.device.type == "cpu"
        if (
            single
            and excess > 0
            and len(covariance) >= SINGLE_FROM
            and (found := _single(covariance, damping, excess)) is not None
        ):
            return cls(found)
        return cls.of_unit(unit(covariance), damping, name)

    @classmethod
    def of_unit(cls, r: torch.Tensor, damping: float, name: str) -> Whitening:
        """Factorise a covariance that is at mean eigenvalue 1 and in float64 already; overwrites it."""
        if not bool(r.any()) or not bool(torch.isfinite(r.sum())):
            raise not_positive(name)
        if r.dim() == 1:
            r = r + damping
            if not bool((r > 0).all()):
                raise not_positive(name)
            return cls(r.sqrt())
        r.diagonal(dim1=-2, dim2=-1).add_(damping)
        lower = cholesky(r)
        if lower is None:
            raise not_positive(name)
        return cls(lower)

    def whiten(self, x: torch.Tensor) -> torch.Tensor:
        """Return L⁻¹ x, float64; x (d, n)."""
        return self._solve(x, False).double()

    def whiten_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return L⁻¹ x of every row x, (n, d), in the precision of L; x (n, d)."""
        return self._solve(x.T, False).T

    def unwhiten(self, x: torch.Tensor) -> torch.Tensor:
        """Return L⁻ᵀ x, float64: R⁻¹ once `whiten` was applied; x (d, n)."""
        return self._solve(x, True).double()

    def colour(self, x: torch.Tensor) -> torch.Tensor:
        """Return Lᵀ x, float64, what `unwhiten` undoes; x (d, n)."""
        if self.lower.dim() == 1:
            return x * self.lower[:, None]
        x = x.to(self.lower.dtype)
        return (self.lower.mT @ x.reshape(*self.lower.shape[:-1], -1)).reshape(x.shape).double()

    def _solve(self, x: torch.Tensor, transposed: bool) -> torch.Tensor:
        x = x.to(self.lower.dtype)
        if self.lower.dim() == 1:
            return x / self.lower[:, None]
        return solve_lower(self.lower, x.reshape(*self.lower.shape[:-1], -1), transposed).reshape(x.shape)


def not_positive(name: str) -> BadInput:
    """Return the error for a retain factor that cannot be divided by."""
    return BadInput(f"{name}: a retain factor is not positive; measure it on more tokens, or raise --damping")


def _single(covariance: torch.Tensor, damping: float, excess: float) -> torch.Tensor | None:
    """Factorise in float32; None when that is not within the excess, or not possible."""
    scale, limit = mean_scale(covariance), excess**0.5 / 2
    r = covariance * scale
    r.diagonal().add_(damping)
    lower = cholesky(r)
    if lower is None or all(distance(lower, covariance, scale, damping, norm) > limit for norm in (2, 4)):
        return None
    return lower


def distance(lower: torch.Tensor, covariance: torch.Tensor, scale: float, damping: float, norm: int = 2) -> float:
    """Measure (Σσⁿ)^(1/n) of M = L⁻¹(L Lᵀ − R)L⁻ᵀ on a random vector: no less than its largest singular value, which counts.

    For z ~ N(0, I) the expectation of ‖Mᵏz‖² is Σσ²ᵏ. M is rounding, and many directions share it: one vector does. The norm of
    order 4 takes twice as long as that of order 2, and is nearer to the largest. Products are in float32 and summed in float64
    over `ROWS`; what they round is measured with the rest. So the figure is too large rather than too small: that of order 2 by
    a sixth where it is near what is allowed, by three quarters where it is a hundredth of that.

    Args:
        lower: L, (d, d), float32.
        covariance: (d, d), float32, with R = scale·covariance + damping·I.
        scale: on the covariance.
        damping: on the diagonal.
        norm: n, even.
    """
    size, k = len(lower), norm // 2
    bands = [slice(start, start + ROWS) for start in range(0, size, ROWS)]
    z = torch.randn(size, 1, generator=torch.Generator().manual_seed(0))
    for _ in range(k):
        w = solve_lower(lower, z, transposed=True)[:, 0]
        middle, off = torch.zeros(size, dtype=torch.float64), w.double() * -damping
        for band in bands:
            middle[: band.stop] += (lower[band, : band.stop].T @ w[band]).double()
        single = middle.float()
        for band in bands:
            off[band.start :] += (lower[band.start :, band] @ single[band]).double()
            off -= (covariance[band].T @ w[band]).double() * scale
        z = solve_lower(lower, off.float()[:, None])
    return float(torch.linalg.vector_norm(z)) ** (1 / k)
