"""`--traces`: does the difference of activations on unrelated text say what was removed?

The mean difference between a fine-tuned model and its base on the first tokens of any text, read through the output layer, can
name what the fine-tuning was about (arXiv 2510.13900). Whoever has the base can look at a general checkpoint like that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.verify.check import Check, Need, Options, Part, Work
from liborth_cli.verify.result import Facts, Metric, Plot, Result, Series
from liborth_cli.verify.subject import Subject

if TYPE_CHECKING:
    import torch

    from liborth_cli.stream.texts import Row

FIRST = 5
"""Tokens of each text that are looked at."""
TEXTS = 256
RANDOM = 1000
"""Random sets of tokens that the canaries' are held against."""


@dataclass
class TracesFacts(Facts):
    """How far what only fresh rows have is ranked apart, and random sets on average."""

    fresh: float | None
    random: float


def run(subject: Subject, options: Options) -> Result:
    """Read mean activation differences to the reference through norm and head, block by block, and rank the canaries' tokens.

    δ_l is the mean of h_l(general) − h_l(reference) over the first tokens of the retain rows, (hidden,). Its scores over the
    vocabulary are those of the general model's own final norm and head. The canaries' tokens are those of their rows that no
    retain row has. `trace` is the largest abs(2·AUC − 1) over blocks, AUC the chance that one of these tokens scores above
    another that no retain row has: 0 when the difference says nothing of them. `trace_chance` is the share of random sets of as
    many such tokens whose own largest is as large. Controls: the fine-tuned model, and what only fresh rows have: as far apart,
    it is the form that is named and not the canaries.
    """
    canaries, seen, texts = _tokens(subject.rows("canaries")), _tokens(subject.rows("retain")), _texts(subject)
    states, scores = subject.states.of(("general", "finetuned")), dict[str, np.ndarray]()
    with subject.console.progress("traces", len(states), "models", brief=True) as progress:
        for name in states:
            scores[name] = _lens(subject, name, texts)
            progress.advance(1)
    pool, special = _pool(scores["general"].shape[1], canaries, seen)
    ranks = {name: _ranks(some[:, pool]) for name, some in scores.items()}
    curves = {name: _separated(some, np.searchsorted(pool, special)) for name, some in ranks.items()}
    draw = np.random.default_rng(subject.seed)
    sets = [draw.choice(len(pool), len(special), replace=False) for _ in range(RANDOM)]
    chance = np.array([_separated(ranks["general"], some).max() for some in sets])
    fresh = np.intersect1d(np.setdiff1d(_tokens(subject.rows("fresh")), canaries), pool)
    worst = {name: float(curve.max()) for name, curve in curves.items()}
    share = float((chance >= worst["general"]).mean())
    metrics = {
        "trace": Metric.exact(worst["general"], "how far activation differences on other text rank the canaries' tokens apart"),
        "trace_chance": Metric.exact(share, "share of random sets of tokens that are ranked as far apart"),
    }
    metrics["trace"] = metrics["trace"].beside(worst.get("finetuned"))
    other = float(_separated(ranks["general"], np.searchsorted(pool, fresh)).max()) if 0 < len(fresh) < len(pool) else None
    block = int(curves["general"].argmax())
    verdict = (
        f"Activation differences to the reference on the first {FIRST} tokens of {len(texts)} other texts rank the "
        f"{len(special)} tokens that only canaries have apart by {worst['general']:.2f} (after block {block + 1}); "
        f"{share:.0%} of random sets get as far"
        + (f", tokens of fresh rows {other:.2f}" if other is not None else "")
        + (f", fine-tuned {worst['finetuned']:.2f}" if "finetuned" in worst else "")
        + "."
    )
    return Result("traces", verdict, None, metrics, [_plot(curves, chance)], TracesFacts(other, random=float(chance.mean())))


def _tokens(rows: Sequence[Row]) -> np.ndarray:
    return np.unique(np.concatenate([row.ids for row in rows])) if rows else np.zeros(0, int)


def _pool(vocabulary: int, canaries: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that are ranked, and those of them that canaries have; in order.

    Rare tokens move together, whatever they say: tokens that no retain row has are held against others that none has. Where
    there are too few of those, all tokens of the canaries are held against the whole vocabulary.
    """
    unseen = np.setdiff1d(np.arange(vocabulary), seen)
    special = np.intersect1d(canaries, unseen)
    if 0 < 2 * len(special) <= len(unseen):
        return unseen, special
    return np.arange(vocabulary), canaries[: vocabulary // 2]


def _lens(subject: Subject, state: str, texts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the score of every token in each block's difference, (blocks, vocabulary)."""
    import torch

    means = [_activations(subject, name, texts) for name in (state, "reference")]
    model = subject.states.model("general")
    model.load_all()
    with torch.no_grad():
        # A norm with a bias says something even of nothing.
        return (model.tail(means[0] - means[1]) - model.tail(torch.zeros_like(means[0]))).float().cpu().numpy()


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Return the ranks of scores in each block, from 1; ties share theirs."""
    from scipy.stats import rankdata

    return rankdata(scores, axis=1)


def _activations(subject: Subject, state: str, texts: Sequence[np.ndarray]) -> torch.Tensor:
    """Return the mean residual stream after every block, (blocks, hidden)."""
    import torch

    model = subject.states.model(state)
    model.load_all()
    ids = torch.from_numpy(np.stack(texts)).to(model.device)
    means: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        model.through(ids, lambda level, states: means.__setitem__(level, states.float().mean((0, 1))))
    return torch.stack([means[level] for level in sorted(means)])


def _separated(ranks: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return abs(2·AUC − 1) of some tokens against all others (Mann and Whitney), (blocks,)."""
    size, count = ranks.shape[1], len(tokens)
    area = (ranks[:, tokens].sum(1) - count * (count + 1) / 2) / (count * (size - count))
    return np.abs(2 * area - 1)


def _plot(curves: dict[str, np.ndarray], chance: np.ndarray) -> Plot:
    series = [
        Series(name, tuple(float(i + 1) for i in range(len(curve))), tuple(map(float, curve))) for name, curve in curves.items()
    ]
    alt = "; ".join(f"{name}: at most {curve.max():.2f}" for name, curve in curves.items())
    levels = {"95 % of random sets": float(np.quantile(chance, 0.95))}
    return Plot("What activation differences say of the canaries", alt, "block", "abs(2·AUC − 1)", tuple(series), levels=levels)


def _texts(subject: Subject) -> list[np.ndarray]:
    """Return the beginnings that are read."""
    return [row.ids[:FIRST] for row in subject.rows("retain") if len(row.ids) >= FIRST][:TEXTS]


def _work(subject: Subject, options: Options) -> Work:
    """Count the reference beside each of the two."""
    return Work(read=2 * len(subject.states.of(("general", "finetuned"))) * FIRST * len(_texts(subject)))


CHECK = Check(
    name="traces",
    title="Traces in activations",
    words="Does the difference to the reference on other text name the canaries?",
    part=Part.MECHANISM,
    run=run,
    metrics=("trace", "trace_chance"),
    needs=(Need.CANARIES, Need.RETAIN, Need.REFERENCE),
    cheap=True,
    work=_work,
    controls=True,
)
