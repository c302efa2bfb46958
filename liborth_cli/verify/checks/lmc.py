"""`--lmc`: is the loss smooth on the straight lines reference ↔ general ↔ fine-tuned?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from liborth_cli.verify import statistics
from liborth_cli.verify.check import Check, Need, Options, Part
from liborth_cli.verify.result import Facts, Metric, Plot, Result, Series
from liborth_cli.verify.subject import Subject

POINTS = 11
PATHS = (("reference", "general"), ("general", "finetuned"))


@dataclass
class LmcFacts(Facts):
    """Where on the line was measured."""

    points: list[float]


def run(subject: Subject, options: Options) -> Result:
    """Measure the loss barrier on both lines, with weights interpolated tensor by tensor while they are read.

    L(W) is the mean loss a token of the retain rows, W_t = (1 − t)·W_0 + t·W_1 for every tensor (any shape), in float32. The
    barrier is max_t [L(W_t) − ((1 − t)·L(W_0) + t·L(W_1))] over 11 points (Frankle et al. 2020, arXiv 1912.05671; Entezari et
    al. 2022, arXiv 2110.06296): the highest rise above the chord, not max − min, so a loss that only falls or only rises has
    none, and it is never below 0. Interval: rows resampled, all points of a line with the same rows. The maximum of noisy
    differences leans upwards, so the interval errs against the model.
    """
    there = {"reference": subject.reference, "general": subject.general, "finetuned": subject.finetuned}
    paths = [path for path in PATHS if all(there[name] is not None for name in path)]
    metrics: dict[str, Metric] = {}
    curves, sentences = [], []
    grid, groups = np.linspace(0.0, 1.0, POINTS), subject.groups("retain")
    points = [[subject.states.point(start, end, float(t)) for t in grid] for start, end in paths]
    with subject.console.progress("lines", len(paths) * POINTS, "models") as progress:
        for name in (name for names in points for name in names):
            subject.score("retain", name)
            progress.advance(1)
    for (start, end), names in zip(paths, points, strict=True):
        table = np.stack([statistics.totals(subject.score("retain", name))[0] for name in names])
        tokens = statistics.totals(subject.score("retain", start))[1]
        other = start if end == "general" else end
        metrics[f"barrier_{other}"] = barrier((table, tokens, groups), grid, subject.seed, f"{start} to {end}")
        found = statistics.curve(table, tokens, groups, subject.seed)
        losses = np.array([m.value for m in found])
        value, low, high = (tuple(getattr(m, side) for m in found) for side in ("value", "low", "high"))
        curves.append(Series(f"{start} to {end}", tuple(grid.tolist()), value, low, high))
        peak = grid[int(_above_chord(losses, grid).argmax())]
        sentences.append(f"{start} to {end}: {_number(metrics[f'barrier_{other}'])} at t = {peak:g}")
    highest = max(metrics.values(), key=lambda metric: metric.value)
    top = Metric(
        highest.value, max(m.low for m in metrics.values()), max(m.high for m in metrics.values()),
        "highest barrier of the lines, nats a token",
    )  # fmt: skip
    verdict = f"The loss rises at most {_number(top)} above the chord of the models it connects ({'; '.join(sentences)})."
    if top.high == 0.0:
        lines = " and from ".join(f"{start} to {end}" for start, end in paths)
        verdict = f"The barrier is 0: from {lines} the loss on the retain data stays below the chord."
    plot = Plot(
        "Loss on the lines between the models", f"Mean loss on the retain data at {POINTS} points of each line. {verdict}",
        "t", "loss, nats a token", tuple(curves),
    )  # fmt: skip
    return Result("lmc", verdict, None, {"barrier": top, **metrics}, [plot], LmcFacts(grid.tolist()))


def barrier(rows: tuple[np.ndarray, np.ndarray, np.ndarray], grid: np.ndarray, seed: int, name: str) -> Metric:
    """Return the barrier of one line with its interval.

    Args:
        rows: summed loss of every row at every point, (points, rows); loss-carrying tokens of every row, (rows,); its group.
        grid: t of the points, (points,), the ends included.
        seed: of the resampling.
        name: of the line.
    """
    table, tokens, groups = rows

    def statistic(weights: np.ndarray) -> np.ndarray:
        return _above_chord((weights @ table.T) / (weights @ tokens)[:, None], grid).max(1)

    return statistics.bootstrap(statistic, [groups], seed, f"loss barrier, {name}, nats a token", statistics.LOSS)


def _above_chord(losses: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return L(W_t) minus the chord, (…, points), exactly 0 at both ends."""
    rise = losses - ((1 - grid) * losses[..., :1] + grid * losses[..., -1:])
    rise[..., [0, -1]] = 0.0
    return rise


def _number(metric: Metric) -> str:
    return f"{metric.value:.4f} nats (at most {metric.high:.4f})"


CHECK = Check(
    name="lmc",
    title="Linear mode connectivity",
    words="Loss barriers: reference to general to fine-tuned.",
    part=Part.MECHANISM,
    run=run,
    metrics=("barrier", "barrier_reference", "barrier_finetuned"),
    needs=(Need.RETAIN, Need.REFERENCE | Need.FINETUNED),
    cheap=True,
    controls=True,
)
