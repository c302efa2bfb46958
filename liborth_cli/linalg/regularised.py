"""Least squares that many single tokens pull at, with a proven distance from the minimum.

    min over Δ of  f(Δ) = ‖Δ‖² + λ·‖y − BΔ‖²,    Δ = Bᵀ(K + I/λ)⁻¹y,    K = BBᵀ

B is a `KhatriRao` of one weight matrix, or several, one a matrix, that see the same tokens: Δ then has a part for each and K
is the sum of their kernels. Preconditioned CGLS (Björck 1996, 7.4) needs products alone: cost and memory are linear in T.
scipy.sparse.linalg.lsqr has the plain one, in float64, and stops by other tests. The preconditioner is the same problem for
the heaviest tokens alone, those with the largest K_tt, solved exactly by a Cholesky factorisation of their kernel: few tokens
hold much of the trace, and with a twentieth of them the steps were halved (docs/log.md). Where they are all, one step is exact.

What is certified: with e = y − BΔ and α = λe the dual function d(α) = 2αᵀy − ‖Bᵀα‖² − ‖α‖²/λ is below min f, and
f(Δ) − d(α) = ‖R‖² with R = λBᵀe − Δ, the residual that every step computes. `gap` is that over d(α).

How to use it, for whitened tokens of several matrices (K + μI with μ = 1/λ; min f is also yᵀ(K + μI)⁻¹y):

    terms = [KhatriRao(gradients, inputs), …]
    found = solve(terms, y, strength=1 / mu, tolerance=1e-3)
    found.parts, found.gap                              # the Δ of every matrix, (m, n)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from liborth_cli.linalg.khatri_rao import KhatriRao

MOST_STEPS = 400
"""Steps after which the answer is taken as it is, with its gap."""
EXACT_UP_TO = 1024
"""Tokens that are all among the heaviest."""
HEAVIEST, MOST_HEAVY = 8, 4096
"""One token in so many is among the heaviest; and how many are at most."""
FEW_STEPS = 14
"""Steps that more tokens take where they take few (docs/log.md); they are in float32, a factorisation costs twice that."""

Parts = list[torch.Tensor]


@dataclass(frozen=True)
class Solution:
    """A minimiser.

    Attributes:
        parts: Δ, one (m, n) for each matrix.
        gap: (f(Δ) − d) / d for a proven lower bound d of min f; at least (f(Δ) − min f) / min f.
        steps: how many products with K it took.
    """

    parts: Parts
    gap: float
    steps: int


def solve(
    terms: Sequence[KhatriRao], y: torch.Tensor, strength: float, tolerance: float = 1e-3, most: int = MOST_STEPS
) -> Solution:
    """Minimise f.

    Args:
        terms: B, one for each matrix, all of the same tokens; their dtype is that of the products.
        y: (T,).
        strength: λ ≥ 0.
        tolerance: of the gap.
        most: steps after which to stop all the same; look at `gap`.
    """
    error = y.double()
    parts = [term.left.new_zeros(term.shape) for term in terms]
    residual = _combined(terms, strength * error)
    heavy: _Heaviest | None = None
    steps, gap, before, direction = 0, math.inf, 0.0, parts
    for steps in range(most + 1):
        left = _dot(residual, residual)
        dual = _dot(parts, parts) + strength * float(error @ error) - left
        gap = left / dual if dual > 0 else math.inf if left > 0 else 0.0
        if gap <= tolerance or steps == most:
            break
        heavy = heavy or _Heaviest.of(terms, strength)
        better = heavy.applied(residual)
        now = _dot(residual, better)
        direction = better if steps == 0 else [b + p.mul_(now / before) for b, p in zip(better, direction, strict=True)]
        felt = _felt(terms, direction).double()
        length = now / (_dot(direction, direction) + strength * float(felt @ felt))
        parts = [d.add_(p, alpha=length) for d, p in zip(parts, direction, strict=True)]
        error = error - length * felt
        residual = [r.sub_(d) for r, d in zip(_combined(terms, strength * error), parts, strict=True)]
        before = now
    return Solution(parts, gap, steps)


def kernel_work(tokens: int, shape: tuple[int, int]) -> float:
    """Return the multiplications of a Cholesky factorisation of K, and of making it, for tokens of one matrix (m, n)."""
    return tokens**2 * (sum(shape) + tokens / 3)


def is_factorised(tokens: int, shape: tuple[int, int]) -> bool:
    """Tell whether `dual` is the way for tokens of one matrix: they are few, or it takes less time than `solve` does."""
    steps = FEW_STEPS * 2 * (tokens + EXACT_UP_TO) * shape[0] * shape[1]
    return tokens <= EXACT_UP_TO or (tokens <= MOST_HEAVY and 2 * kernel_work(tokens, shape) <= steps)


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
class _Heaviest:
    """The problem's own operator I + λΣ_S g_t a_tᵀ(·) for the tokens S with the largest K_tt, inverted.

    Attributes:
        terms: the rows of B for S.
        lower: the Cholesky factor of K_SS + I/λ, float64.
    """

    terms: Sequence[KhatriRao]
    lower: torch.Tensor

    @classmethod
    def of(cls, terms: Sequence[KhatriRao], strength: float) -> _Heaviest:
        """Pick and factorise them."""
        count = len(terms[0])
        weight = sum((term.diagonal() for term in terms), start=torch.zeros(count, device=terms[0].left.device))
        most = count if count <= EXACT_UP_TO else min(max(count // HEAVIEST, EXACT_UP_TO), MOST_HEAVY)
        chosen = weight.topk(most).indices if most < count else slice(None)
        some = [KhatriRao(term.left[chosen], term.right[chosen]) for term in terms]
        kernel, *others = (term.kernel().double() for term in some)
        for other in others:
            kernel += other
        return cls(some, _factorised(kernel, strength, terms[0].left.dtype))

    def applied(self, parts: Parts) -> Parts:
        """Return (I + λΣ_S …)⁻¹ of a right-hand side, by the Woodbury identity."""
        felt = _felt(self.terms, parts).double()
        alpha = torch.cholesky_solve(felt[:, None], self.lower)[:, 0]
        return [p - c for p, c in zip(parts, _combined(self.terms, alpha), strict=True)]


def _felt(terms: Sequence[KhatriRao], parts: Parts) -> torch.Tensor:
    """Return BΔ, (T,)."""
    felt = [term.along(part) for term, part in zip(terms, parts, strict=True)]
    return torch.stack(felt).sum(0) if len(felt) > 1 else felt[0]


def _combined(terms: Sequence[KhatriRao], v: torch.Tensor) -> Parts:
    """Return Bᵀv, a part for each matrix."""
    return [term.combine(v) for term in terms]


def _dot(a: Parts, b: Parts) -> float:
    """Return Σ⟨a, b⟩, summed in float64."""
    pairs = ((p.reshape(-1).split(1 << 20), q.reshape(-1).split(1 << 20)) for p, q in zip(a, b, strict=True))
    return math.fsum(float(torch.dot(x.double(), y.double())) for p, q in pairs for x, y in zip(p, q, strict=True))
