"""`--membership`: how much less surprising is a canary than it was to the reference, and does that tell it from fresh rows?

A loss by itself mostly says how hard a text is. The difference to what the reference gives for the same text does not (Carlini
et al. 2022, arXiv 2112.03570; Mireshghallah et al. 2022, arXiv 2203.03929), and an edited checkpoint of a known base gives the
attacker that reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.verify import memorisation as m
from liborth_cli.verify import power, statistics
from liborth_cli.verify.check import Check, Need, Options, Part, Work, scorings
from liborth_cli.verify.result import Metric, Result, Table
from liborth_cli.verify.subject import STATES, Subject

if TYPE_CHECKING:
    from liborth_cli.measure.scores import RowScore

WINDOW = 8
"""Tokens over which a difference is averaged; the largest window of a row counts."""
FALSE_ALARMS = 0.01
"""Share of the fresh rows that may be taken for canaries."""


def run(subject: Subject, options: Options) -> Result:
    """Score rows by ℓ_reference − ℓ, nats a token, whole and in windows, and hold canaries against fresh rows.

    `calibrated_auc` and `calibrated_window_auc` are areas under the ROC curve of "a larger difference means canary": 0.5 when
    they cannot be told apart, and far below it when an edit pushed the canaries beyond what was never trained on.
    `calibrated_tpr` is the share of the canaries that are found at a threshold that 1 % of the fresh rows pass: the largest of
    whole rows and windows, in either direction. With fewer than 100 fresh rows none of them may pass; one direction of one
    score then finds a canary by chance with probability 1 / (rows + 1), and four are tried.
    """
    found = {name: _measure(subject, name) for name in subject.states.of(("general", "finetuned"))}
    metrics = {name: metric.beside(found.get("finetuned", {}).get(name)) for name, metric in found["general"].items()}
    tpr, count = metrics["calibrated_tpr"], len(subject.rows("fresh"))
    area = max((metrics["calibrated_auc"], metrics["calibrated_window_auc"]), key=lambda one: abs(one.value - 0.5))
    verdict = (
        f"By how far their loss fell since the reference, {tpr.value:.0%} of the canaries are found at 1 % false alarms "
        f"({tpr.low:.0%} to {tpr.high:.0%}; {count} fresh rows, and four scores, by chance at most {4 / (count + 1):.0%}"
        f"{f'; fine-tuned {tpr.finetuned:.0%}' if tpr.finetuned is not None else ''}); the worst AUC is {area.value:.2f}."
    )
    rows = tuple((state, *(metric.value for metric in some.values())) for state, some in found.items())
    table = Table("Membership, calibrated by the reference", ("model", *(f">{name}" for name in metrics)), rows)
    return Result("membership", verdict, None, metrics, [table])


def _measure(subject: Subject, state: str) -> dict[str, Metric]:
    canaries, fresh = (_gained(subject.score(rows, "reference"), subject.score(rows, state)) for rows in ("canaries", "fresh"))
    lists, seed, found = [subject.groups("canaries"), subject.groups("fresh")], subject.seed, dict[str, Metric]()
    tables = []
    for name, view, meaning in (
        ("calibrated_auc", _whole, "the loss that fell since the reference"),
        ("calibrated_window_auc", _window, f"the {WINDOW} tokens whose loss fell most since the reference"),
    ):
        ours, others = view(canaries), view(fresh)
        kernel = m.auc_kernel(ours.tolist(), others.tolist())
        found[name] = statistics.bootstrap(
            lambda w, v, k=kernel: ((w @ k) * v).sum(1) / (w.sum(1) * v.sum(1)), lists, seed,
            f"membership by {meaning}; 0.5: cannot be told apart", statistics.SHARE,
        )  # fmt: skip
        tables += [others[None, :] >= ours[:, None], others[None, :] <= ours[:, None]]
    meaning = f"share of the canaries found at {FALSE_ALARMS:.0%} false alarms, whole or in windows, above or below"
    found["calibrated_tpr"] = statistics.bootstrap(
        lambda w, v: np.max([_found(w, v, table) for table in tables], 0), lists, seed, meaning, statistics.SHARE
    )
    return found


def _found(canaries: np.ndarray, fresh: np.ndarray, beyond: np.ndarray) -> np.ndarray:
    """Return the share of canaries, (draws,), that at most `FALSE_ALARMS` of the fresh rows equal or exceed.

    Args:
        canaries: weights, (draws, n).
        fresh: weights, (draws, m).
        beyond: whether a fresh row is at least as extreme as a canary, (n, m).
    """
    alarms = (fresh @ beyond.T) / fresh.sum(1, keepdims=True)
    return (canaries * (alarms <= FALSE_ALARMS)).sum(1) / canaries.sum(1)


def _gained(before: Sequence[RowScore], after: Sequence[RowScore]) -> list[np.ndarray]:
    return [old.loss - new.loss for old, new in zip(before, after, strict=True)]


def _whole(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([row.mean() for row in rows])


def _window(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return the largest mean over a window of each row."""
    widths = [min(WINDOW, len(row)) for row in rows]
    return np.array([np.convolve(row, np.full(w, 1 / w), "valid").max() for row, w in zip(rows, widths, strict=True)])


CHECK = Check(
    name="membership",
    title="Membership against the reference",
    words="How far the canaries' loss fell since the reference, against --fresh.",
    part=Part.FRESH,
    run=run,
    metrics=("calibrated_auc", "calibrated_window_auc", "calibrated_tpr"),
    needs=(Need.CANARIES, Need.FRESH, Need.REFERENCE),
    cheap=True,
    work=lambda subject, options: Work(scorings(subject, ("canaries", "fresh"), subject.states.of(STATES))),
    power={"calibrated_auc": power.area, "calibrated_window_auc": power.area},
    controls=True,
)
