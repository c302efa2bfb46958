"""The basis of `contrastive`: coordinates in which retain and forget covariances are both diagonal, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from liborth_cli.curvature.layer import quadratic
from liborth_cli.errors import BadInput
from liborth_cli.linalg.rows import spanning_factor
from liborth_cli.methods.kronecker import (
    IDENTITY,
    FrameSide,
    KroneckerBasis,
    Side,
    SideBasis,
    Term,
    Whitening,
    average,
    low_rank,
    mean_scale,
    not_positive,
    rank_for,
    terms_of,
    unit,
)
from liborth_cli.methods.method import Layer
from liborth_cli.methods.selection import Facts

NEGLIGIBLE = 1e-13
"""Directions below this share of the largest ratio are rounding."""
Weighted = Sequence[tuple[float, torch.Tensor]]
"""Covariances of one side, each with its weight in the average the basis is made of."""


@dataclass
class JointBasis(KroneckerBasis):
    """The coordinates in which retain and forget curvature are both diagonal.

    Attributes:
        ratios: ρ_ij, forget curvature per unit of retain curvature, shaped like the coefficients.
    """

    ratios: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def joint_basis(layer: Layer, cut: bool, sides: str, damping: float, factor_rank: int | None) -> JointBasis:
    """Return an update's coordinates in the joint basis; see `contrastive` for the settings.

    Args:
        layer: the matrix.
        cut: make the coordinates orthonormal, for a hard cut.
        sides: "both", or "input" or "output" to take the other side's factors as the identity.
        damping: added to the retain factors, relative to their mean eigenvalue.
        factor_rank: directions taken of factors more than four times as wide (`rank_for`); None decides by width.
    """
    retain = terms_of(layer.need("retain"))
    forget = [replace(t, share=t.share * w) for factors, w in layer.weighed("forget") for t in terms_of(factors)]

    def side(which: str, key: object) -> JointSide:
        if sides not in ("both", which):
            return identity_side(layer.update.shape[which == "input"], len(retain), len(forget), layer.update.device)
        kept, lost = _weighted(retain, which), _weighted(forget, which)
        rank = rank_for(kept[0][1], factor_rank)
        make = lambda: joint_side(kept, lost, damping, layer.name, cut, rank)  # noqa: E731
        return layer.memo.get(key and (key, cut), make, lambda made: made.nbytes)

    left, right = side("output", None), side("input", layer.input_key)
    found = KroneckerBasis.of(layer.update, left.side, right.side)
    ratios = _sum(forget, left.forget, right.forget)
    if len(retain) > 1:
        ratios /= _sum(retain, left.retain, right.retain)
    facts: Facts = {"factor_error": max(left.errors + right.errors)} if left.errors or right.errors else {}
    return JointBasis(found.left, found.right, found.coefficients, found.dtype, facts, ratios=ratios)


@dataclass(frozen=True)
class JointSide:
    """Coordinates, and what each covariance is along them.

    Attributes:
        side: the change of coordinates.
        retain: for each retain term, its (damped) curvature along every coordinate, (n,).
        forget: for each forget term likewise.
        errors: relative error of what was taken as low rank plus a multiple of the identity.
    """

    side: Side
    retain: list[torch.Tensor]
    forget: list[torch.Tensor]
    errors: list[float] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.side.nbytes + sum(v.nbytes for v in (*self.retain, *self.forget))


def identity_side(size: int, retain: int, forget: int, device: torch.device) -> JointSide:
    """Return a side on which every covariance is taken as the identity.

    Args:
        size: d.
        retain: how many retain terms there are.
        forget: how many forget terms there are.
        device: where the update is.
    """
    ones = torch.ones(size, dtype=torch.float64, device=device)
    return JointSide(SideBasis(IDENTITY, IDENTITY), [ones] * retain, [ones] * forget)


def joint_side(
    retain: Weighted, forget: Weighted, damping: float, name: str, hard: bool = False, rank: int | None = None
) -> JointSide:
    """Diagonalise the averages of two groups of covariances at once: XᵀRX = I and XᵀFX diagonal.

    Every covariance is scaled to mean eigenvalue 1 and R is damped by `damping`. The curvatures of the single covariances
    along the coordinates are exact; of a group of one they are the diagonal itself.

    Args:
        retain: R's parts: (d, d), (blocks, d, d), or diagonals (d,).
        forget: F's parts, of the same forms.
        damping: relative to R's mean eigenvalue.
        name: of the layer, for messages.
        hard: make the coordinates orthonormal: eigenvectors of R^(−½) F R^(−½), which has the same eigenvalues.
        rank: find only so many directions, and one ratio for all others (`lowrank`); with several terms all are found.

    Returns:
        The coordinates and the curvatures along them.

    Raises:
        BadInput: when the forms differ, R is not positive, or a hard cut is asked of few directions.
    """
    shapes = {tuple(m.shape) for group in (retain, forget) for _, m in group if m.dim() > 1}
    sizes = {m.shape[0] * (m.shape[-1] if m.dim() == 3 else 1) for group in (retain, forget) for _, m in group}
    diagonal = [all(m.dim() == 1 for _, m in group) for group in (retain, forget)]
    if len(sizes) > 1 or len(shapes) > 1 or diagonal[0] != diagonal[1]:
        found = " and ".join(str([list(m.shape) for _, m in group]) for group in (retain, forget))
        raise BadInput(f"{name}: retain and forget factors are of different forms: {found}")
    weights = [w for w, _ in retain], [w for w, _ in forget]
    covariances = [m for _, m in retain], [m for _, m in forget]
    few, square = [len(group) == 1 for group in covariances], covariances[0][0].dim() == 2
    r = average(weights[0], covariances[0])
    if not hard and (spanning := _spanning(weights[1], covariances[1])) is not None:
        solved = _along(r, spanning, damping, name)
    else:
        f = average(weights[1], covariances[1])
        if rank is None or not all(few) or not square:
            solved = _diagonalise(r, f, damping, name, hard)
        elif hard:
            raise BadInput(f"{name}: a hard cut needs whole factors, and these are {len(f)} wide; use the soft filter")
        else:
            return _thin(r, f, damping, name, rank)
    return JointSide(
        solved.side,
        [torch.ones_like(solved.ratios)] if few[0] else [solved.along(unit(m), damping) for m in covariances[0]],
        [solved.ratios] if few[1] else [solved.along(unit(m)) for m in covariances[1]],
    )


@dataclass(frozen=True)
class _Solved:
    """A joint diagonalisation.

    Attributes:
        side: the coordinates.
        ratios: F along them, flat, (d,), or (k,) for all that are not zero.
        vectors: X with XᵀRX = I, or its diagonal.
    """

    side: SideBasis
    ratios: torch.Tensor
    vectors: torch.Tensor

    def along(self, matrix: torch.Tensor, damping: float = 0.0) -> torch.Tensor:
        """Return xᵀ(M + damping·I)x for every column x of X, flat."""
        if self.vectors.dim() == 1:
            return (matrix + damping) * self.vectors.square()
        if matrix.dim() == 1:
            return (matrix + damping) @ self.vectors.square()
        return quadratic(matrix, self.vectors) + damping * self.vectors.square().sum(-2).flatten()


def _spanning(weights: Sequence[float], covariances: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return W (d, k) with W Wᵀ the average of covariances (see `average`), when there are few directions in all of them."""
    parts = []
    for weight, covariance in zip(weights, covariances, strict=True):
        part = spanning_factor(covariance) if covariance.dim() < 3 else None
        if part is None:
            return None
        parts.append(part * (weight / sum(weights) * mean_scale(covariance)) ** 0.5)
    whole = torch.cat(parts, 1)
    return whole if whole.shape[1] < len(whole) // 2 else None


