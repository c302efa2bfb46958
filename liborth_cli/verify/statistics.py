"""Intervals of 95 %: the percentile bootstrap over rows (Efron 1979), exact ones for shares, the jackknife over parts.

Rows that say the same thing are not independent, so what is resampled are groups of rows (the cluster bootstrap, Davison and
Hinkley 1997, 3.8): one row fifty times is one row. With few groups the percentile interval is too narrow; it is stretched about
the estimate by √(n/(n−1))·t(n−1)/1.96, the factor that turns the bootstrap of a mean into Student's interval. One group has no
interval: it is as wide as the bounds. A statistic at the edge of its range in every resample has no spread; it gets the exact
binomial end, about 3.7/n away (Clopper and Pearson 1934).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.verify.result import Metric

if TYPE_CHECKING:
    from liborth_cli.measure.scores import RowScore

DRAWS = 2000
LEVEL = 0.95
NORMAL = 1.959964
"""Deviations to either side that hold `LEVEL` of a normal distribution."""
AT_A_TIME = 1 << 22
"""Weights of rows that are held at a time."""
UNBOUNDED = (-math.inf, math.inf)
SHARE = (0.0, 1.0)
LOSS = (0.0, math.inf)


def alone(count: int) -> np.ndarray:
    """Return groups, (n,), of rows that are all different."""
    return np.arange(count)


def bootstrap(
    statistic: Callable[..., np.ndarray],
    groups: Sequence[np.ndarray],
    seed: int,
    meaning: str = "",
    bounds: tuple[float, float] = UNBOUNDED,
) -> Metric:
    """Evaluate a statistic of one or several independent lists of rows, with its interval.

    Args:
        statistic: takes the rows' weights, (draws, n) a list, and gives one number a draw, (draws,). For the estimate every
            row counts once; not finite where a resample breaks it down.
        groups: for each list the group of each row, (n,), integers.
        seed: of the resampling; each list has its own.
        meaning: for the metric.
        bounds: what the statistic cannot leave.

    Returns:
        The metric; its interval is `bounds` when a list has one group, or when the statistic breaks down on some resample.
    """
    estimate, found, count = _resampled(statistic, groups, seed)
    value = float(estimate)
    return Metric(value, *(bounds if found is None else _interval(value, found, count, bounds)), meaning)


def largest(statistic: Callable[..., np.ndarray], groups: Sequence[np.ndarray], seed: int, meaning: str = "") -> Metric:
    """Evaluate the largest of several numbers, with an interval that is right for all of them at once.

    With θ the true numbers, both max (θ̂ − θ) and max (θ − θ̂) are read off the resamples, so the interval holds max θ whichever
    is the largest (Romano and Wolf 2005). One more number that is tried can only raise the estimate.

    Args:
        statistic: takes the rows' weights as in `bootstrap`, and gives some numbers a draw, (draws, k).
        groups: as in `bootstrap`.
        seed: as in `bootstrap`.
        meaning: for the metric.
    """
    values, found, count = _resampled(statistic, groups, seed)
    known = np.isfinite(values)
    value = float(values[known].max())
    if found is None:
        return Metric(value, *UNBOUNDED, meaning)
    off = found[:, known] - values[known]
    low = _interval(value, value - off.max(1), count, UNBOUNDED)[0]
    high = _interval(value, value - off.min(1), count, UNBOUNDED)[1]
    return Metric(value, low, high, meaning)


def mean(values: Sequence[float] | np.ndarray, groups: np.ndarray, seed: int, meaning: str = "") -> Metric:
    """Return the mean over rows with its interval; of a paired difference when the values are differences."""
    return mean_within(values, groups, seed, meaning, UNBOUNDED)


def mean_within(
    values: Sequence[float] | np.ndarray, groups: np.ndarray, seed: int, meaning: str, bounds: tuple[float, float]
) -> Metric:
    """Return the mean over rows, (n,), of what cannot leave its bounds."""
    column = np.asarray(values, np.float64)
    return bootstrap(lambda w: (w @ column) / w.sum(1), [groups], seed, meaning, bounds)


def mean_loss(scores: Sequence[RowScore], groups: np.ndarray, seed: int, meaning: str = "") -> Metric:
    """Return the mean loss a token with its interval over rows."""
    sums, tokens = totals(scores)
    return bootstrap(lambda w: (w @ sums) / (w @ tokens), [groups], seed, meaning, LOSS)


def curve(table: np.ndarray, tokens: np.ndarray, groups: np.ndarray, seed: int) -> list[Metric]:
    """Return the mean loss a token at every point of a curve, each with its interval.

    Args:
        table: summed loss of every row at every point, (points, n).
        tokens: of every row, (n,).
        groups: of every row, (n,).
        seed: of the resampling; all points see the same resamples.
    """
    return [bootstrap(lambda w, s=sums: (w @ s) / (w @ tokens), [groups], seed, "", LOSS) for sums in table]


def by_sample(
    sums: np.ndarray, base: np.ndarray, numbers: np.ndarray, tokens: np.ndarray, groups: np.ndarray, seed: int
) -> Metric:
    """Return the mean loss a token at a point where only some rows were scored: that of something near, and the difference.

    Args:
        sums: summed loss of those rows, (k,).
        base: summed loss of all rows at what is near, (n,) (the difference estimator, Cochran 1977, 7.1).
        numbers: of the rows that were scored, (k,).
        tokens: of every row, (n,).
        groups: of every row, (n,).
        seed: of the resampling.
    """
    return bootstrap(lambda w: difference(w, sums, base, numbers, tokens), [groups], seed, "", LOSS)


def difference(weights: np.ndarray, sums: np.ndarray, base: np.ndarray, numbers: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return what `by_sample` does for rows that count so much, (resamples, n): the mean loss a token, (resamples,)."""
    some = weights[:, numbers]
    return (weights @ base) / (weights @ tokens) + (some @ (sums - base[numbers])) / (some @ tokens[numbers])


