"""`--controls`: how much skill is kept, and what the simplest edits do at the same price."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from liborth_cli.measure.retention import retention as kept_share
from liborth_cli.measure.scores import RowScore
from liborth_cli.measure.unwritten import Unwritten
from liborth_cli.methods import Amount
from liborth_cli.verify.edits import NormMatched, alternative, measure_edits
from liborth_cli.verify.intervals import mean_loss, measured, totals
from liborth_cli.verify.memorisation import verbatim
from liborth_cli.verify.result import Metric, Plot, Result, Series, Table
from liborth_cli.verify.subject import Subject

METRICS = ("retention", "retain_loss", "advantage")
STEPS = 10
"""Evaluations spent on finding an amount that matches."""
CLOSE = 0.005
"""Share of the skill gain within which two retain losses count as matched."""


@dataclass(frozen=True)
class Control:
    """One model beside the one that is verified.

    Attributes:
        state: its name among the subject's states.
        title: for the table.
        matched: whether its retain loss is that of the general checkpoint, None where that was not the aim.
    """

    state: str
    title: str
    matched: bool | None = None


def run(subject: Subject) -> Result:
    """Measure retention, and the same numbers for five controls, none of which is written to disk.

    Retention is (L_r − L_g)/(L_r − L_f), L the mean loss a token on the retain data of reference, general and fine-tuned: the
    share of what fine-tuning gained that is kept; above 1 when cutting memory out helps. Interval: rows resampled jointly.

    The controls edit the tensors the split edited (any shape) and no others: the reference; the fine-tuned checkpoint; `scale`,
    W_r + s·U with s found by bisection so that its retain loss is the general one's (WiSE-FT, arXiv 2109.01903); `svd`, the
    leading singular directions with their energy found likewise; and a random edit that takes from each matrix the energy that
    the split took. `advantage` is the canaries' loss at the general checkpoint minus that at the matched scale, nats a token:
    what the method forgets beyond shrinking the update, for the same skill.

    A memory of neurons is no edit of tensors: retention is measured, with the neurons in as the fine-tuned model, and of the
    controls only the reference has a meaning.

    Raises:
        UsageError: without retain data, reference or fine-tuned checkpoint.
    """
    subject.need("retain", "controls", "--retain-data: text of the skill that must stay")
    subject.need("reference", "controls", "--reference, the checkpoint before fine-tuning")
    if subject.grown is None:
        subject.need("finetuned", "controls", "--finetuned, or the memory file")
    whole = subject.restored(1.0)
    losses = {name: totals(subject.score("retain", name))[0] for name in ("reference", whole, "general")}
    tokens = totals(subject.score("retain", "general"))[1]
    metrics = {
        "retention": retention(losses["reference"], losses["general"], losses[whole], subject.seed),
        "retain_loss": mean_loss(subject.score("retain", "general"), subject.seed, "on the retain data, nats a token"),
    }
    controls = [Control("reference", "reference"), Control(whole, "with its neurons" if subject.grown else "fine-tuned")]
    controls += [Control("general", "general")]
    controls += _build(subject, float((losses["reference"] - losses[whole]).sum() / tokens.sum()))
    if subject.canaries and any(c.state == "scale" for c in controls):
        metrics["advantage"] = _advantage(subject)
    verdict = _verdict(subject, metrics, controls)
    table, facts = _table(subject, controls)
    figures = [table, *([_frontier(subject, controls, verdict)] if subject.canaries else [])]
    return Result("controls", verdict, None, metrics, figures, {"controls": facts})


def retention(reference: np.ndarray, general: np.ndarray, finetuned: np.ndarray, seed: int) -> Metric:
    """Return the share of the gain that is kept, with its interval.

    Args:
        reference: summed loss of each retain row, (n,).
        general: likewise.
        finetuned: likewise.
        seed: of the resampling.

    Returns:
        The metric; its interval is infinite when the rows do not show that fine-tuning gained anything.
    """

    def statistic(w: np.ndarray) -> np.ndarray:
        return kept_share(w @ reference, w @ general, w @ finetuned)

    return measured(statistic, len(general), seed, "share of the loss gained by fine-tuning that is kept")


def match_level(loss: Callable[[float], float], target: float, tolerance: float, steps: int = STEPS) -> tuple[float, bool]:
    """Find the least amount in [0, 1] at which a loss comes down to a target.

    Args:
        loss: of an amount; at 0 it is above the target, and it need not be monotone.
        target: what it should be.
        tolerance: how close is close enough.
        steps: evaluations to spend.

    Returns:
        The amount, and whether it reached the target within the tolerance; the best one seen when it did not.
    """
    seen = {1.0: loss(1.0)}
    spent = 1
    while seen[min(seen)] > target + tolerance and spent < steps // 2:
        amount = 1.0 - spent / (steps // 2)
        seen[amount] = loss(amount)
        spent += 1
        if seen[amount] <= target:
            break
    below = [amount for amount, value in seen.items() if value <= target + tolerance]
    if not below:
        best = min(seen, key=lambda amount: abs(seen[amount] - target))
        return best, False
    low, high = 0.0, min(below)
    while spent < steps and abs(seen[high] - target) > tolerance:
        middle = (low + high) / 2
        seen[middle] = loss(middle)
        low, high = (low, middle) if seen[middle] <= target else (middle, high)
        spent += 1
    best = min(seen, key=lambda amount: abs(seen[amount] - target))
    return best, abs(seen[best] - target) <= tolerance


def _build(subject: Subject, gain: float) -> list[Control]:
    edits = {} if subject.grown else measure_edits(subject)
    if not edits:
        return []
    target = _loss(subject.score("retain", "general"))
    made = []
    for method, kind in (("scale", "scale"), ("svd", "energy")):
        split = alternative(subject, edits, method, Amount(kind, 1.0))
        loss = _loss_by_amount(subject, split, kind)
        amount, matched = match_level(loss, target, max(CLOSE * abs(gain), 1e-6))
        subject.states[method] = split.with_amount(Amount(kind, amount))
        how = "" if matched else ", as near as it gets"
        title = f"scale {amount:.3g}" if method == kind else f"svd, {kind} {amount:.3g}"
        made.append(Control(method, f"{title}: same retain loss{how}", matched))
    random = alternative(subject, edits, "random", Amount("energy", 1.0))
    subject.states["random"] = NormMatched(random, edits)
    too_large = any(edit.share > 1.0 for edit in edits.values())
    made.append(Control("random", f"random edit of the same size{' (at most the whole update)' if too_large else ''}"))
    return made


def _loss_by_amount(subject: Subject, split: Unwritten, kind: str) -> Callable[[float], float]:
    return lambda amount: _loss(subject.evaluators["retain"].score(split.with_amount(Amount(kind, amount))))


def _advantage(subject: Subject) -> Metric:
    (general, tokens), (scale, _) = (totals(subject.score("canaries", name)) for name in ("general", "scale"))
    return measured(
        lambda w: (w @ (general - scale)) / (w @ tokens), len(general), subject.seed,
        "canary loss beyond that of scaling the update down at the same retain loss, nats a token",
    )  # fmt: skip


def _loss(scores: Sequence[RowScore]) -> float:
    sums, tokens = totals(scores)
    return float(sums.sum() / tokens.sum())


def _kept(subject: Subject, state: str) -> float:
    values = [_loss(subject.score("retain", name)) for name in ("reference", state, subject.restored(1.0))]
    return kept_share(*values)


def _table(subject: Subject, controls: Sequence[Control]) -> tuple[Table, list[dict[str, float | str | None]]]:
    lists = [name for name in ("canaries", "fresh") if name in subject.evaluators]
    rows, facts = [], []
    for control in controls:
        retain = _loss(subject.score("retain", control.state))
        kept = _kept(subject, control.state)
        others = [_loss(subject.score(name, control.state)) for name in lists]
        recited = [sum(verbatim(s) for s in subject.score("canaries", control.state))] if subject.canaries else []
        rows.append((control.title, retain, kept if math.isfinite(kept) else None, *others, *recited))
        facts.append({"state": control.state, "title": control.title, "retain_loss": retain, "retention": kept,
                      **dict(zip(lists, others, strict=True))})  # fmt: skip
    names = {"canaries": ">canary loss", "fresh": ">fresh loss"}
    columns = (
        "model",
        ">retain loss",
        ">retention",
        *(names[name] for name in lists),
        *([">recited"] if subject.canaries else []),
    )
    return Table("The model and its controls, nats a token", columns, tuple(rows)), facts


def _frontier(subject: Subject, controls: Sequence[Control], verdict: str) -> Plot:
    series = []
    for control in controls:
        kept = _kept(subject, control.state)
        point = (kept if math.isfinite(kept) else 0.0,), (_loss(subject.score("canaries", control.state)),)
        series.append(Series(control.title, *point, marks=(control.title,), line=False))
    levels = {"never trained on": _loss(subject.score("fresh", "general"))} if subject.fresh else {}
    alt = f"Each model as a point: retention across, loss of the canaries up; best is right and near never trained. {verdict}"
    return Plot("Skill against secrets", alt, "retention", "canary loss, nats a token", tuple(series), levels=levels)


def _verdict(subject: Subject, metrics: dict[str, Metric], controls: Sequence[Control]) -> str:
    kept = metrics["retention"]
    if not math.isfinite(kept.value):
        return "Fine-tuning gained nothing on the retain data, so there is no skill to keep: is this the right text?"
    text = f"{kept.value:.1%} of the skill is kept"
    if math.isfinite(kept.low):
        text += f" (95 % interval {kept.low:.1%} to {kept.high:.1%})"
    if "advantage" not in metrics:
        return f"{text}."
    gap = metrics["advantage"]
    scale = next(c for c in controls if c.state == "scale")
    beside = "at the same retain loss" if scale.matched else "at the nearest retain loss it reaches"
    if gap.low > 0:
        return f"{text}; the canaries' loss is {gap.value:.3f} nats above that of merely scaling the update down {beside}."
    if gap.high < 0:
        return f"{text}; merely scaling the update down forgets MORE {beside}, by {-gap.value:.3f} nats a canary token."
    return f"{text}; the canaries' loss cannot be told from that of merely scaling the update down {beside}."