def _along(r: torch.Tensor, w: torch.Tensor, damping: float, name: str) -> _Solved:
    """Diagonalise R, (d, d) or (d,), and F = W Wᵀ, W (d, k), where F is not zero: a filter leaves all else as it is."""
    metric = Whitening.of_unit(r, damping, name)
    white = metric.whiten(w)
    ratios, mixing = torch.linalg.eigh(white.T @ white)
    real = ratios > NEGLIGIBLE * ratios[-1:].clamp(min=0)
    if not bool(real.any()):  # F is zero: one direction that is none, for an operator of no rows would be the identity
        none = r.new_zeros(len(r), 1)
        return _Solved(SideBasis(none.T, none), none[0], none)
    ratios = ratios[real].flip(0)
    mixing = mixing[:, real].flip(1) * ratios.rsqrt()
    back = metric.unwhiten(white @ mixing)
    return _Solved(SideBasis((w @ mixing).T, back), ratios, back)


def _diagonalise(r: torch.Tensor, f: torch.Tensor, damping: float, name: str, hard: bool) -> _Solved:
    """Diagonalise two matrices, diagonals or stacks of blocks at mean eigenvalue 1; overwrites R."""
    if hard and r.dim() > 1:
        r.diagonal(dim1=-2, dim2=-1).add_(damping if bool(r.any()) else 0.0)
        values, q = torch.linalg.eigh(r)
        if not bool((values > 0).all()):
            raise not_positive(name)
        inverse_root = (q * values.rsqrt()[..., None, :]) @ q.mT
        middle = inverse_root @ f @ inverse_root
        ratios, w = torch.linalg.eigh((middle + middle.mT) / 2)
        return _Solved(SideBasis.orthonormal(w), ratios.clamp(min=0).flatten(), inverse_root @ w)
    lower = Whitening.of_unit(r, damping, name).lower
    if lower.dim() == 1:
        side = SideBasis(IDENTITY, IDENTITY) if hard else SideBasis(lower, 1 / lower)
        return _Solved(side, f / lower.square(), 1 / lower)
    half = torch.linalg.solve_triangular(lower, f, upper=False)
    middle = torch.linalg.solve_triangular(lower, half.mT.contiguous(), upper=False)
    ratios, v = torch.linalg.eigh((middle + middle.mT) / 2)
    back = torch.linalg.solve_triangular(lower.mT, v, upper=True)
    return _Solved(SideBasis(v.mT @ lower.mT, back), ratios.clamp(min=0).flatten(), back)


