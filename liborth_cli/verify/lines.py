"""Points of a line of models: which must be scored on all rows to know how high the loss rises above the chord.

A part of the rows, drawn by lot, is scored at every point. A point is scored on all rows unless the part shows it so far below
another one that all rows, and every resample of them, would show the same. What one row rises at neighbouring points is nearly
in proportion, so what all rows say at points that have been scored corrects what the part says of the others (the regression
estimator, Cochran 1977, *Sampling Techniques*, 7.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

CHANCE = 1e-5
"""Of being further off than the error, were rows normal; by Student's distribution, for so few."""
REACH = 4.0
"""Deviations that 2,000 resamples go from their mean, at most about 3.5, and some to spare."""


@dataclass(frozen=True)
class SampledRows:
    """What a part of the rows says of a line.

    Attributes:
        table: summed loss of every row at every point, (points, n).
        tokens: of every row, (n,).
        groups: of every row, (n,); each is in the part as a whole.
        grid: t of the points, the ends included, (points,).
        of: how many groups all rows have.
    """

    table: np.ndarray
    tokens: np.ndarray
    groups: np.ndarray
    grid: np.ndarray
    of: int

    @cached_property
    def means(self) -> np.ndarray:
        """Rise above the chord, nats a token, (points,)."""
        return above_chord(self.table, self.grid).sum(1) / self.tokens.sum()

    @cached_property
    def offsets(self) -> np.ndarray:
        """By how much every group rises more than its tokens let expect, over the mean group's tokens, (points, groups)."""
        place = np.unique(self.groups, return_inverse=True)[1]
        size = np.bincount(place, self.tokens)
        each = np.stack([np.bincount(place, row) for row in above_chord(self.table, self.grid)])
        return (each - self.means[:, None] * size) / size.mean()

    def expected(self, points: list[int], whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Say what all rows will show, where some points are known.

        Args:
            points: that all rows were scored at.
            whole: the rise there, nats a token.

        Returns:
            The rise at every point, (points,), and how far the distance of two points may be off, (points, points).
        """
        from scipy.stats import t

        seen, groups = self.offsets[points], self.offsets.shape[1]
        slopes = np.linalg.lstsq(seen.T, self.offsets.T, rcond=1e-6)[0]
        free = groups - 1 - len(points)
        reach = float(t.ppf(1 - CHANCE, free)) * np.sqrt((groups - 1) / free * (1 / groups - 1 / self.of))
        rise = self.means + (whole - self.means[points]) @ slopes
        return rise, reach * _deviations(self.offsets - slopes.T @ seen)

    @cached_property
    def resampled(self) -> np.ndarray:
        """How far resamples of all rows move the distance of two points, (points, points)."""
        return REACH * _deviations(self.offsets) / np.sqrt(self.of)


def deciding(part: SampledRows, whole: Callable[[int], float]) -> list[int]:
    """Find the points that decide how high a line rises: at the others all rows would show less, in every resample.

    Args:
        part: what some of the rows say; between the ends there must be a point.
        whole: scores all rows at one point, and returns the rise there, nats a token.

    Returns:
        The numbers of the points that were scored, ascending: one at least, and all between the ends where the part turns out
        not to be like the rest.
    """
    inner, scored, known = range(1, len(part.grid) - 1), list[int](), list[float]()
    while len(scored) < len(inner):
        rise, error = part.expected(scored, np.array(known))
        surely = rise[None] - rise[:, None] - error - part.resampled
        lower = surely.max(1) > 0
        open_ = [i for i in inner if i not in scored and not (scored and lower[i])]
        if not open_:
            break
        number = max(open_, key=lambda i: rise[i])
        scored.append(number)
        known.append(whole(number))
        if abs(known[-1] - rise[number]) > error[number, 0]:
            return list(inner)
    return sorted(scored)


def above_chord(losses: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return by how much losses along the first axis, (points, …), lie above the chord of the two ends; there exactly 0."""
    t = grid.reshape(-1, *[1] * (losses.ndim - 1))
    rise = losses - ((1 - t) * losses[0] + t * losses[-1])
    rise[[0, -1]] = 0.0
    return rise


def _deviations(offsets: np.ndarray) -> np.ndarray:
    """Return the standard deviation of the difference of every two points over groups, (points, points)."""
    apart = offsets[None] - offsets[:, None]
    return np.sqrt((apart**2).sum(-1) / (offsets.shape[1] - 1))
