"""The basis of `contrastive`: coordinates in which retain and forget covariances are both diagonal, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from liborth_kernels.gram import gram

from liborth_cli.curvature.layer import Covariance, quadratic
from liborth_cli.errors import BadInput
from liborth_cli.linalg.rows import ThinProduct, spanning_factor
from liborth_cli.methods.kronecker import (
    IDENTITY,
    FrameSide,
    KroneckerBasis,
    Side,
    SideBasis,
    Term,
    average,
    low_rank,
    rank_for,
    terms_of,
)
from liborth_cli.methods.method import Layer
from liborth_cli.methods.selection import Facts, Felt, Keep, kept
from liborth_cli.methods.whitening import Whitening, mean_scale, not_positive, unit

NEGLIGIBLE = 1e-13
"""Directions below this share of the largest ratio are rounding."""
MANY = 4
"""Tokens for each direction of a covariance, beyond which it counts as full."""
DEVICE_MANY = 1 / 3
"""The same on a GPU: so many tokens span more than few, and to look step by step took nine tenths of a split there."""
Weighted = Sequence[tuple[float, Covariance]]
"""Covariances of one side, each with its weight in the average the basis is made of."""


@dataclass
class JointBasis(KroneckerBasis):
    """The coordinates in which retain and forget curvature are both diagonal.

    Attributes:
        ratios: ρ_ij, forget curvature per unit of retain curvature, shaped like the coefficients.
        along: both sides' few directions, where both have few.
        mixing: of each side, from what spans its few directions to these; None where a side is held as it is.
    """

    ratios: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    along: tuple[Directions, Directions] | None = None
    mixing: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def rebuild(self, keep: Keep) -> torch.Tensor | ThinProduct:
        """Return Σ keep·C, (d_out, d_in), in the update's dtype, or in two factors when the input side has few directions."""
        return self.synthesised(_mixed(kept(self.coefficients, keep), *(None if one is None else one.T for one in self.mixing)))

    def felt(self, keep: Keep) -> Felt | None:
        """Return what curvature feels of D = Σ keep·C, among the coordinates; None where there are as many as in D itself.

        With D = Y C′ Xᵀ and Xᵀ(A + δI)X = I it is tr(G D A Dᵀ) = tr(C′ᵀ (I − δ YᵀY) C′ (I − δ XᵀX)).
        """
        if self.along is None:
            return None
        left, right = self.along
        c = kept(self.coefficients, keep)
        both = (c.T @ left.gram @ c) @ right.gram
        whole, squares = both.trace().item(), (both * both.T).sum().item()
        cost = ((c.T @ left.undamped @ c) * right.undamped).sum().item()
        gain = (left.ratios @ c.square() @ right.ratios).item()
        return Felt(
            dimension=whole * whole / squares if squares > 0 else 0.0,
            retain_cost=0.5 * cost / (left.retain_scale * right.retain_scale),
            forget_gain=[0.5 * gain / (left.forget_scale * right.forget_scale)],
        )

    def thinned(self) -> JointBasis:
        """Return what `rebuild` needs, and nothing else."""
        return replace(self, left=self.left.thinned(), right=self.right.thinned(), along=None)


@dataclass(frozen=True)
class Directions:
    """A few directions X with Xᵀ(R + δI)X = I and XᵀFX diagonal, of one retain covariance and one forget covariance.

    Attributes:
        span: Z, with X = Z·mixing, (d, n), float64.
        mixing: (n, k).
        ratios: F along them, (k,).
        damping: δ, for R at mean eigenvalue 1.
        retain_scale: what R was multiplied by to be at that.
        forget_scale: what F was.
    """

    span: torch.Tensor
    mixing: torch.Tensor
    ratios: torch.Tensor
    damping: float
    retain_scale: float
    forget_scale: float

    @cached_property
    def gram(self) -> torch.Tensor:
        """XᵀX, (k, k)."""
        return self.mixing.T @ gram(self.span.contiguous()) @ self.mixing

    @property
    def undamped(self) -> torch.Tensor:
        """XᵀRX, (k, k)."""
        return torch.eye(len(self.ratios)).to(self.gram) - self.damping * self.gram


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
        asked = Asked(damping, cut, rank, excess=layer.tolerance, tokens=max(term.tokens for term in forget))
        make = lambda: joint_side(kept, lost, asked, layer.name)  # noqa: E731
        return layer.memo.get(key and (key, cut), make, lambda made: made.nbytes)

    left, right = side("output", None), side("input", layer.input_key)
    few = left.directions and right.directions
    found = KroneckerBasis.of(layer.update, left.side, right.side, few is not None and layer.tolerance > 0)
    coefficients = _mixed(found.coefficients, left.mixing, right.mixing)
    ratios = _sum(forget, left.forget, right.forget)
    if len(retain) > 1:
        ratios /= _sum(retain, left.retain, right.retain)
    facts: Facts = {"factor_error": max(left.errors + right.errors)} if left.errors or right.errors else {}
    along = (left.directions, right.directions) if left.directions and right.directions else None
    mixing = left.mixing, right.mixing
    return JointBasis(found.left, found.right, coefficients, found.dtype, facts, ratios=ratios, along=along, mixing=mixing)


