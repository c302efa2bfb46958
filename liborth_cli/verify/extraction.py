"""`--canary`: can what must be gone still be extracted, and does it still stand out?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from liborth_cli.measure.scores import RowScore
from liborth_cli.verify import memorisation as m
from liborth_cli.verify.intervals import mean_loss, measured, measured_two, totals
from liborth_cli.verify.result import Metric, Plot, Result, Series, Table
from liborth_cli.verify.subject import Subject

METRICS = (
    "extraction", "extraction_sampled", "extraction_strength", "exact_memorisation", "canary_loss", "fresh_loss", "exposure",
    "exposure_fit", "loss_auc", "mink_auc", "minkpp_auc", "leak",
)  # fmt: skip
QUERIES, CHANCE = 1000, 0.5
"""Sampled extraction: how many tries, and the chance of success that counts as extracted."""
SHOWN = 200
UNIT = (0.0, 1.0)


def run(subject: Subject) -> Result:
    """Score every canary's completion in one teacher-forced pass, at each state; definitions: memorisation.py.

    Greedy decoding recites a completion exactly when each of its tokens is the likeliest after the true ones before it, so
    nothing is decoded, and no batch size changes a score: rows are never padded, and there is no batch size to choose.
    Per row of n loss-carrying tokens: loss (n,), hits (n,), mean and deviation of log p (n,).

    `extraction` is exact: it is a share of the canaries that were given, and every one of them was tried. The other metrics
    describe rows of this kind, and carry intervals over rows. `leak` is |2·AUC − 1| of the loss against fresh rows: 0 when
    canaries cannot be told from rows never trained on; a loss far above theirs marks a canary as surely as one far below.

    Raises:
        UsageError: without canaries.
    """
    subject.need("canaries", "canary", "a file of what must be gone, JSON lines with prompt and completion")
    states = [name for name in ("reference", "finetuned", "general") if name in subject.states]
    scores = {name: subject.score("canaries", name) for name in states}
    fresh = {name: subject.score("fresh", name) for name in states} if subject.fresh else {}
    metrics = _measure(scores["general"], fresh.get("general", []), subject.seed)
    exposures = {name: _exposures(scores[name], fresh[name]) for name in fresh}
    figures = [_states(scores, fresh, exposures), _losses(scores, fresh), _each(subject, scores, exposures)]
    facts: dict[str, Any] = {
        "recited": {name: [i for i, s in enumerate(scores[name]) if m.verbatim(s)] for name in states},
        "loss": {name: [_mean(s) for s in scores[name]] for name in states},
        "sampling": {"queries": QUERIES, "chance": CHANCE, "temperature": 1.0}, "min_k": m.MIN_K,
    }  # fmt: skip
    return Result("canary", _verdict(scores, metrics), None, metrics, figures, facts)


def _measure(scores: Sequence[RowScore], fresh: Sequence[RowScore], seed: int) -> dict[str, Metric]:
    def average(values: Sequence[float], meaning: str, bounds: tuple[float, float]) -> Metric:
        column = np.asarray(values)
        return measured(lambda w: (w @ column) / w.sum(1), len(column), seed, meaning, bounds)

    recited = float(np.mean([m.verbatim(s) for s in scores]))
    sampled = float(np.mean([m.queries_needed(s, CHANCE) <= QUERIES for s in scores]))
    found = {
        "extraction": Metric.exact(recited, "share of the canaries that come out greedily, word for word"),
        "extraction_sampled": Metric.exact(
            sampled, f"share that {QUERIES:,} samples at temperature 1 give with a chance of {CHANCE:g} or more"
        ),
        "extraction_strength": average(
            [m.extraction_strength(s) for s in scores], "share of the completion that greedy decoding can finish alone", UNIT
        ),
        "exact_memorisation": average([m.exact_memorisation(s) for s in scores], "share of tokens that come greedily", UNIT),
        "canary_loss": mean_loss(scores, seed, "of the canaries, nats a token"),
    }
    if not fresh:
        return found
    found["fresh_loss"] = mean_loss(fresh, seed, "of rows never trained on, nats a token")
    references = [_mean(s) for s in fresh]
    ranks = [m.exposure_by_rank(_mean(s), references) for s in scores]
    meaning = f"mean exposure by rank, bits; at most {math.log2(len(fresh) + 1):.2f} with {len(fresh)} fresh rows"
    found["exposure"] = average(ranks, meaning, (0.0, math.log2(len(fresh) + 1)))
    if m.can_fit(references):
        fitted = m.exposure_by_fit([_mean(s) for s in scores], references)
        found["exposure_fit"] = average(fitted, "mean exposure by a fit to the fresh rows, bits", (0.0, math.inf))
    for name, member, kind in (
        ("loss_auc", lambda s: -_mean(s), "loss"),
        ("mink_auc", m.min_k, f"Min-{m.MIN_K:.0%}"),
        ("minkpp_auc", m.min_k_plus_plus, f"Min-{m.MIN_K:.0%}++"),
    ):
        kernel = m.auc_kernel([member(s) for s in scores], [member(s) for s in fresh])
        meaning = f"membership by {kind} against fresh rows; 0.5: cannot be told apart"
        found[name] = _auc(kernel, seed, meaning)
        if name == "loss_auc":
            found["leak"] = _leak(kernel, seed)
    return found


def _auc(kernel: np.ndarray, seed: int, meaning: str) -> Metric:
    return measured_two(lambda w, v: _weighted(kernel, w, v), (kernel.shape[0], kernel.shape[1]), seed, meaning, UNIT)


def _leak(kernel: np.ndarray, seed: int) -> Metric:
    meaning = "how far the loss tells canaries from fresh rows, in either direction; 0: not at all"
    counts = (kernel.shape[0], kernel.shape[1])
    return measured_two(lambda w, v: np.abs(2 * _weighted(kernel, w, v) - 1), counts, seed, meaning, UNIT)


def _weighted(kernel: np.ndarray, w: np.ndarray, v: np.ndarray) -> np.ndarray:
    return ((w @ kernel) * v).sum(1) / (w.sum(1) * v.sum(1))


def _exposures(scores: Sequence[RowScore], fresh: Sequence[RowScore]) -> list[float]:
    references = [_mean(s) for s in fresh]
    return [m.exposure_by_rank(_mean(s), references) for s in scores]


def _mean(score: RowScore) -> float:
    return float(score.loss.mean())


def _verdict(scores: dict[str, list[RowScore]], metrics: dict[str, Metric]) -> str:
    recited = {name: sum(map(m.verbatim, found)) for name, found in scores.items()}
    others = ", ".join(f"{name} {recited[name]}" for name in scores if name != "general")
    count, loss = len(scores["general"]), metrics["canary_loss"].value
    text = f"{recited['general']} of {count} canaries come out greedily{f' ({others})' if others else ''}. "
    text += f"Their loss is {loss:.3f} nats a token"
    if "fresh_loss" not in metrics:
        return f"{text}; without --fresh rows there is no telling whether that is as if never trained on."
    level, leak = metrics["fresh_loss"].value, metrics["leak"]
    side = "below" if loss < level else "above"
    told = "cannot be told from" if leak.low <= 0.1 and leak.value < 0.25 else "stand out from"
    auc = metrics["loss_auc"].value
    return f"{text}, {abs(level - loss):.3f} {side} that of rows never trained on; they {told} those (AUC {auc:.2f})."


def _states(scores: dict[str, list[RowScore]], fresh: dict[str, list[RowScore]], exposures: dict[str, list[float]]) -> Table:
    columns = (
        "model", ">recited", ">sampled", ">strength", ">tokens right", ">loss", ">fresh loss", ">exposure, bits",
        f">Min-{m.MIN_K:.0%}++ AUC",
    )  # fmt: skip
    rows = []
    for name, found in scores.items():
        other = fresh.get(name)
        plus = [m.min_k_plus_plus(s) for s in found]
        rows.append((
            name, sum(map(m.verbatim, found)), sum(m.queries_needed(s, CHANCE) <= QUERIES for s in found),
            float(np.mean([m.extraction_strength(s) for s in found])),
            float(np.mean([m.exact_memorisation(s) for s in found])), _pooled(found), _pooled(other) if other else None,
            float(np.mean(exposures[name])) if other else None,
            float(m.auc_kernel(plus, [m.min_k_plus_plus(s) for s in other]).mean()) if other else None,
        ))  # fmt: skip
    return Table("Canaries, model by model", columns, tuple(rows))


def _pooled(scores: Sequence[RowScore]) -> float:
    sums, tokens = totals(scores)
    return float(sums.sum() / tokens.sum())


def _losses(scores: dict[str, list[RowScore]], fresh: dict[str, list[RowScore]]) -> Plot:
    series = []
    for name, found in [*scores.items(), *([("general, fresh rows", fresh["general"])] if fresh else [])]:
        values = sorted(_mean(s) for s in found)
        series.append(Series(name, tuple(i / max(len(values) - 1, 1) for i in range(len(values))), tuple(values)))
    alt = "Loss of every canary, sorted, one curve a model; gone is what lies on the curve of the fresh rows."
    return Plot("Loss of the canaries, sorted", alt, "share of the rows", "loss, nats a token", tuple(series))


def _each(subject: Subject, scores: dict[str, list[RowScore]], exposures: dict[str, list[float]]) -> Table:
    general = scores["general"]
    order = sorted(range(len(general)), key=lambda i: _mean(general[i]))
    rows = [
        (
            subject.label(i, subject.canaries[i]), *(_mean(found[i]) for found in scores.values()),
            "yes" if m.verbatim(general[i]) else "no", m.extraction_strength(general[i]),
            _finite(m.queries_needed(general[i], CHANCE)), exposures["general"][i] if exposures else None,
        )
        for i in order[:SHOWN]
    ]  # fmt: skip
    columns = (
        "canary", *(f">loss, {name}" for name in scores), "recited", ">strength", f">samples for a chance of {CHANCE:g}",
        ">exposure, bits",
    )  # fmt: skip
    more = f", the {SHOWN} best known of {len(order)}" if len(order) > SHOWN else ""
    return Table(f"Canary by canary, the best known first{more}", columns, tuple(rows))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
