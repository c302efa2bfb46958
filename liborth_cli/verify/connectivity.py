"""`--lmc`: is the loss smooth on the straight lines reference ↔ general ↔ fine-tuned?"""

from __future__ import annotations

import numpy as np

from liborth_cli.verify.intervals import draw as resample
from liborth_cli.verify.intervals import measured, spread, totals
from liborth_cli.verify.result import Metric, Plot, Result, Series
from liborth_cli.verify.subject import Subject

METRICS = ("barrier", "barrier_reference", "barrier_finetuned")
POINTS = 11
PATHS = (("reference", "general"), ("general", "finetuned"))


def run(subject: Subject) -> Result:
    """Measure the loss barrier on both lines, with weights interpolated tensor by tensor while they are read.

    L(W) is the mean loss a token of the retain rows, W_t = (1 − t)·W_0 + t·W_1 for every tensor (any shape), in float32. The
    barrier is max_t [L(W_t) − ((1 − t)·L(W_0) + t·L(W_1))] over 11 points (Frankle et al. 2020, arXiv 1912.05671; Entezari et
    al. 2022, arXiv 2110.06296): the highest rise above the chord, not max − min, so a loss that only falls or only rises has
    none, and it is never below 0. Interval: rows resampled, all points of a line with the same rows. The maximum of noisy
    differences leans upwards, so the interval errs against the model.

    Raises:
        UsageError: without retain data, or with neither a reference nor a fine-tuned checkpoint.
    """
    subject.need("retain", "lmc", "--retain-data: text of the skill that must stay")
    paths = [path for path in PATHS if all(name in subject.states for name in path)]
    if not paths:
        subject.need("reference", "lmc", "a checkpoint to compare with: --reference or --finetuned")
    metrics: dict[str, Metric] = {}
    curves, sentences = [], []
    grid = np.linspace(0.0, 1.0, POINTS)
    for start, end in paths:
        table = np.stack([totals(subject.score("retain", subject.point(start, end, float(t))))[0] for t in grid])
        tokens = totals(subject.score("retain", start))[1]
        other = start if end == "general" else end
        metrics[f"barrier_{other}"] = barrier(table, tokens, grid, subject.seed, f"{start} to {end}")
        curves.append(_curve(table, tokens, grid, f"{start} to {end}", subject.seed))
        losses = table.sum(1) / tokens.sum()
        sentences.append(f"{start} to {end}: {_number(metrics[f'barrier_{other}'])} at t = {grid[_peak(losses, grid)]:g}")
    highest = max(metrics.values(), key=lambda metric: metric.value)
    top = Metric(
        highest.value, max(m.low for m in metrics.values()), max(m.high for m in metrics.values()),
        "highest barrier of the lines, nats a token",
    )  # fmt: skip
    verdict = f"The loss rises at most {_number(top)} above the chord of the models it connects ({'; '.join(sentences)})."
    if top.high == 0.0:
        lines = " and from ".join(f"{start} to {end}" for start, end in paths)
        verdict = f"No barrier: from {lines} the loss on the retain data stays below the chord."
    plot = Plot(
        "Loss on the lines between the models", f"Mean loss on the retain data at {POINTS} points of each line. {verdict}",
        "t", "loss, nats a token", tuple(curves),
    )  # fmt: skip
    return Result("lmc", verdict, None, {"barrier": top, **metrics}, [plot], {"points": grid.tolist()})


def barrier(table: np.ndarray, tokens: np.ndarray, grid: np.ndarray, seed: int, name: str) -> Metric:
    """Return the barrier of one line with its interval.

    Args:
        table: summed loss of every row at every point, (points, rows).
        tokens: loss-carrying tokens of every row, (rows,).
        grid: t of the points, (points,), the ends included.
        seed: of the resampling.
        name: of the line.
    """

    def statistic(weights: np.ndarray) -> np.ndarray:
        return _above_chord((weights @ table.T) / (weights @ tokens)[:, None], grid).max(1)

    return measured(statistic, table.shape[1], seed, f"loss barrier, {name}, nats a token", (0.0, np.inf))


def _above_chord(losses: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return L(W_t) minus the chord, (…, points), exactly 0 at both ends."""
    rise = losses - ((1 - grid) * losses[..., :1] + grid * losses[..., -1:])
    rise[..., [0, -1]] = 0.0
    return rise


def _peak(losses: np.ndarray, grid: np.ndarray) -> int:
    return int(_above_chord(losses, grid).argmax())


def _curve(table: np.ndarray, tokens: np.ndarray, grid: np.ndarray, label: str, seed: int) -> Series:
    losses, count = table.sum(1) / tokens.sum(), table.shape[1]
    if count < 2:
        return Series(label, tuple(grid.tolist()), tuple(losses.tolist()))
    weights = resample(count, seed)
    found = (weights @ table.T) / (weights @ tokens)[:, None]
    ends = [spread(float(value), found[:, i], count, (0.0, np.inf)) for i, value in enumerate(losses)]
    low, high = zip(*ends, strict=True)
    return Series(label, tuple(grid.tolist()), tuple(losses.tolist()), low, high)


def _number(metric: Metric) -> str:
    return f"{metric.value:.4f} nats (at most {metric.high:.4f})"
