"""From an amount and scores to what is kept of each coordinate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from liborth_kernels.filter import filter_coefficients

from liborth_cli.linalg.noise import optimal_threshold
from liborth_cli.linalg.rows import ThinProduct
from liborth_cli.linalg.truncated import energy
from liborth_cli.methods.amount import Amount

WHOLE = ("scale", "steps", "epochs")
"""Amounts that treat all coordinates alike."""
PIECE = 1 << 18
"""Scores looked at together: small enough for the cache."""
DIGIT = 16
"""Bits of a score looked at together."""
Facts = dict[str, float | int | str]
"""What a method tells of one decomposition: rank, certificate, route."""


@dataclass(frozen=True)
class Filter:
    """How much of each coefficient a soft or hard filter keeps, not yet multiplied out.

    Attributes:
        ratios: ρ, non-negative, shaped like the coefficients.
        strength: λ.
        hard: cut in place of λρ/(1 + λρ).
    """

    ratios: torch.Tensor
    strength: float
    hard: bool


Keep = torch.Tensor | float | Filter
"""How much of each coefficient is kept: factors in [0, 1] that broadcast to the coefficients, or a filter."""


def kept(coefficients: torch.Tensor, keep: Keep) -> torch.Tensor:
    """Return the kept part of the coefficients."""
    if isinstance(keep, Filter):
        return filter_coefficients(coefficients, keep.ratios, keep.strength, keep.hard)
    return coefficients * keep


@dataclass(frozen=True)
class Felt:
    """What curvature feels of a part of an update, in nats a token.

    Attributes:
        dimension: (Σσ²)²/Σσ⁴ of the part.
        retain_cost: ½ tr(G D A Dᵀ) of the retain data.
        forget_gain: likewise of each set of forget data.
    """

    dimension: float
    retain_cost: float
    forget_gain: list[float]


class Basis(Protocol):
    """Coordinates of one update.

    Attributes:
        coefficients: C, any shape; their squares sum to the energy they hold.
        facts: what to write about this decomposition into the manifest.
        in_place: whether `rebuild` uses up the update; then the squares of C are energies.
    """

    coefficients: torch.Tensor
    facts: Facts
    in_place: bool

    def rebuild(self, keep: Keep) -> torch.Tensor | ThinProduct:
        """Return Σ keep·C over the basis, (d_out, d_in); may reuse the update's storage where `in_place` says so."""
        ...


@runtime_checkable
class Feeling(Protocol):
    """A basis that knows among its coordinates what curvature feels."""

    def felt(self, keep: Keep) -> Felt | None:
        """Return what is felt of Σ keep·C over the basis; None where that is no less work than from the part itself."""
        ...


@runtime_checkable
class Thinning(Protocol):
    """A basis that holds more than `rebuild` needs."""

    def thinned(self) -> Basis:
        """Return what `rebuild` needs for any amount, and nothing else; it gives the same bits."""
        ...


@dataclass
class ElementBasis:
    """The coordinates are the matrix's own elements, (d_out, d_in), scaled where they lie."""

    coefficients: torch.Tensor
    facts: Facts = field(default_factory=dict)
    in_place: bool = True

    def rebuild(self, keep: Keep) -> torch.Tensor:
        """Scale the elements in place."""
        assert not isinstance(keep, Filter)
        return self.coefficients.mul_(keep)


def select(amount: Amount, basis: Basis, scores: torch.Tensor, shape: tuple[int, int], total: float) -> Keep:
    """Decide how much of each coordinate the leading part keeps.

    Args:
        amount: how much.
        basis: the decomposed update.
        scores: from the method, non-negative, same shape as the coefficients.
        shape: (d_out, d_in) of the matrix.
        total: ‖U‖².

    Returns:
        A mask of the coefficients' shape (True: kept), a filter, or one factor for all. Equal scores fall on the same side.
    """
    if amount.kind in WHOLE:
        return float(amount.value or 0.0) if amount.kind == "scale" else 1.0
    if amount.kind == "noise-edge":
        return scores > optimal_threshold(scores, shape)
    if amount.kind == "rank":
        return torch.arange(len(scores), device=scores.device) < int(amount.value or 0)
    value = amount.value or 0.0
    if amount.kind == "threshold":
        return scores >= value
    if amount.kind == "strength":
        return Filter(scores, value, amount.hard)
    pieces = scores.reshape(-1).split(PIECE)
    if amount.kind == "density":
        return scores >= _threshold(pieces, lambda _: None, math.ceil(value * scores.numel()))
    if amount.kind == "mass":
        mass = math.fsum(piece.sum(dtype=torch.float64).item() for piece in pieces)
        return scores >= _threshold(pieces, lambda i: pieces[i].double(), value * mass)
    coordinates = basis.coefficients.reshape(-1).split(PIECE)
    return scores >= _threshold(pieces, lambda i: coordinates[i].double().square(), value * total)


def kept_energy(basis: Basis, keep: Keep) -> float:
    """Return the energy of the leading part, Σ (keep·C)², of a basis in which squares of C are energies."""
    assert not isinstance(keep, Filter)
    if not isinstance(keep, torch.Tensor):
        return keep * keep * energy(basis.coefficients)
    flat, mask = basis.coefficients.reshape(-1), keep.reshape(-1)
    return math.fsum(energy(c * m) for c, m in zip(flat.split(PIECE), mask.split(PIECE), strict=True))


def _threshold(pieces: Sequence[torch.Tensor], counts: Callable[[int], torch.Tensor | None], goal: float) -> float:
    """Find the largest t such that the coordinates with score ≥ t reach the goal.

    Non-negative floats are ordered like the integers that share their bits: what is above each value of the first sixteen
    bits is one histogram, and those that share the right ones are told apart by the next sixteen. Two looks at float32
    scores, four at float64, that allocate no more than a piece; sorting would need three times the matrix.

    Args:
        pieces: the scores, non-negative, flat, cut into pieces.
        counts: what each coordinate of a piece counts, float64, by the number of the piece; None: 1.
        goal: what they have to reach together.
    """
    if goal <= 0:
        return math.inf
    kind = pieces[0].dtype
    integers, width = (torch.int64, 64) if kind == torch.float64 else (torch.int32, 32)
    found, above = 0, 0.0
    for shift in range(width - DIGIT, -1, -DIGIT):
        sums = torch.zeros(1 << DIGIT, dtype=torch.float64, device=pieces[0].device)
        for i, piece in enumerate(pieces):
            bits, weights = (piece.clamp(min=0) + 0.0).view(integers), counts(i)  # there is a zero with a sign
            if shift + DIGIT < width:
                same = bits >> (shift + DIGIT) == found >> (shift + DIGIT)
                bits, weights = bits[same], weights if weights is None else weights[same]
            sums += torch.bincount(bits >> shift & (1 << DIGIT) - 1, weights, 1 << DIGIT)
        reached = above + sums.flip(0).cumsum(0)
        enough = (reached >= goal * (1 - 1e-12)).nonzero()
        if not len(enough):
            return 0.0
        first = int(enough[0])
        above = float(reached[first - 1]) if first else above
        found |= (1 << DIGIT) - 1 - first << shift
    return torch.tensor(found, dtype=integers).view(kind).item()
