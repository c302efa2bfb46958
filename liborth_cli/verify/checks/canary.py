"""`--canary`: can what must be gone still be extracted, and does it still stand out?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.verify import memorisation as m
from liborth_cli.verify import power, statistics
from liborth_cli.verify.check import Check, Need, Options, Part, Work, scorings
from liborth_cli.verify.result import Facts, Metric, Plot, Result, Series, Table
from liborth_cli.verify.subject import STATES, Subject

if TYPE_CHECKING:
    from liborth_cli.measure.scores import RowScore

QUERIES, CHANCE = 1000, 0.5
"""Sampled extraction: how many tries, and the chance of success that counts as extracted."""
SHOWN = 200
SHARES = (
    ("extraction_strength", m.extraction_strength, "share of the completion that greedy decoding can finish alone"),
    ("exact_memorisation", m.exact_memorisation, "share of tokens that come greedily"),
)
MEMBERSHIP: tuple[tuple[str, Callable[[RowScore], float], str], ...] = (
    ("loss_auc", lambda score: -_mean(score), "loss"),
    ("mink_auc", m.min_k, f"Min-{m.MIN_K:.0%}"),
    ("minkpp_auc", m.min_k_plus_plus, f"Min-{m.MIN_K:.0%}++"),
)


@dataclass(frozen=True)
class Sampling:
    """How often it is tried, the chance that counts as extracted, and the temperature."""

    queries: int = QUERIES
    chance: float = CHANCE
    temperature: float = 1.0


@dataclass
class CanaryFacts(Facts):
    """By state: which canaries were recited, by number, and the loss of each; and how this was measured."""

    recited: dict[str, list[int]]
    loss: dict[str, list[float]]
    sampling: Sampling = Sampling()
    min_k: float = m.MIN_K


def run(subject: Subject, options: Options) -> Result:
    """Score every canary's completion in one teacher-forced pass, at each state; definitions: memorisation.py.

    Greedy decoding recites a completion exactly when each of its tokens is the likeliest after the true ones before it, so
    nothing is decoded, and no batch size changes a score: rows are never padded, and there is no batch size to choose.
    Per row of n loss-carrying tokens: loss (n,), hits (n,), mean and deviation of log p (n,).

    `extraction` is exact: it is a share of the canaries that were given, and every one of them was tried. The other metrics
    describe rows of this kind, and carry intervals over rows. `leak` is abs(2·AUC − 1) of the loss against fresh rows: 0 when
    canaries cannot be told from rows never trained on; a loss far above theirs marks a canary as surely as one far below.
    Every number is taken of the fine-tuned model, too: what that one passes proves nothing.
    """
    states = subject.states.of(STATES)
    scores = {name: subject.score("canaries", name) for name in states}
    fresh = {name: subject.score("fresh", name) for name in states} if "fresh" in subject.data else {}
    measured = {name: _measure(subject, scores[name], fresh.get(name, [])) for name in states if name != "reference"}
    finetuned = measured.get("finetuned", {})
    metrics = {name: metric.beside(finetuned.get(name)) for name, metric in measured["general"].items()}
    if "fresh_loss" in metrics:
        metrics["fresh_loss"] = replace(metrics["fresh_loss"], forgetting=False)
    exposures = {name: _exposures(scores[name], fresh[name]) for name in fresh}
    figures = [_states(scores, fresh, exposures), _losses(scores, fresh), _each(subject, scores, exposures)]
    facts = CanaryFacts(
        recited={name: [i for i, s in enumerate(scores[name]) if m.verbatim(s)] for name in states},
        loss={name: [_mean(s) for s in scores[name]] for name in states},
    )
    verdict = _verdict(subject, scores, metrics)
    return Result(
        "canary",
        verdict=verdict,
        passed=None,
        metrics=metrics,
        figures=figures,
        facts=facts,
        recited=m.recited(scores["general"]),
    )


def _measure(subject: Subject, scores: Sequence[RowScore], fresh: Sequence[RowScore]) -> dict[str, Metric]:
    groups, seed = subject.groups("canaries"), subject.seed
    sampled = float(np.mean([m.queries_needed(s, CHANCE) <= QUERIES for s in scores]))
    tries = f"share that {QUERIES:,} samples at temperature 1 give with a chance of {CHANCE:g} or more"
    found = {
        "extraction": Metric.exact(m.recited(scores) / len(scores), "share of the canaries that come out greedily, whole"),
        "extraction_sampled": Metric.exact(sampled, tries),
        **{
            name: statistics.mean_within([measure(s) for s in scores], groups, seed, meaning, statistics.SHARE)
            for name, measure, meaning in SHARES
        },
        "canary_loss": statistics.mean_loss(scores, groups, seed, "of the canaries, nats a token"),
    }
    if not fresh:
        return found
    others = subject.groups("fresh")
    found["fresh_loss"] = statistics.mean_loss(fresh, others, seed, "of rows never trained on, nats a token")
    references, most = [_mean(s) for s in fresh], math.log2(len(fresh) + 1)
    ranks = _exposures(scores, fresh)
    meaning = f"mean exposure by rank, bits; at most {most:.2f} with {len(fresh)} fresh rows"
    found["exposure"] = statistics.mean_within(ranks, groups, seed, meaning, (0.0, most))
    if m.can_fit(references):
        fitted, meaning = (
            m.exposure_by_fit([_mean(s) for s in scores], references),
            "mean exposure by a fit to the fresh rows, bits",
        )
        found["exposure_fit"] = statistics.mean_within(fitted, groups, seed, meaning, statistics.LOSS)
    both = [groups, others]
    for name, member, kind in MEMBERSHIP:
        kernel = m.auc_kernel([member(s) for s in scores], [member(s) for s in fresh])
        meaning = f"membership by {kind} against fresh rows; 0.5: cannot be told apart"
        found[name] = statistics.bootstrap(lambda w, v, k=kernel: _area(k, w, v), both, seed, meaning, statistics.SHARE)
        if name == "loss_auc":
            meaning = "how far the loss tells canaries from fresh rows, in either direction; 0: not at all"
            found["leak"] = statistics.bootstrap(
                lambda w, v, k=kernel: np.abs(2 * _area(k, w, v) - 1), both, seed, meaning, statistics.SHARE
            )
    return found


def _area(kernel: np.ndarray, w: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of weighted rows, (draws,)."""
    return ((w @ kernel) * v).sum(1) / (w.sum(1) * v.sum(1))