def totals(scores: Sequence[RowScore]) -> tuple[np.ndarray, np.ndarray]:
    """Return the summed loss of each row in nats, (n,), and its number of loss-carrying tokens, (n,)."""
    return np.array([s.loss.sum() for s in scores]), np.array([float(len(s.loss)) for s in scores])


def share(hit: np.ndarray, groups: np.ndarray, meaning: str = "") -> Metric:
    """Return the share of the groups with a hit, and its exact interval (Clopper and Pearson 1934): 0 of 20 is no proof of 0.

    Args:
        hit: of every row, (n,), bool; at least one row.
        groups: of every row, (n,).
        meaning: one sentence.
    """
    from scipy.stats import beta

    hits, rows = len(np.unique(groups[hit])), len(np.unique(groups))
    low = 0.0 if hits == 0 else float(beta.ppf((1 - LEVEL) / 2, hits, rows - hits + 1))
    high = 1.0 if hits == rows else float(beta.ppf((1 + LEVEL) / 2, hits + 1, rows - hits))
    return Metric(hits / rows, low, high, meaning)


def jackknife(whole: float, left_out: Sequence[float], meaning: str) -> Metric:
    """Return the size of a cosine with the interval that leaving parts out gives (Tukey 1958).

    Args:
        whole: the cosine of all parts.
        left_out: the cosine without each part; with fewer than two nothing is known but the bounds.
        meaning: for the metric.
    """
    count = len(left_out)
    if count < 2:
        return Metric(abs(whole), 0.0, 1.0, f"{meaning}; one factor set gives no interval")
    from scipy.stats import t

    values = np.asarray(left_out)
    error = math.sqrt((count - 1) / count * float(((values - values.mean()) ** 2).sum()))
    reach = float(t.ppf((1 + LEVEL) / 2, count - 1)) * error
    ends = (abs(whole - reach), abs(whole + reach))
    return Metric(abs(whole), 0.0 if abs(whole) <= reach else min(ends), min(max(ends), 1.0), meaning)


def mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947) on paired right and wrong answers, (rows,) bool each."""
    from scipy.stats import binomtest

    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def stretch(count: int) -> float:
    """Return by how much the interval of so many groups is stretched, 2 or more."""
    from scipy.stats import t

    return math.sqrt(count / (count - 1)) * float(t.ppf((1 + LEVEL) / 2, count - 1)) / NORMAL


def _resampled(
    statistic: Callable[..., np.ndarray], groups: Sequence[np.ndarray], seed: int
) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Return a statistic of the rows as they are; of every resample, (draws, …), None of one group; and the fewest groups."""
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate, count = statistic(*(np.ones((1, len(g))) for g in groups))[0], min(len(np.unique(g)) for g in groups)
        if count < 2:
            return estimate, None, count
        draws = zip(*(_draws(g, seed + number, max(map(len, groups))) for number, g in enumerate(groups)), strict=True)
        return estimate, np.concatenate([statistic(*weights) for weights in draws]), count


def _draws(groups: np.ndarray, seed: int, rows: int) -> Iterator[np.ndarray]:
    """Draw how often each row is in each of the resamples of its groups, some resamples at a time: (draws, n)."""
    names, place = np.unique(groups, return_inverse=True)
    count, step = len(names), max(AT_A_TIME // rows, 1)
    generator = np.random.default_rng(seed)
    for start in range(0, DRAWS, step):
        stop = min(start + step, DRAWS)
        drawn = (
            _counts(count, seed, DRAWS)[start:stop]
            if count * DRAWS <= AT_A_TIME
            else _multinomial(generator, count, stop - start)
        )
        yield drawn.astype(np.float64)[:, place]


@functools.lru_cache(maxsize=8)
def _counts(groups: int, seed: int, draws: int) -> np.ndarray:
    """Return all resamples of some groups, (draws, groups): at every point of a curve they are the same."""
    return _multinomial(np.random.default_rng(seed), groups, draws).astype(np.uint16)


def _multinomial(generator: np.random.Generator, groups: int, draws: int) -> np.ndarray:
    return generator.multinomial(groups, np.full(groups, 1 / groups), draws)


def _interval(value: float, found: np.ndarray, count: int, bounds: tuple[float, float]) -> tuple[float, float]:
    if not np.isfinite(found).all():
        return bounds
    if found.min() == found.max() and math.isfinite(bounds[1] - bounds[0]):
        reach = (1 - ((1 - LEVEL) / 2) ** (1 / count)) * (bounds[1] - bounds[0])
        low = bounds[1] - reach if value == bounds[1] else value
        return low, bounds[0] + reach if value == bounds[0] else value
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    wider = stretch(count)
    low, high = (value + wider * min(float(low) - value, 0.0), value + wider * max(float(high) - value, 0.0))
    return max(low, bounds[0]), min(high, bounds[1])
