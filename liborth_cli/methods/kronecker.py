"""Curvature as Kronecker products G ⊗ A: bases that are a product of two sides, sums of products, and what makes a side.

A sum of Kronecker products, one for each use of a tied matrix or each set of forget data, is none itself. Its *basis* is taken
from factors averaged side by side, and its *values* are the exact diagonal of the sum in that basis: what EK-FAC (arXiv
1806.03884) does for one product. With one term, or terms that commute, nothing is lost (docs/decisions/0020).

Covariances too wide to diagonalise: with R = L Lᵀ exact (a Cholesky factorisation), M = L⁻¹ F L⁻ᵀ ≈ Y Θ Yᵀ + δ (I − Y Yᵀ): the
leading eigenpairs by block Krylov iteration, which never forms M, and the mean of the others. Shortening R and F themselves
does not work: the filter divides by the small eigenvalues of R, and an error of 1 % of ‖R‖ moved 80 % of what was removed
(docs/decisions/0022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch

from liborth_cli.curvature.layer import (
    Covariance,
    Eigenbasis,
    KroneckerFactors,
    SampledFactors,
    eigenbasis,
    quadratic,
    trace,
)
from liborth_cli.linalg.krylov import krylov_basis
from liborth_cli.linalg.rows import Samples, ThinProduct
from liborth_cli.methods.selection import Facts, Keep, kept
from liborth_cli.methods.whitening import unit

IDENTITY = torch.empty(0, dtype=torch.float64)
"""Stands for the identity wherever an operator is expected."""
DENSE_UP_TO = 8192
"""Widest factor that is diagonalised whole, unless --factor-rank says otherwise."""
DEFAULT_RANK = 512
"""Directions taken of wider ones."""
DEPTH = 8
"""Krylov blocks, each a quarter as wide as what is kept: the basis has twice as many columns."""
BLOCK = 16
"""Narrowest block."""
PROBES = 32
"""Random vectors that measure what was left out."""


class Side(Protocol):
    """A change of coordinates on one side of a matrix, for matrices (d, n)."""

    @property
    def nbytes(self) -> int: ...  # noqa: D102

    def analyse(self, matrix: torch.Tensor) -> torch.Tensor: ...  # noqa: D102

    def synthesise(self, matrix: torch.Tensor) -> torch.Tensor: ...  # noqa: D102

    def thinned(self) -> Side: ...  # noqa: D102


@dataclass(frozen=True)
class SideBasis:
    """A change of coordinates that is held as a matrix.

    Attributes:
        to: from the weight's coordinates to the basis's: (d, d); (d,) a diagonal; (blocks, d, d); empty for the identity;
            (k, d) when the basis has k directions and says nothing of the others.
        back: its inverse, in the same form, (d, k) for k directions.
    """

    to: torch.Tensor
    back: torch.Tensor

    @classmethod
    def orthonormal(cls, vectors: torch.Tensor) -> SideBasis:
        """Wrap eigenvectors given as columns: (d, d), (blocks, d, d), or empty for the identity."""
        return cls(vectors.mT if vectors.dim() > 1 else vectors, vectors)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.to.nbytes + self.back.nbytes

    @property
    def few(self) -> bool:
        """Whether there are fewer directions than the space has."""
        return self.back.dim() == 2 and self.back.shape[1] < self.back.shape[0]

    def analyse(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the coordinates of a matrix (d, n)."""
        return apply(self.to, matrix)

    def synthesise(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the matrix with these coordinates."""
        return apply(self.back, matrix)

    def thinned(self) -> SideBasis:
        """Return what `synthesise` needs, and nothing else."""
        return SideBasis(IDENTITY, self.back)


@dataclass(frozen=True)
class FrameSide:
    """Coordinates along a few directions X, and what is left of the matrix as it is: (k + d) coordinates for d.

    A filter may treat the k coordinates one by one and has to treat the d others alike; then nothing leaks.

    Attributes:
        to: what reads the k coordinates, (k, d), with to·X = I.
        back: X, (d, k).
    """

    to: torch.Tensor
    back: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.to.nbytes + self.back.nbytes

    def analyse(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return k coordinates and d that are left, (k + d, n)."""
        inside = self.to @ matrix
        return torch.cat([inside, torch.addmm(matrix, self.back, inside, alpha=-1)])

    def synthesise(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the matrix (d, n) of coordinates (k + d, n)."""
        count = self.back.shape[1]
        return torch.addmm(matrix[count:], self.back, matrix[:count])

    def thinned(self) -> FrameSide:
        """Return what `synthesise` needs, and nothing else."""
        return FrameSide(IDENTITY, self.back)


def apply(operator: Covariance, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply a matrix (d, n) from the left by an operator in one of the forms of `SideBasis`; returns (d, n) or (k, n)."""
    if isinstance(operator, Samples):
        return operator.rows.T @ (operator.rows @ matrix)
    if operator.numel() == 0:
        return matrix
    if operator.dim() == 1:
        return operator[:, None] * matrix
    if operator.dim() == 2:
        return operator @ matrix
    blocks, size, _ = operator.shape
    return (operator @ matrix.reshape(blocks, size, -1)).reshape(blocks * size, -1)


def quadratic_form(removed: torch.Tensor | ThinProduct, output: Covariance, input: Covariance) -> float:  # noqa: A002
    """Return tr(G D A Dᵀ), what the curvature A ⊗ G feels of a change D.

    Args:
        removed: D, (d_out, d_in); of D = L Rᵀ it is tr(LᵀGL·RᵀAR).
        output: G in one of a factor's forms.
        input: A likewise.
    """
    if isinstance(removed, ThinProduct):
        felt = [side.T @ apply(factor.to(side), side) for factor, side in ((output, removed.left), (input, removed.right))]
        return torch.dot(felt[0].reshape(-1), felt[1].T.reshape(-1)).item()
    left = apply(output.to(removed), removed)
    right = apply(input.to(removed), removed.T).T
    return torch.dot(left.reshape(-1), right.reshape(-1)).item()


@dataclass
class KroneckerBasis:
    """Coordinates of an update on both sides, in float64.

    Attributes:
        left: the output side.
        right: the input side.
        coefficients: C = L U Rᵀ, (d_out, d_in), float64; longer on a side that is a frame.
        dtype: of the update, and of what is rebuilt.
        facts: what to write into the manifest.
        in_place: the update is left as it is.
    """

    left: Side
    right: Side
    coefficients: torch.Tensor
    dtype: torch.dtype
    facts: Facts = field(default_factory=dict)
    in_place: bool = False

    @classmethod
    def of(cls, update: torch.Tensor, left: Side, right: Side, narrow: bool = False) -> KroneckerBasis:
        """Analyse an update (d_out, d_in); `narrow` multiplies by a left side of few directions in the update's own dtype."""
        if narrow and isinstance(left, SideBasis) and left.few:
            inside = (left.to.to(update.dtype) @ update).double()
        else:
            inside = left.analyse(update.double())
        coefficients = right.analyse(inside.T).T
        return cls(left, right, coefficients, update.dtype)

    def rebuild(self, keep: Keep) -> torch.Tensor | ThinProduct:
        """Return L⁻¹ (keep·C) R⁻ᵀ, (d_out, d_in), in the update's dtype, or in two factors when R has few directions."""
        return self.synthesised(kept(self.coefficients, keep))

    def synthesised(self, coefficients: torch.Tensor) -> torch.Tensor | ThinProduct:
        """Return the matrix with some coordinates on both sides, as `rebuild` does."""
        half = self.left.synthesise(coefficients)
        if isinstance(self.right, SideBasis) and self.right.few:
            return ThinProduct(half, self.right.back)
        return self.right.synthesise(half.T).T.to(self.dtype).contiguous()

    def thinned(self) -> KroneckerBasis:
        """Return what `rebuild` needs, and nothing else."""
        return replace(self, left=self.left.thinned(), right=self.right.thinned())


def eigenbasis_of(update: torch.Tensor, factors: Factors) -> KroneckerBasis:
    """Analyse an update in the eigenbasis Q_G ⊗ Q_A of Kronecker factors."""
    eigen = factors.basis
    left, right = SideBasis.orthonormal(eigen.gradient_vectors), SideBasis.orthonormal(eigen.input_vectors)
    return KroneckerBasis.of(update, left, right)


@dataclass(frozen=True)
class Term:
    """One Kronecker product G ⊗ A of a sum whose traces add up to 1.

    Attributes:
        share: of the sum's trace, tr G·tr A over the sum of all.
        output: G, (d_out, d_out), in any form of a factor; its own scale.
        input: A, (d_in, d_in), likewise.
        tokens: how many it was averaged over.
    """

    share: float
    output: Covariance
    input: Covariance
    tokens: float = 0.0


@dataclass(frozen=True)
class SummedFactors:
    """The curvature of a matrix that is used more than once: Σ_u A_u ⊗ G_u, all in the orientation of the first.

    Attributes:
        parts: the factors of each use.
        input_covariance: the mean of the A_u at mean eigenvalue 1, weighted by share; scaled to the sum's trace.
        gradient_covariance: the mean of the G_u at mean eigenvalue 1, weighted by share.
        second_moments: None; exact moments are not kept for what is used twice.
    """

    parts: tuple[KroneckerFactors, ...]
    input_covariance: torch.Tensor
    gradient_covariance: torch.Tensor
    second_moments: None = None

    @classmethod
    def of(cls, parts: Sequence[KroneckerFactors]) -> SummedFactors:
        """Merge the factors of several uses, all in the same orientation."""
        terms, tiny = _terms(parts), torch.finfo(torch.float64).tiny
        shares = [t.share for t in terms]
        a, g = average(shares, [t.input for t in terms]), average(shares, [t.output for t in terms])
        scale = sum(trace(p.input_covariance) * trace(p.gradient_covariance) for p in parts)
        return cls(tuple(parts), a * (scale / max(trace(a) * trace(g), tiny)), g)

    @cached_property
    def basis(self) -> Eigenbasis:
        """The eigenbasis of the merged factors."""
        return Eigenbasis(*eigenbasis(self.input_covariance), *eigenbasis(self.gradient_covariance))

    def curvature(self, kind: str = "kfac") -> torch.Tensor:
        """Return Σ_u (q_G,iᵀ G_u q_G,i)·(q_A,jᵀ A_u q_A,j), (d_out, d_in), float64: exact in the merged basis."""
        total = None
        for part in self.parts:
            rows = quadratic(_like(part.gradient_covariance, self.gradient_covariance), self.basis.gradient_vectors)
            columns = quadratic(_like(part.input_covariance, self.input_covariance), self.basis.input_vectors)
            total = torch.outer(rows, columns) + (0 if total is None else total)
        assert total is not None
        return total


Factors = KroneckerFactors | SummedFactors
"""The curvature of one matrix: of its one use, or of all its uses."""


def terms_of(factors: Factors | SampledFactors) -> list[Term]:
    """Return the Kronecker products that a curvature is the sum of."""
    return _terms(factors.parts if isinstance(factors, SummedFactors) else (factors,))


def _terms(parts: Sequence[KroneckerFactors | SampledFactors]) -> list[Term]:
    weights = [trace(p.gradient_covariance) * trace(p.input_covariance) for p in parts]
    whole = sum(weights)
    shares = [w / whole if whole > 0 else 1 / len(parts) for w in weights]
    return [Term(s, p.gradient_covariance, p.input_covariance, p.tokens) for s, p in zip(shares, parts, strict=True)]


def average(weights: Sequence[float], factors: Sequence[Covariance]) -> torch.Tensor:
    """Average factors of one side, each at mean eigenvalue 1; a diagonal among matrices becomes one of them."""
    if len(factors) == 1:
        return unit(factors[0])
    widest = max(factors, key=lambda factor: factor.dim())
    total = sum(w * _like(unit(f), widest) for w, f in zip(weights, factors, strict=True)) / sum(weights)
    assert isinstance(total, torch.Tensor)
    return total


def _like(factor: torch.Tensor, other: Covariance) -> torch.Tensor:
    return torch.diag(factor) if factor.dim() == 1 and other.dim() == 2 else factor


@dataclass(frozen=True)
class LowRank:
    """A symmetric positive operator M on d coordinates, in short.

    Attributes:
        values: Θ, descending, (k,), float64.
        vectors: Y, orthonormal columns, (d, k).
        rest: δ, taken for every other direction.
        error: ‖M − (YΘYᵀ + δ(I − YYᵀ))‖_F / ‖M‖_F, measured on random vectors.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    rest: float
    error: float


def rank_for(factor: Covariance, asked: int | None) -> int | None:
    """Decide how many directions of a factor to take; None for all of them.

    Args:
        factor: in any form; only matrices (d, d) are ever shortened.
        asked: the user's number, for every matrix more than four times as wide; None leaves it to `DENSE_UP_TO`.
    """
    if factor.dim() != 2:
        return None
    if asked is None:
        return DEFAULT_RANK if len(factor) > DENSE_UP_TO else None
    return asked if len(factor) > 4 * asked else None


def low_rank(multiply: Callable[[torch.Tensor], torch.Tensor], size: int, rank: int, device: torch.device) -> LowRank:
    """Shorten an operator.

    Args:
        multiply: (d, n) → M·(d, n), float64.
        size: d.
        rank: k.
        device: where `multiply` computes.
    """
    draw = torch.Generator().manual_seed(0)
    block = min(max(-(-rank // 4), BLOCK), size // DEPTH)
    x = torch.randn(size, block, generator=draw, dtype=torch.float64).to(device)
    basis, image = krylov_basis(multiply, x, DEPTH)
    small = basis.T @ image
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    values, y = values.flip(0)[:rank].clamp(min=0), basis @ rotation.flip(1)[:, :rank]

    def outside(z: torch.Tensor) -> torch.Tensor:
        return z - y @ (y.T @ z)

    probes = outside(torch.randn(size, PROBES, generator=draw, dtype=torch.float64).to(device))
    seen = outside(multiply(probes))
    length = float(probes.square().sum())
    rest = max(float((probes * seen).sum()) / length, 0.0)
    count = size - rank
    missed = float((seen - rest * probes).square().sum()) / length * count
    whole = float(values.square().sum()) + float(seen.square().sum()) / length * count
    return LowRank(values, y, rest, math.sqrt(missed / whole) if whole else 0.0)
