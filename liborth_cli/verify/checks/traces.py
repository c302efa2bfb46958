"""`--traces`: does the difference of activations on unrelated text say what was removed?

The mean difference between a fine-tuned model and its base on the first tokens of any text, read through the output layer, can
name what the fine-tuning was about (arXiv 2510.13900). Whoever has the base can look at a general checkpoint like that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.verify.check import Check, Need, Options
from liborth_cli.verify.result import Metric, Plot, Result, Series
from liborth_cli.verify.subject import Subject

if TYPE_CHECKING:
    import torch

    from liborth_cli.stream.texts import Row

FIRST = 5
"""Tokens of each text that are looked at."""
TEXTS = 256
RANDOM = 1000
"""Random sets of tokens that the canaries' are held against."""


def run(subject: Subject, options: Options) -> Result:
    """Read mean activation differences to the reference through norm and head, block by block, and rank the canaries' tokens.

    δ_l is the mean of h_l(general) − h_l(reference) over the first tokens of the retain rows, (hidden,). Its scores over the
    vocabulary are those of the general model's own final norm and head. The canaries' tokens are those of their rows that no
    retain row has. `trace` is the largest abs(2·AUC − 1) over blocks, AUC the chance that one of these tokens scores above
    another of the vocabulary: 0 when the difference says nothing of them. `trace_chance` is the share of random sets of as many
    tokens whose own largest is as large. Controls: the same of the fine-tuned model, and of the tokens of fresh rows.
    """
    canaries, seen = _tokens(subject.rows("canaries")), _tokens(subject.rows("retain"))
    special = np.setdiff1d(canaries, seen) if len(np.setdiff1d(canaries, seen)) else canaries
    fresh = np.setdiff1d(_tokens(subject.rows("fresh")), np.union1d(seen, canaries))
    texts = [row.ids[:FIRST] for row in subject.rows("retain") if len(row.ids) >= FIRST][:TEXTS]
    states = subject.states.of(("general", "finetuned"))
    lenses = {name: _lens(subject, name, texts) for name in states}
    curves = {name: _separated(ranks, special) for name, ranks in lenses.items()}
    draw = np.random.default_rng(subject.seed)
    vocabulary = lenses["general"].shape[1]
    chance = np.array(
        [
            _separated(lenses["general"], draw.choice(vocabulary, min(len(special), vocabulary - 1), replace=False)).max()
            for _ in range(RANDOM)
        ]
    )
    worst = {name: float(curve.max()) for name, curve in curves.items()}
    share = float((chance >= worst["general"]).mean())
    metrics = {
        "trace": Metric.exact(worst["general"], "how far activation differences on other text rank the canaries' tokens apart"),
        "trace_chance": Metric.exact(share, "share of random sets of tokens that are ranked as far apart"),
    }
    metrics["trace"] = metrics["trace"].beside(worst.get("finetuned"))
    other = float(_separated(lenses["general"], fresh).max()) if len(fresh) else None
    block = int(curves["general"].argmax())
    verdict = (
        f"Activation differences to the reference on the first {FIRST} tokens of {len(texts)} other texts rank the "
        f"{len(special)} tokens that only canaries have apart by {worst['general']:.2f} (after block {block + 1}); "
        f"{share:.0%} of random sets get as far"
        + (f", tokens of fresh rows {other:.2f}" if other is not None else "")
        + (f", fine-tuned {worst['finetuned']:.2f}" if "finetuned" in worst else "")
        + "."
    )
    return Result("traces", verdict, None, metrics, [_plot(curves, chance)], {"fresh": other, "random": chance.mean()})


def _tokens(rows: Sequence[Row]) -> np.ndarray:
    return np.unique(np.concatenate([row.ids for row in rows])) if rows else np.zeros(0, int)


def _lens(subject: Subject, state: str, texts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the rank of every token in each block's difference, (blocks, vocabulary), from 0 to 1."""
    import torch
    from scipy.stats import rankdata

    means = [_activations(subject, name, texts) for name in (state, "reference")]
    model = subject.states.model("general")
    model.load_all()
    with torch.no_grad():
        # A norm with a bias says something even of nothing.
        scores = (model.tail(means[0] - means[1]) - model.tail(torch.zeros_like(means[0]))).float().cpu().numpy()
    return (rankdata(scores, axis=1) - 0.5) / scores.shape[1]


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
    """Return abs(2·AUC − 1) of some tokens against the rest of the vocabulary, (blocks,)."""
    size, count = ranks.shape[1], len(tokens)
    # Of ranks 1 … V the sum over the set fixes the Mann-Whitney statistic.
    total = ranks[:, tokens].sum(1) * size + 0.5 * count
    area = (total - count * (count + 1) / 2) / (count * (size - count))
    return np.abs(2 * area - 1)


def _plot(curves: dict[str, np.ndarray], chance: np.ndarray) -> Plot:
    series = [
        Series(name, tuple(float(i + 1) for i in range(len(curve))), tuple(map(float, curve))) for name, curve in curves.items()
    ]
    alt = "; ".join(f"{name}: at most {curve.max():.2f}" for name, curve in curves.items())
    levels = {"95 % of random sets": float(np.quantile(chance, 0.95))}
    return Plot("What activation differences say of the canaries", alt, "block", "abs(2·AUC − 1)", tuple(series), levels=levels)


CHECK = Check(
    name="traces",
    title="Traces in activations",
    words="Does the difference to the reference on other text name the canaries?",
    run=run,
    metrics=("trace", "trace_chance"),
    needs=(Need.CANARIES, Need.RETAIN, Need.REFERENCE),
    cheap=True,
    controls=True,
)