def _mixed(matrix: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor:
    """Return LᵀMR; None is the identity."""
    matrix = matrix if left is None else left.T @ matrix
    return matrix if right is None else matrix @ right


@dataclass(frozen=True)
class JointSide:
    """Coordinates, and what each covariance is along them.

    Attributes:
        side: the change of coordinates.
        retain: for each retain term, its (damped) curvature along every coordinate, (n,).
        forget: for each forget term likewise.
        errors: relative error of what was taken as low rank plus a multiple of the identity.
        directions: the coordinates, where they are few and of one covariance each.
        mixing: from the side's own coordinates, those of what spans F, to these, (n, k); None where they are these.
    """

    side: Side
    retain: list[torch.Tensor]
    forget: list[torch.Tensor]
    errors: list[float] = field(default_factory=list)
    directions: Directions | None = None
    mixing: torch.Tensor | None = None

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


@dataclass(frozen=True)
class Asked:
    """How a side is to be diagonalised.

    Attributes:
        damping: relative to R's mean eigenvalue.
        hard: make the coordinates orthonormal: eigenvectors of R^(−½) F R^(−½), which has the same eigenvalues.
        rank: find only so many directions, and one ratio for all others (`low_rank`); with several terms all are found.
        excess: see `Whitening.of`.
        tokens: how many F was averaged over: where they are many more than its directions, it is not looked whether it has few.
    """

    damping: float
    hard: bool = False
    rank: int | None = None
    excess: float = 0.0
    tokens: float = 0.0


def joint_side(retain: Weighted, forget: Weighted, asked: Asked, name: str) -> JointSide:
    """Diagonalise the averages of two groups of covariances at once: XᵀRX = I and XᵀFX diagonal.

    Every covariance is scaled to mean eigenvalue 1 and R is damped by `damping`. The curvatures of the single covariances
    along the coordinates are exact; of a group of one they are the diagonal itself.

    Args:
        retain: R's parts: (d, d), (blocks, d, d), or diagonals (d,).
        forget: F's parts, of the same forms.
        asked: how.
        name: of the layer, for messages.

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
    damping, hard, rank, directions = asked.damping, asked.hard, asked.rank, None
    most = MANY if covariances[1][0].device.type == "cpu" else DEVICE_MANY
    many = square and asked.tokens > most * len(covariances[0][0])
    if not hard and not many and (spanning := _spanning(weights[1], covariances[1])) is not None:
        solved = _along(_metric(weights[0], covariances[0], asked, name), spanning)
        if few == [True, True] and solved.mixing is not None and solved.side.few:
            scales = mean_scale(covariances[0][0]), mean_scale(covariances[1][0])
            directions = Directions(solved.side.back, solved.mixing, solved.ratios, damping, *scales)
    else:
        r, f = average(weights[0], covariances[0]), average(weights[1], covariances[1])
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
        directions=directions,
        mixing=solved.mixing,
    )


@dataclass(frozen=True)
class _Solved:
    """A joint diagonalisation.

    Attributes:
        side: the coordinates, or those of what spans F, before the mixing.
        ratios: F along them, flat, (d,), or (k,) for all that are not zero.
        whole: X with XᵀRX = I, or its diagonal; None where it is the side's `back` times the mixing.
        mixing: of few directions, (n, k).
    """

    side: SideBasis
    ratios: torch.Tensor
    whole: torch.Tensor | None = None
    mixing: torch.Tensor | None = None

    @cached_property
    def vectors(self) -> torch.Tensor:
        """X, (d, k), or its diagonal."""
        if self.whole is not None:
            return self.whole
        return self.side.back if self.mixing is None else self.side.back @ self.mixing

    def along(self, matrix: torch.Tensor, damping: float = 0.0) -> torch.Tensor:
        """Return xᵀ(M + damping·I)x for every column x of X, flat."""
        if self.vectors.dim() == 1:
            return (matrix + damping) * self.vectors.square()
        if matrix.dim() == 1:
            return (matrix + damping) @ self.vectors.square()
        return quadratic(matrix, self.vectors) + damping * self.vectors.square().sum(-2).flatten()


def _metric(weights: Sequence[float], covariances: Sequence[Covariance], asked: Asked, name: str) -> Whitening:
    """Factorise the average of some retain covariances, damped."""
    only = covariances[0]
    if len(covariances) == 1 and isinstance(only, torch.Tensor):
        return Whitening.of(only, asked.damping, name, asked.excess)
    return Whitening.of_unit(average(weights, covariances), asked.damping, name)


def _spanning(weights: Sequence[float], covariances: Sequence[Covariance]) -> torch.Tensor | None:
    """Return W (d, k) with W Wᵀ the average of covariances (see `average`), when there are few directions in all of them."""
    parts = []
    for weight, covariance in zip(weights, covariances, strict=True):
        part = spanning_factor(covariance) if covariance.dim() < 3 else None
        if part is None:
            return None
        parts.append(part * (weight / sum(weights) * mean_scale(covariance)) ** 0.5)
    whole = torch.cat(parts, 1)
    return whole if whole.shape[1] < len(whole) // 2 else None


def _along(metric: Whitening, w: torch.Tensor) -> _Solved:
    """Diagonalise R, factorised, and F = W Wᵀ, W (d, n), where F is not zero: a filter leaves all else as it is.

    With Z = R⁻¹W the directions are X = Z·V and the coordinates of a vector VᵀWᵀ times it, V (n, k): what is mixed is small.
    """
    white = metric.whiten(w)
    ratios, mixing = torch.linalg.eigh(gram(white.contiguous()))
    real = ratios > NEGLIGIBLE * ratios[-1:].clamp(min=0)
    if not bool(real.any()):  # F is zero: one direction that is none, for an operator of no rows would be the identity
        none = w.new_zeros(len(w), 1)
        return _Solved(SideBasis(none.T, none), none[0], mixing=none.new_ones(1, 1))
    ratios = ratios[real].flip(0)
    return _Solved(SideBasis(w.T, metric.unwhiten(white)), ratios, mixing=mixing[:, real].flip(1) * ratios.rsqrt())


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
