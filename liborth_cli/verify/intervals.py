"""95 % intervals by resampling rows: the percentile bootstrap (Efron 1979), widened where rows are few.

With few rows the percentile interval is too narrow. It is stretched about the estimate by √(n/(n−1))·t(n−1)/1.96, the factor
that turns the bootstrap of a mean into Student's interval. One row has no interval: it is infinite. A share that is 0 (or 1) in
every row has no spread to resample; it gets the exact binomial end, about 3.7/n away (Clopper and Pearson 1934).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from liborth_cli.measure.scores import RowScore
from liborth_cli.verify.result import Metric

DRAWS = 2000
LEVEL = 0.95

Statistic = Callable[[np.ndarray], np.ndarray]
"""Weights of the rows, (draws, n), to the statistic of each draw, (draws,)."""


def totals(scores: Sequence[RowScore]) -> tuple[np.ndarray, np.ndarray]:
    """Return the summed loss of each row in nats, (n,), and its number of loss-carrying tokens, (n,)."""
    return np.array([s.loss.sum() for s in scores]), np.array([float(len(s.loss)) for s in scores])


def draw(count: int, seed: int) -> np.ndarray:
    """Draw how often each of `count` rows is in each of the resamples, (draws, count)."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS).astype(np.float64)


def measured(
    statistic: Statistic, count: int, seed: int, meaning: str, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Metric:
    """Evaluate a statistic of rows, with its interval.

    Args:
        statistic: of weighted rows; every row counts once for the estimate.
        count: rows.
        seed: of the resampling.
        meaning: for the metric.
        bounds: what the statistic cannot leave.

    Returns:
        The metric; its interval is `bounds` when there is one row, or when the statistic breaks down on some resample.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(np.ones((1, count)))[0])
        if count < 2:
            return Metric(value, *bounds, meaning)
        found = statistic(draw(count, seed))
    return Metric(value, *spread(value, found, count, bounds), meaning)


def measured_two(
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
    counts: tuple[int, int],
    seed: int,
    meaning: str,
    bounds: tuple[float, float],
) -> Metric:
    """Evaluate a statistic of two independent lists of rows, each resampled by itself; see `measured`."""
    value = float(statistic(*(np.ones((1, n)) for n in counts))[0])
    if min(counts) < 2:
        return Metric(value, *bounds, meaning)
    found = statistic(draw(counts[0], seed), draw(counts[1], seed + 1))
    return Metric(value, *spread(value, found, min(counts), bounds), meaning)


def spread(value: float, found: np.ndarray, count: int, bounds: tuple[float, float]) -> tuple[float, float]:
    """Return the interval of an estimate from what the resamples gave.

    Args:
        value: the estimate.
        found: the statistic of each resample; not finite where it broke down.
        count: rows.
        bounds: what the statistic cannot leave.
    """
    if not np.isfinite(found).all():
        return bounds
    from scipy.stats import t

    stretch = math.sqrt(count / (count - 1)) * float(t.ppf((1 + LEVEL) / 2, count - 1)) / 1.959964
    if found.min() == found.max() and math.isfinite(bounds[1] - bounds[0]):
        return _degenerate(value, count, bounds)
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = (value + stretch * min(float(low) - value, 0.0), value + stretch * max(float(high) - value, 0.0))
    return max(low, bounds[0]), min(high, bounds[1])


def _degenerate(value: float, count: int, bounds: tuple[float, float]) -> tuple[float, float]:
    """Return what n rows without a single exception leave open at the edge of a range: 1 − 0.025^(1/n) of it."""
    reach = (1 - ((1 - LEVEL) / 2) ** (1 / count)) * (bounds[1] - bounds[0])
    low = bounds[1] - reach if value == bounds[1] else value
    return low, bounds[0] + reach if value == bounds[0] else value


def mean_loss(scores: Sequence[RowScore], seed: int, meaning: str) -> Metric:
    """Return the mean loss a token with its interval over rows."""
    sums, tokens = totals(scores)
    return measured(lambda w: (w @ sums) / (w @ tokens), len(sums), seed, meaning, (0.0, math.inf))
