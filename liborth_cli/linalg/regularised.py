"""Least squares that many single tokens pull at, with a proven distance from the minimum.

    min over Δ of  f(Δ) = ‖Δ‖² + λ·‖y − BΔ‖²,    Δ = Bᵀα,    (K + I/λ) α = y,    K = BBᵀ

B is the `KhatriRao` of one weight matrix. The system among the tokens is solved by preconditioned conjugate gradients (Björck
1996, 7.4), which needs products with B and Bᵀ alone: cost and memory are linear in T. What token t feels of its own step, K_tt,
differs from token to token by orders of magnitude, a token taken at several points of the path is nearly the same at each, and
many share a few directions. So the preconditioner is K among the tokens that are copies of each other, block by block, and what
lies in the leading directions of both sides together, as a matrix of T × `SHARED` (docs/decisions/0058).

What is certified: with the residual r = y − (K + I/λ)α the dual function d(α) = αᵀ(y + r) is below min f, and
f(Bᵀα) − d(α) = λ‖r‖². `gap` is that over d(α), by products in the precision of the tokens; steps may be in bfloat16, and go on
from the exact residual where that says so (iterative refinement, Carson & Higham 2018). The residual of conjugate gradients
jumps, though the iterate gets better; the certified one is the shortest between each iterate and the last such
(minimal residual smoothing, Zhou & Walker 1994).

How to use it, for whitened tokens (min f is also yᵀ(K + I/λ)⁻¹y):

    found = solve(KhatriRao(gradients, inputs), y, strength=λ, tolerance=5e-3)
    found.part, found.gap                               # Δ, (m, n)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from liborth_cli.linalg.eigen import leading_eigh
from liborth_cli.linalg.khatri_rao import PIECE, KhatriRao
from liborth_cli.linalg.krylov import block_krylov

MOST_STEPS = 400
"""Steps after which the answer is taken as it is, with its gap."""
EXACT_UP_TO = 1024
"""Tokens whose kernel is factorised, whatever the matrix."""
MOST_FACTORISED = 4096
"""Tokens whose kernel is factorised where the matrix is large enough."""
FEW_STEPS = 9
"""Products with K that more tokens take where they take few, in float32; a factorisation costs twice that."""
PATIENCE = 8
"""Steps in bfloat16 in which the residual has to be halved: where it is not, rounding is what is left."""
SHARED = 128
"""Pairs of leading directions that the preconditioner knows."""
SAMPLE = 8192
"""Tokens that the leading directions are found from."""


@dataclass(frozen=True)
class Solution:
    """A minimiser.

    Attributes:
        part: Δ, (m, n).
        gap: (f(Δ) − d) / d for a proven lower bound d of min f; at least (f(Δ) − min f) / min f; infinite where none was found.
        steps: how many products with K it took, those of the certificate not counted.
    """

    part: torch.Tensor
    gap: float
    steps: int


def solve(
    rows: KhatriRao, y: torch.Tensor, strength: float, tolerance: float = 5e-3, parts: int = 1, most: int = MOST_STEPS
) -> Solution:
    """Minimise f.

    Args:
        rows: B; its dtype is that of the certificate, and of the steps where nothing narrower is fast.
        y: (T,).
        strength: λ ≥ 0.
        tolerance: of the gap.
        parts: of equal length that the tokens come in. Where the n-th tokens of all parts are alike, it takes fewer steps.
        most: steps after which to stop all the same; look at `gap`.
    """
    y = y.double()
    if strength == 0 or not bool(y.any()):
        return Solution(rows.left.new_zeros(rows.shape), 0.0, 0)
    size = float(y.norm())
    y = y / size  # squares of what a small update leaves are no numbers any more
    quick = rows.narrowed()
    near = _Near.of(rows, strength, parts)
    alpha, residual, gap, steps = torch.zeros_like(y), y, math.inf, 0
    while True:
        # Rounding adds to what the steps leave of the residual.
        aim, patience = (tolerance, most) if quick is rows else (0.9 * tolerance, PATIENCE)
        alpha, taken = _descend(quick, near, (alpha, residual, y), strength, aim, (most - steps, patience))
        steps += taken
        part = rows.combine(alpha)
        residual = y - rows.along(part).double() - alpha / strength
        before, gap = gap, _gap(alpha, residual, y, strength)
        if gap <= tolerance or steps >= most or (quick is rows and not taken):
            return Solution(part * size, gap, steps)
        if not gap < before / 2:
            quick = rows


def _descend(
    rows: KhatriRao,
    near: _Near,
    start: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    strength: float,
    aim: float,
    most: tuple[int, int],
) -> tuple[torch.Tensor, int]:
    """Go on from an α until the gap is as small as asked by what the steps themselves say of it.

    Args:
        rows: B.
        near: the preconditioner.
        start: α, its residual, and y.
        strength: λ.
        aim: of the gap.
        most: steps, and steps in which the residual is not halved.

    Returns:
        The α with the shortest residual, (T,), and how many products with K it took.
    """
    alpha, residual, y = start
    best, shortest = alpha, residual
    steps, since, length = 0, 0, float(residual.norm())
    direction, before = None, 0.0
    while steps < most[0] and steps - since < most[1] and _gap(best, shortest, y, strength) > aim:
        better = near.solve(residual)
        now = float(residual @ better)
        direction = better if direction is None else better + direction * (now / before)
        felt = rows.along(rows.combine(direction)).double() + direction / strength
        curved = float(direction @ felt)
        if not (now > 0 and curved > 0):  # rounding is all there is
            break
        far = now / curved
        alpha, residual, before = alpha + far * direction, residual - far * felt, now
        off = residual - shortest
        share = -float(shortest @ off) / max(float(off @ off), torch.finfo(torch.float64).tiny)
        best, shortest = best + share * (alpha - best), shortest + share * off
        steps += 1
        if float(shortest.norm()) < length / 2:
            since, length = steps, float(shortest.norm())
    return best, steps


def _gap(alpha: torch.Tensor, residual: torch.Tensor, y: torch.Tensor, strength: float) -> float:
    """Return (f − d)/d at Δ = Bᵀα; infinite where d is not positive."""
    lower = float(alpha @ (y + residual))
    return strength * float(residual @ residual) / lower if lower > 0 else math.inf


def kernel_work(tokens: int, shape: tuple[int, int]) -> float:
    """Return the multiplications of a Cholesky factorisation of K, and of making it, for tokens of one matrix (m, n)."""
    return tokens**2 * (sum(shape) + tokens / 3)


def is_factorised(tokens: int, shape: tuple[int, int]) -> bool:
    """Tell whether `dual` is the way for tokens of one matrix: they are few, or it takes less time than `solve` does."""
    steps = FEW_STEPS * 2 * tokens * shape[0] * shape[1]
    return tokens <= EXACT_UP_TO or (tokens <= MOST_FACTORISED and 2 * kernel_work(tokens, shape) <= steps)


def dual(kernel: torch.Tensor, y: torch.Tensor, strength: float) -> torch.Tensor:
    """Return α = (K + I/λ)⁻¹y, (T,), float64, by a Cholesky factorisation of K: for few tokens; Δ = Bᵀα.

    Args:
        kernel: K, (T, T), float64; overwritten.
        y: (T,).
        strength: λ ≥ 0.
    """
    if strength == 0:
        return torch.zeros_like(y, dtype=torch.float64)
    return torch.cholesky_solve(y.double()[:, None], _factorised(kernel, strength, kernel.dtype))[:, 0]


def _factorised(kernel: torch.Tensor, strength: float, rounded: torch.dtype) -> torch.Tensor:
    """Return the Cholesky factor of K + I/λ, (T, T), float64; K is overwritten, and was computed in `rounded`."""
    # Cholesky's own rounding must not decide whether a kernel without full rank passes for positive.
    largest = float(kernel.diagonal().max()) if len(kernel) else 0.0
    least = 8 * torch.finfo(rounded).eps * largest * len(kernel) ** 0.5
    kernel.diagonal().add_(max(1 / strength, least))
    return torch.linalg.cholesky(kernel)


@dataclass(frozen=True)
class _Near:
    """A matrix close to K + I/λ that is easily inverted: D + WWᵀ.

    Attributes:
        inverse: of the blocks of D, (T/parts, parts, parts), float64: those of K + I/λ, less those of WWᵀ.
        shared: W, (T, pairs): what each token feels along pairs of leading directions.
        lower: the Cholesky factor of I + WᵀD⁻¹W, float64.
    """

    inverse: torch.Tensor
    shared: torch.Tensor
    lower: torch.Tensor

    @classmethod
    def of(cls, rows: KhatriRao, strength: float, parts: int) -> _Near:
        """Find the pairs of directions, one of each side, along which the tokens are largest, each in units of √(K_tt + 1/λ).

        Args:
            rows: B.
            strength: λ.
            parts: of equal length; a block is of the n-th tokens of all.
        """
        blocks = rows.blocks(parts)
        own = blocks.diagonal(dim1=1, dim2=2)
        own += 1 / strength
        size = own.T.reshape(-1, 1).rsqrt().to(rows.left)
        left, right, size = (x[:: -(-len(rows) // SAMPLE)] for x in (rows.left, rows.right, size))
        (of_left, on_left), (of_right, on_right) = _leading(left * size, right), _leading(right * size, left)
        count = min(SHARED, len(rows) // 8, len(of_left) * len(of_right))
        pairs = torch.outer(of_left, of_right).flatten().topk(count).indices
        shared = _along(rows.left, on_left, pairs // len(of_right)) * _along(rows.right, on_right, pairs % len(of_right))
        own *= 1 + 1e-3  # rounded, what is shared may be all of a token, or more
        inner = torch.eye(count, dtype=torch.float64, device=shared.device)
        pieces = zip(blocks.split(PIECE), *(part.split(PIECE) for part in shared.split(len(blocks))), strict=True)
        for mine, *parts_of in pieces:
            some = torch.stack(parts_of, 1).double()
            mine.copy_(torch.linalg.inv(mine - some @ some.mT))
            inner += some.flatten(0, 1).T @ (mine @ some).flatten(0, 1)
        return cls(blocks, shared, torch.linalg.cholesky(inner))

    def solve(self, r: torch.Tensor) -> torch.Tensor:
        """Return (D + WWᵀ)⁻¹r, (T,), float64, by the Woodbury identity.

        Where tokens are many times the same, next to nothing is left of the difference: in float32 it would not be positive.
        """
        scaled, pieces = self._alone(r), self.shared.split(PIECE)
        felt = torch.stack([w.double().T @ s for w, s in zip(pieces, scaled.split(PIECE), strict=True)]).sum(0)
        inner = torch.cholesky_solve(felt[:, None], self.lower)[:, 0]
        return scaled - self._alone(torch.cat([w.double() @ inner for w in pieces]))

    def _alone(self, r: torch.Tensor) -> torch.Tensor:
        """Return D⁻¹r, (T,)."""
        count, parts = self.inverse.shape[:2]
        return (self.inverse @ r.view(parts, count).T[..., None])[..., 0].T.flatten()


def _leading(side: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return leading eigenvalues and eigenvectors of Σ‖b_t‖² a_t a_tᵀ, (count,) and (d, count); a (T, d), b the other side.

    A GPU has no solver for some pairs of many: of a wide side it finds directions that are about the leading ones, which is all
    that a preconditioner needs.
    """
    heavy = side * torch.linalg.vector_norm(other, dim=1)[:, None]
    count = min(side.shape[1], SHARED // 2)
    if side.device.type != "cpu" and side.shape[1] >= 4 * count:
        found = block_krylov(heavy.T @ heavy, count, count + count // 4, 2, torch.Generator().manual_seed(0))
        values, vectors = found.values.to(side.dtype), found.vectors
    else:
        values, vectors = leading_eigh(heavy.T @ heavy, count)
    return values.clamp_min(0), vectors


def _along(side: torch.Tensor, vectors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return what each token has along some of the leading vectors, (T, len(chosen)); one may be chosen more than once."""
    return (side @ vectors[:, : int(chosen.max()) + 1])[:, chosen]
