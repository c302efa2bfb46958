"""(K + μI)α = y for a positive K that can only be multiplied with, for every μ at once, and how far from exact.

K and K + μI have the same Krylov spaces, so one Lanczos run from y serves every μ: with V the basis and T = VᵀKV tridiagonal,
α_μ = V (T + μI)⁻¹ e₁ ‖y‖ is what conjugate gradients would reach in as many steps (Paige & Saunders 1975; for many shifts
Frommer & Maass 1999). scipy.sparse.linalg.cg solves for one μ at a time.

What is certified is the regularised least-squares problem that such a system is the dual of. With K = B Bᵀ and y = B u,

    f(x) = ‖x − u‖² + ‖B x‖²/μ,    d(α) = 2αᵀy − αᵀKα − μ‖α‖²,    d(α) ≤ min f,

and x = u − Bᵀα has f(x) − d(α) = ‖r‖²/μ with r = y − (K + μI)α. So the residual, which Lanczos knows without looking, bounds
how far the objective at x is from its minimum: `gap`, relative to d(α).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

MOST_STEPS = 400
"""Products with K after which the answer is taken as it is, with its gap."""
EXHAUSTED = 1e-12
"""A next vector shorter than this share of K's scale is rounding: the space holds all of y that K feels."""


@dataclass(frozen=True)
class Shifted:
    """Solutions of (K + μI)α = y for every μ.

    Attributes:
        basis: V, orthonormal columns, (T, k), float64.
        nodes: θ, descending, (k,): Ritz values of K.
        rotation: S with VᵀKV = S diag(θ) Sᵀ, (k, k).
        first: Sᵀe₁‖y‖, (k,): y along the Ritz vectors.
        beyond: the length of what the next step would have added to the space; 0 when nothing is left.
    """

    basis: torch.Tensor
    nodes: torch.Tensor
    rotation: torch.Tensor
    first: torch.Tensor
    beyond: float

    def solution(self, shift: float) -> torch.Tensor:
        """Return α, (T,), float64, for μ = shift."""
        return self.basis @ (self.rotation @ (self.first / (self.nodes + shift)))

    def gap(self, shift: float) -> float:
        """Return (f(x) − d(α)) / d(α) ≥ (f(x) − min f) / min f for μ = shift; see the head of this file."""
        inside = self.first / (self.nodes + shift)
        value = float(inside @ self.first)
        residual = self.beyond * float(self.rotation[-1] @ inside) if len(inside) else 0.0
        return residual * residual / shift / value if value > 0 else 0.0


def solve_shifted(
    product: Callable[[torch.Tensor], torch.Tensor],
    y: torch.Tensor,
    smallest_shift: float,
    tolerance: float,
    most: int = MOST_STEPS,
) -> Shifted:
    """Run Lanczos from y until the smallest shift is solved, and with it every larger one.

    Every vector is kept and each new one made orthogonal to all, twice: T·k numbers, beside which a product costs far more.

    Args:
        product: v ↦ K v, both (T,), float64; it may compute in float32.
        y: (T,), float64.
        smallest_shift: μ > 0 for which `gap` must reach the tolerance.
        tolerance: of `gap`.
        most: products after which to stop all the same; look at `gap`.
    """
    size, length = len(y), float(y.norm())
    rows, vector = y.new_empty(0, size), y / length if length else y
    diagonal, off = list[float](), list[float]()
    # Of (T + μI) = L D Lᵀ for the smallest μ: the next entry of D, of L⁻¹e₁, and e₁ᵀ(T + μI)⁻¹e₁ so far.
    pivot, entry, value = 0.0, 1.0, 0.0
    for step in range(min(most, size) if length else 0):
        if step == len(rows):
            rows = torch.cat([rows, rows.new_empty(min(max(step, 16), most - step), size)])
        rows[step] = vector
        done, image = rows[: step + 1], product(vector)
        diagonal.append(float(vector @ image))
        for _ in range(2):
            image = image - done.T @ (done @ image)
        off.append(float(image.norm()))
        pivot = diagonal[-1] + smallest_shift - (off[-2] ** 2 / pivot if step else 0.0)
        value += entry * entry / pivot
        if off[-1] <= EXHAUSTED * max(diagonal):
            off[-1] = 0.0
        if (off[-1] * entry / pivot) ** 2 / smallest_shift <= tolerance * value:
            break
        entry *= -off[-1] / pivot
        vector = image / off[-1]
    count = len(diagonal)
    nodes, rotation = np.linalg.eigh(np.diag(diagonal) + np.diag(off[: count - 1], 1) + np.diag(off[: count - 1], -1))
    ritz, turn = (torch.from_numpy(x[..., ::-1].copy()).to(y) for x in (nodes, rotation))
    return Shifted(rows[:count].T, ritz.clamp(min=0), turn, turn[:1].sum(0) * length, off[-1] if off else 0.0)