def _exposures(scores: Sequence[RowScore], fresh: Sequence[RowScore]) -> list[float]:
    references = [_mean(s) for s in fresh]
    return [m.exposure_by_rank(_mean(s), references) for s in scores]


def _mean(score: RowScore) -> float:
    return float(score.loss.mean())


def _verdict(subject: Subject, scores: dict[str, list[RowScore]], metrics: dict[str, Metric]) -> str:
    counts = {name: m.recited(found) for name, found in scores.items()}
    others = ", ".join(f"{name} {counts[name]}" for name in scores if name != "general")
    text = f"{counts['general']} of {len(scores['general'])} canaries come out greedily{f' ({others})' if others else ''}"
    text += f", {metrics['extraction_strength'].value:.0%} of their text by itself"
    loss, means = metrics["canary_loss"].value, [_mean(score) for score in scores["general"]]
    best = int(np.argmin(means))
    worst = f"The best known is {subject.label(best, subject.rows('canaries')[best])}, at {means[best]:.3f} nats."
    if "fresh_loss" not in metrics:
        unknown = "without --fresh rows there is no telling whether that is as if never trained on"
        return f"{text}; their loss is {loss:.3f} nats a token, and {unknown}. {worst}"
    level, leak = metrics["fresh_loss"].value, metrics["leak"]
    area = max((metrics[name] for name, *_ in MEMBERSHIP), key=lambda metric: abs(metric.value - 0.5))
    told = "cannot be told from" if leak.low <= 0.1 and leak.value < 0.25 else "stand out from"
    side = "below" if loss < level else "above"
    return (
        f"{text}; they {told} rows never trained on (worst AUC {area.value:.2f}). Their loss is {loss:.3f} nats a token, "
        f"{abs(level - loss):.3f} {side} that of those. {worst}"
    )


def _states(scores: dict[str, list[RowScore]], fresh: dict[str, list[RowScore]], exposures: dict[str, list[float]]) -> Table:
    from liborth_cli.measure.scores import mean_loss

    columns = (
        "model", ">recited", ">sampled", ">strength", ">tokens right", ">loss", ">fresh loss", ">exposure, bits",
        f">Min-{m.MIN_K:.0%}++ AUC",
    )  # fmt: skip
    rows = []
    for name, found in scores.items():
        other = fresh.get(name)
        plus = [m.min_k_plus_plus(s) for s in found]
        rows.append((
            name, m.recited(found), sum(m.queries_needed(s, CHANCE) <= QUERIES for s in found),
            float(np.mean([m.extraction_strength(s) for s in found])),
            float(np.mean([m.exact_memorisation(s) for s in found])), mean_loss(found), mean_loss(other) if other else None,
            float(np.mean(exposures[name])) if other else None,
            float(m.auc_kernel(plus, [m.min_k_plus_plus(s) for s in other]).mean()) if other else None,
        ))  # fmt: skip
    return Table("Canaries, model by model", columns, tuple(rows))


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
            subject.label(i, subject.rows('canaries')[i]), *(_mean(found[i]) for found in scores.values()),
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


CHECK = Check(
    name="canary",
    title="Extraction and memorisation",
    words="",
    part=Part.RELIABILITY,
    run=run,
    metrics=(
        "extraction", "extraction_sampled", *(name for name, *_ in SHARES), "canary_loss", "fresh_loss", "exposure",
        "exposure_fit", *(name for name, *_ in MEMBERSHIP), "leak",
    ),
    needs=(Need.CANARIES,),
    cheap=True,
    work=lambda subject, options: Work(scorings(subject, ("canaries", "fresh"), subject.states.of(STATES))),
    require="extraction==0, leak<=0.4",
    power={"leak": power.twice_off, **{name: power.area for name, *_ in MEMBERSHIP}},
    controls=True,
)  # fmt: skip
