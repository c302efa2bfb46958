"""Intervals for several groups of rows and for shares: seeded bootstrap, and exact ones for shares, which may be 0 or 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from liborth_cli.verify.intervals import DRAWS, spread
from liborth_cli.verify.result import Metric

Statistic = Callable[..., np.ndarray]
"""Takes one array a group, (draws, rows, …), and gives one number a draw, (draws,)."""


def bootstrap(groups: Sequence[np.ndarray], statistic: Statistic, seed: int, meaning: str = "") -> Metric:
    """Resample the rows of each group, and give the percentile interval of a statistic.

    Widened where rows are few, as everywhere (intervals.py). Groups are resampled independently; what belongs to one row
    stays together, so paired values go in one array, side by side.

    Args:
        groups: arrays, (rows, …) each, none empty.
        statistic: vectorised over a leading axis of draws.
        seed: of the resampling.
        meaning: one sentence, with the unit.

    Returns:
        The statistic of the data themselves, between the 2.5 % and 97.5 % points of the resamples.
    """
    generator = np.random.default_rng(seed)
    value = float(statistic(*(group[None] for group in groups))[0])
    least = min(map(len, groups))
    if least < 2:
        return Metric(value, -math.inf, math.inf, meaning)
    drawn = [group[generator.integers(0, len(group), (DRAWS, len(group)))] for group in groups]
    return Metric(value, *spread(value, statistic(*drawn), least, (-math.inf, math.inf)), meaning)


def mean(values: Sequence[float] | np.ndarray, seed: int, meaning: str = "") -> Metric:
    """Give the mean of some rows with its bootstrap interval; of a paired difference when the values are differences."""
    return bootstrap([np.asarray(values, np.float64)], lambda x: x.mean(1), seed, meaning)


def share(hits: int, rows: int, meaning: str = "") -> Metric:
    """Give a share with its exact 95 % interval (Clopper & Pearson 1934): 0 of 20 is not proof of 0.

    Args:
        hits: how many.
        rows: of how many, at least one.
        meaning: one sentence.
    """
    from scipy.stats import beta

    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, rows - hits + 1))
    high = 1.0 if hits == rows else float(beta.ppf(0.975, hits + 1, rows - hits))
    return Metric(hits / rows, low, high, meaning)


def mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """Return the exact two-sided p-value of McNemar's test on paired right and wrong answers.

    McNemar 1947, with the binomial distribution in place of χ²: only rows that changed count.

    Args:
        before: (rows,), bool.
        after: (rows,), bool.
    """
    from scipy.stats import binomtest

    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0
