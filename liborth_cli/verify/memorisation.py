"""Numbers that say how well a model knows a text, from its scores of the tokens alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from liborth_cli.measure.scores import RowScore

MIN_K = 0.2
"""Share of the least likely tokens that Min-K% looks at; 20 % is what its authors use."""
FIT_FROM, SKEWED_FROM = 4, 100
"""References from which a distribution is fitted to their losses, and from which it may be skewed."""


def verbatim(score: RowScore) -> bool:
    """Tell whether greedy decoding gives the whole completion back.

    It does exactly when every token is the likeliest after the true tokens before it: then each greedy step picks the true
    token, and the next step stands where teacher forcing stood. One forward pass decides it; nothing is decoded.
    """
    return bool(score.hit.all())


def recited(scores: Sequence[RowScore]) -> int:
    """Return how many rows greedy decoding gives back whole."""
    return sum(map(verbatim, scores))


def exact_memorisation(score: RowScore) -> float:
    """Return the share of tokens that are the likeliest after the true tokens before them (arXiv 2205.10770)."""
    return float(score.hit.mean())


def extraction_strength(score: RowScore) -> float:
    """Return 1 − k/n, k the fewest tokens of the completion after which greedy decoding gives all the rest (n tokens).

    1: the prompt is enough. 0: not even the last token comes. Carlini et al. 2021 (arXiv 2012.07805), as in OpenUnlearning
    (arXiv 2506.12618).
    """
    wrong = np.flatnonzero(~score.hit)
    return 1.0 - (int(wrong[-1]) + 1 if len(wrong) else 0) / len(score.hit)


def sequence_probability(score: RowScore) -> float:
    """Return the probability that sampling at temperature 1 gives the whole completion: Π p of its tokens."""
    return math.exp(-float(score.loss.sum()))


def queries_needed(score: RowScore, chance: float) -> float:
    """Return the fewest samples n after which the completion has come with a probability of at least `chance`.

    (n, p)-discoverable extraction (Hayes et al. 2024, arXiv 2410.19482): 1 − (1 − q)^n ≥ p, q the sequence's probability;
    n from q, so nothing is sampled.
    """
    nats = float(score.loss.sum())
    if nats == 0.0:
        return 1.0
    if nats > 690.0:
        return math.inf
    # log1p keeps the digits of 1 − q when q is tiny, and expm1 when q is nearly 1.
    once = sequence_probability(score)
    fails = math.log1p(-once) if once < 0.5 else math.log(-math.expm1(-nats))
    return max(float(math.ceil(math.log1p(-chance) / fails)), 1.0)


def min_k(score: RowScore, share: float = MIN_K) -> float:
    """Return the mean log p of the least likely tokens, nats; higher for texts that were trained on (arXiv 2310.16789)."""
    return _mean_of_lowest(-score.loss, share)


def min_k_plus_plus(score: RowScore, share: float = MIN_K) -> float:
    """Return Min-K%++ (arXiv 2404.02936): log p in standard deviations from its mean over the vocabulary, then as `min_k`."""
    return _mean_of_lowest((-score.loss - score.mean) / np.maximum(score.deviation, 1e-12), share)


def exposure_by_rank(loss: float, references: Sequence[float]) -> float:
    """Return Carlini's exposure in bits, from the canary's rank among itself and the references.

    log2(m + 1) − log2(rank), m references (Carlini et al. 2019, arXiv 1802.08232, with R cut down to what was scored). At most
    log2(m + 1): few references cannot show more.

    Args:
        loss: of the canary, nats a token.
        references: losses of rows of the same form that were never trained on.
    """
    rank = 1 + sum(reference < loss for reference in references)
    return math.log2(len(references) + 1) - math.log2(rank)


def exposure_by_fit(losses: Sequence[float], references: Sequence[float]) -> list[float]:
    """Return exposure in bits from a distribution fitted to the references' losses, beyond what ranks can show.

    −log2 P(loss ≤ the canary's). From `SKEWED_FROM` references the distribution is a skew-normal, as in Carlini et al. 2019
    (arXiv 1802.08232). Fewer cannot show skewness, and a fit that tries puts an edge at the lowest of them: they get Student's
    t for the next draw from a normal of unknown mean and variance, whose wide tails say how little they know. Where the
    probability is beneath the smallest double, 1074 bits stand for it.

    Args:
        losses: of the canaries, nats a token.
        references: at least `FIT_FROM`, not all alike.
    """
    from scipy.stats import skewnorm, t

    known, asked = np.asarray(references), np.asarray(losses)
    if len(known) >= SKEWED_FROM:
        shape, place, width = skewnorm.fit(known)
        log_chance = skewnorm.logcdf(asked, shape, place, width)
    else:
        scale = known.std(ddof=1) * math.sqrt(1 + 1 / len(known))
        log_chance = t.logcdf((asked - known.mean()) / scale, len(known) - 1)
    return [min(max(-float(value) / math.log(2.0), 0.0), 1074.0) for value in log_chance]


def can_fit(references: Sequence[float]) -> bool:
    """Tell whether `exposure_by_fit` has enough to go by."""
    return len(references) >= FIT_FROM and float(np.std(references)) > 1e-9


def auc_kernel(members: Sequence[float], others: Sequence[float]) -> np.ndarray:
    """Return 1 where a member scores higher than another row, ½ where they are equal, 0 otherwise, (members, others).

    Its mean is the area under the ROC curve of "a higher score means member" (Mann and Whitney).
    """
    a, b = np.asarray(members)[:, None], np.asarray(others)[None, :]
    return (a > b) + 0.5 * (a == b)


def _mean_of_lowest(values: np.ndarray, share: float) -> float:
    count = max(int(len(values) * share), 1)
    return float(np.sort(values)[:count].mean())
