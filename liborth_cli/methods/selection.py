"""From an amount and scores to what is kept of each coordinate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from liborth_cli.errors import UsageError
from liborth_cli.linalg.noise import optimal_threshold
from liborth_cli.linalg.truncated import energy
from liborth_cli.methods.method import Amount, Basis

PIECE = 1 << 18


@dataclass(frozen=True)
class AmountKind:
    """One way to say how much.

    Attributes:
        meaning: what the number is.
        low: smallest value allowed, or None when the kind takes no number.
        high: largest value allowed.
    """

    meaning: str
    low: float | None = None
    high: float = math.inf


AMOUNTS = {
    "rank": AmountKind("the K leading singular directions of each matrix", 1),
    "energy": AmountKind("the fewest coordinates that hold this share of the squared norm", 0.0, 1.0),
    "noise-edge": AmountKind("the singular values above the noise, each matrix its own number"),
    "density": AmountKind("this share of the coordinates", 0.0, 1.0),
    "scale": AmountKind("everything, multiplied by this factor", 0.0, 1.0),
}


def check(amount: Amount) -> None:
    """Raise UsageError when the amount's number is outside what its kind allows."""
    kind = AMOUNTS[amount.kind]
    if kind.low is None:
        return
    if amount.value is None or not kind.low <= amount.value <= kind.high:
        raise UsageError(f"--{amount.kind} takes a number from {kind.low:g} to {kind.high:g}, not {amount.value}")


def select(amount: Amount, basis: Basis, scores: torch.Tensor, shape: tuple[int, int], total: float) -> torch.Tensor | float:
    """Decide how much of each coordinate the leading part keeps.

    Args:
        amount: how much.
        basis: the decomposed update.
        scores: from the method, non-negative, same shape as the coefficients.
        shape: (d_out, d_in) of the matrix.
        total: ‖U‖².

    Returns:
        A mask of the coefficients' shape (True: kept), or one factor for all of them. Equal scores fall on the same side.
    """
    if amount.kind == "scale":
        return float(amount.value or 0.0)
    if amount.kind == "noise-edge":
        return scores > optimal_threshold(scores, shape)
    if amount.kind == "rank":
        return torch.arange(len(scores), device=scores.device) < int(amount.value or 0)
    if amount.kind == "density":
        return scores >= _threshold(scores, None, math.ceil((amount.value or 0.0) * scores.numel()))
    return scores >= _threshold(scores, basis.coefficients, (amount.value or 0.0) * total)


def kept_energy(basis: Basis, keep: torch.Tensor | float) -> float:
    """Return the energy of the leading part, Σ (keep·C)²."""
    if not isinstance(keep, torch.Tensor):
        return keep * keep * energy(basis.coefficients)
    flat, mask = basis.coefficients.reshape(-1), keep.reshape(-1)
    return math.fsum(energy(c * m) for c, m in zip(flat.split(PIECE), mask.split(PIECE), strict=True))


def _threshold(scores: torch.Tensor, coefficients: torch.Tensor | None, goal: float) -> float:
    """Find the largest t such that the coordinates with score ≥ t reach the goal.

    Non-negative floats are ordered like the integers that share their bits, so bisecting on the bits finds t exactly,
    in 31 (or 63) passes that allocate nothing. Sorting would need three times the matrix.

    Args:
        scores: non-negative, any shape.
        coefficients: their squares are counted; None counts the coordinates themselves.
        goal: energy or count to reach.
    """
    wide = scores.dtype == torch.float64
    integers = torch.int64 if wide else torch.int32
    pieces = scores.reshape(-1).split(PIECE)
    weights = pieces if coefficients is None else coefficients.reshape(-1).split(PIECE)

    def to_float(bits: int) -> float:
        return torch.tensor(bits, dtype=integers).view(scores.dtype).item()

    def reaches(t: float) -> bool:
        if coefficients is None:
            return sum(int((s >= t).sum()) for s in pieces) >= goal
        return math.fsum(energy(w[s >= t]) for s, w in zip(pieces, weights, strict=True)) >= goal * (1 - 1e-12)

    if goal <= 0:
        return math.inf
    low, high = 0, (0x7FF0 << 48 if wide else 0x7F80 << 16)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reaches(to_float(middle)) else (low, middle)
    return to_float(low)
