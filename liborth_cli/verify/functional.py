"""Functional entanglement: what taking one stream out costs the other, measured on four models."""

from __future__ import annotations

import math

import numpy as np

from liborth_cli.measure.retention import retention
from liborth_cli.stream.weights import Moved
from liborth_cli.verify.intervals import measured, totals
from liborth_cli.verify.result import Metric, Table
from liborth_cli.verify.subject import Subject

STATES = (("reference", "neither"), ("general", "skill only"), ("memory", "memory only"), ("finetuned", "both"))


def costs(subject: Subject) -> tuple[dict[str, Metric], Table | None]:
    """Score W_r, W_r + S, W_r + M and W_r + S + M, and compare.

    With L the loss on retain data and C that of the canaries, both mean nats a token:

    - skill cost (L(W_r + S) − L(W_f)) / (L(W_r) − L(W_f)): the share of the skill that goes with the memory; 1 − retention;
    - memory cost (C(W_r + M) − C(W_f)) / (C(W_r) − C(W_f)): the share of the memory that goes with the skill.

    Both are 0 when the streams do not need each other. Intervals: rows resampled. W_r + M is formed while it is read.

    Returns:
        "skill_cost" where there is retain data, "memory_cost" where there are canaries; and the four models' losses.
    """
    lists = [name for name in ("retain", "canaries") if name in subject.evaluators]
    if not lists:
        return {}, None
    states = subject.states
    states.setdefault("memory", Moved(states["reference"], 1.0, states["finetuned"], states["general"]))
    sums = {(rows, state): totals(subject.score(rows, state))[0] for rows in lists for state, _ in STATES}
    metrics = {}
    for rows, without, name, meaning in (
        ("retain", "general", "skill_cost", "share of the skill that goes when the memory is taken out"),
        ("canaries", "memory", "memory_cost", "share of the memory that goes when the skill is taken out"),
    ):
        if rows in lists:
            neither, both = sums[rows, "reference"], sums[rows, "finetuned"]
            metrics[name] = share_lost(neither, sums[rows, without], both, subject.seed, meaning)
    counts = {rows: float(totals(subject.score(rows, "general"))[1].sum()) for rows in lists}
    cells = tuple((title, *(float(sums[rows, state].sum()) / counts[rows] for rows in lists)) for state, title in STATES)
    names = {"retain": ">loss, retain data", "canaries": ">loss, canaries"}
    return metrics, Table("Four models: which stream needs which", ("streams", *(names[rows] for rows in lists)), cells)


def share_lost(neither: np.ndarray, without: np.ndarray, both: np.ndarray, seed: int, meaning: str) -> Metric:
    """Return (without − both) / (neither − both) of summed losses, (n,) each, with its interval over rows."""

    def statistic(w: np.ndarray) -> np.ndarray:
        return 1 - retention(w @ neither, w @ without, w @ both)

    return measured(statistic, len(both), seed, meaning)


def costs_sentence(metrics: dict[str, Metric]) -> list[str]:
    """Say what the costs are."""
    found = []
    for name, first, second in (("skill_cost", "memory", "skill"), ("memory_cost", "skill", "memory")):
        if name in metrics and math.isfinite(metrics[name].value):
            found.append(f"Taking the {first} out costs {metrics[name].value:.1%} of the {second}.")
    return found