def _thin(r: torch.Tensor, f: torch.Tensor, damping: float, name: str, rank: int) -> JointSide:
    """Find the leading generalised eigenvectors of two wide matrices at mean eigenvalue 1; overwrites R."""
    lower = Whitening.of_unit(r, damping, name).lower

    def multiply(x: torch.Tensor) -> torch.Tensor:
        x = f @ torch.linalg.solve_triangular(lower.T, x, upper=True)
        return torch.linalg.solve_triangular(lower, x, upper=False)

    found = low_rank(multiply, len(r), rank, r.device)
    back = torch.linalg.solve_triangular(lower.T, found.vectors, upper=True)
    ratios = torch.cat([found.values, found.values.new_full((len(r),), found.rest)])
    return JointSide(FrameSide(found.vectors.T @ lower.T, back), [torch.ones_like(ratios)], [ratios], [found.error])


def _weighted(terms: list[Term], which: str) -> Weighted:
    return [(term.share, term.input if which == "input" else term.output) for term in terms]


def _sum(terms: list[Term], rows: list[torch.Tensor], columns: list[torch.Tensor]) -> torch.Tensor:
    """Return Σ share·rowᵀcolumn over the terms."""
    total = torch.outer(rows[0] * terms[0].share, columns[0])
    for term, row, column in zip(terms[1:], rows[1:], columns[1:], strict=True):
        total.addr_(row * term.share, column)
    return total
