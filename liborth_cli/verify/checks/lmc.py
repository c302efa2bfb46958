"""`--lmc`: is the loss smooth on the straight lines reference ↔ general ↔ fine-tuned, and on curved ones?"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from liborth_cli.errors import OutOfResources
from liborth_cli.verify import statistics
from liborth_cli.verify.check import Check, Need, Options, Part, Work, option, scorings
from liborth_cli.verify.held_out import estimate
from liborth_cli.verify.lines import SampledRows, above_chord, deciding
from liborth_cli.verify.result import Facts, Metric, Plot, Result, Series, Table
from liborth_cli.verify.subject import STATES, Subject

POINTS = 11
GRID = np.linspace(0.0, 1.0, POINTS)
PATHS = (("reference", "general"), ("general", "finetuned"))
WAYS = ("straight", "bezier", "geodesic")
"""That --curved compares."""
LEAST_CURVED = 4
"""Different rows, for two halves of each of which something is left to judge by."""


@dataclass
class LmcFacts(Facts):
    """Where on the lines was measured, and on how many of the retain rows at each point of each line."""

    points: list[float]
    rows: dict[str, list[int]]


@dataclass(frozen=True)
class LmcOptions(Options):
    """Which paths are measured."""

    curved: bool = option(False, "--lmc along a trained bend and a geodesic, too, on the half of the rows that neither saw.")
    curve_steps: int = option(200, "Steps that train the bend of --curved.", least=1)


def run(subject: Subject, options: LmcOptions) -> Result:
    """Measure the loss barrier on both lines, with weights interpolated tensor by tensor while they are read.

    L(W) is the mean loss a token of the retain rows, W_t = (1 − t)·W_0 + t·W_1 for every tensor (any shape), in float32. The
    barrier is max_t [L(W_t) − ((1 − t)·L(W_0) + t·L(W_1))] over 11 points (Frankle et al. 2020, arXiv 1912.05671; Entezari et
    al. 2022, arXiv 2110.06296): the highest rise above the chord, not max − min, so a loss that only falls or only rises has
    none, and it is never below 0. Interval: rows resampled, all points of a line with the same rows. The maximum of noisy
    differences leans upwards, so the interval errs against the model. A point that cannot hold the maximum is scored on a
    sample of the rows only (`liborth_cli.verify.lines`). With --curved, see `curved`, all points are scored on all rows.

    Raises:
        OutOfResources: when the bend of --curved does not fit into memory.
    """
    paths = _paths(subject)
    metrics: dict[str, Metric] = {}
    curves, sentences, facts = [], [], LmcFacts(GRID.tolist(), {})
    groups, rows = subject.groups("retain"), len(subject.rows("retain"))
    for start, end in paths:
        names = [subject.states.point(start, end, float(t)) for t in GRID]
        whole = _score(subject, names, f"{start} to {end}", everything=options.curved)
        scores = [subject.score("retain", names[i]) for i in whole]
        table, tokens = np.stack([statistics.totals(one)[0] for one in scores]), statistics.totals(scores[0])[1]
        other = start if end == "general" else end
        metrics[f"barrier_{other}"] = barrier((table, tokens, groups), GRID[whole], subject.seed, f"{start} to {end}")
        found = dict(zip(whole, statistics.curve(table, tokens, groups, subject.seed), strict=True))
        for number, (t, name) in enumerate(zip(GRID, names, strict=True)):
            if number not in found:
                found[number] = subject.drawn(name, (1 - t) * table[0] + t * table[-1])
        points = [found[number] for number in range(POINTS)]
        value, low, high = (tuple(getattr(m, side) for m in points) for side in ("value", "low", "high"))
        curves.append(Series(f"{start} to {end}", tuple(GRID.tolist()), value, low, high))
        peak = GRID[whole][int(above_chord(table.sum(1) / tokens.sum(), GRID[whole]).argmax())]
        sentences.append(f"{start} to {end}: {_number(metrics[f'barrier_{other}'])} at t = {peak:g}")
        facts.rows[f"{start} to {end}"] = [rows if number in whole else len(subject.sample.numbers) for number in range(POINTS)]
    highest = max(metrics.values(), key=lambda metric: metric.value)
    top = Metric(
        highest.value, max(m.low for m in metrics.values()), max(m.high for m in metrics.values()),
        "highest barrier of the lines, nats a token",
    )  # fmt: skip
    verdict = f"The loss rises at most {_number(top)} above the chord of the models it connects ({'; '.join(sentences)})."
    if top.high == 0.0:
        lines = " and from ".join(f"{start} to {end}" for start, end in paths)
        verdict = f"The barrier is 0: from {lines} the loss on the retain data stays below the chord."
    if lower := sum(count < rows for counts in facts.rows.values() for count in counts):
        verdict += f" {lower} of {len(paths) * POINTS} points lie lower on {subject.sample.words}; the others are of all rows."
    plot = Plot(
        "Loss on the lines between the models", f"Mean loss on the retain data at {POINTS} points of each line. {verdict}",
        "t", "loss, nats a token", tuple(curves),
    )  # fmt: skip
    result = Result("lmc", verdict, None, {"barrier": top, **metrics}, [plot], facts)
    return curved(subject, options, paths, result) if options.curved else result


def _score(subject: Subject, names: Sequence[str], line: str, everything: bool) -> list[int]:
    """Score the points of a line, and return the numbers of those that were scored on all rows; the ends are among them."""
    states, sample, inner = subject.states, subject.sample, range(1, POINTS - 1)
    with subject.console.progress(line, POINTS, "models") as progress:
        if everything or sample.whole:
            states.score_all(["retain"], names, progress.advance)
            return list(range(POINTS))
        states.score_all([sample.name], [names[i] for i in inner], progress.advance)
        states.score_all(["retain"], [names[0], names[-1]], progress.advance)

    def sums(number: int, rows: str = "retain") -> np.ndarray:
        return statistics.totals(subject.score(rows, names[number]))[0]

    ends, tokens = (sums(0), sums(POINTS - 1)), statistics.totals(subject.score("retain", names[0]))[1]

    def rise(number: int) -> float:
        table = np.stack([ends[0], sums(number), ends[1]]).sum(1) / tokens.sum()
        return float(above_chord(table, GRID[[0, number, -1]])[1])

    at, groups = sample.numbers, subject.groups("retain")
    seen = np.stack([ends[0][at], *(sums(i, sample.name) for i in inner), ends[1][at]])
    part = SampledRows(seen, tokens[at], groups[at], GRID, len(np.unique(groups)))
    return [0, *deciding(part, rise), POINTS - 1]


def curved(subject: Subject, options: LmcOptions, paths: Sequence[tuple[str, str]], straight: Result) -> Result:
    """Add what two curved ways between the same models do, beside the straight one, on rows that neither has seen.

    The retain rows are divided in two. On one half the bend of a Bézier curve is trained (Garipov et al. 2018, arXiv
    1802.10026), by two thirds of it and judged by the rest, and the retain curvature at both ends is measured, whose geodesic
    needs no training; on the other half the loss is measured at the same 11 points of all three. With curvature of one end
    alone the geodesic is the straight line (docs/origins.md).

    Raises:
        OutOfResources: when the bend does not fit into memory.
    """
    from liborth_cli.curvature.factor_set import FactorSet
    from liborth_cli.ends import Ends
    from liborth_cli.machine import spare_bytes, too_large
    from liborth_cli.verify.curves import COPIES, Bezier, Geodesic, train_bend

    states, rows, groups = subject.states, subject.rows("retain"), subject.groups("retain")
    names = np.unique(groups)
    seen, judged = np.isin(groups, names[::2]), np.isin(groups, names[::2][1::3])
    train, learnt, judge, rest = ([rows[i] for i in np.flatnonzero(part)] for part in (seen, seen & ~judged, judged, ~seen))
    held = np.unique(groups[~seen], return_inverse=True)[1]
    model = states.model("general")
    if too_much := too_large(4 * COPIES * model.elements):
        raise OutOfResources(f"--curved trains a bend in memory: {too_much}; leave it out")
    series, metrics, means = list[Series](), dict[str, list[Metric]](), list[tuple[str | float, ...]]()
    with ExitStack() as stack, subject.console.progress("curves", len(paths) * options.curve_steps, "steps") as progress:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="liborth-verify-")))
        sets = {
            name: stack.enter_context(FactorSet.open(estimate(subject, name, train, folder / name)))
            for name in dict.fromkeys(name for path in paths for name in path)
        }
        for start, end in paths:
            first, last = states.weights[start], states.weights[end]
            bend = train_bend(
                states.model(start), (first, last), (learnt, judge), options.curve_steps, subject.seed, progress.advance
            )
            ends = Ends(sets[start], sets[end], keep=spare_bytes() // 4)
            # The straight line was scored when it was drawn.
            drawn = [subject.score("retain", states.point(start, end, float(t))) for t in GRID]
            line = [[scores[i] for i in np.flatnonzero(~seen)] for scores in drawn]
            inside = [float(t) for t in GRID[1:-1]]
            ways = {
                "straight": line,
                "bezier": [line[0], *(states.score_rows(rest, Bezier(first, bend, last, t)) for t in inside), line[-1]],
                "geodesic": [line[0], *(states.score_rows(rest, Geodesic(first, last, ends, t)) for t in inside), line[-1]],
            }
            found = list[str | float]()
            for way, scores in ways.items():
                table, tokens = np.stack([statistics.totals(one)[0] for one in scores]), statistics.totals(scores[0])[1]
                top = barrier((table, tokens, held), GRID, subject.seed, f"{way}, {start} to {end}")
                metrics.setdefault(way, []).append(top)
                losses = table.sum(1) / tokens.sum()
                series.append(Series(f"{start} to {end}, {way}", tuple(GRID.tolist()), tuple(losses.tolist())))
                found += [top.value, float(losses[1:-1].mean())]
            means.append((f"{start} to {end}", *found))
    highest = {f"barrier_{way}": max(some, key=lambda metric: metric.value) for way, some in metrics.items()}
    told = ", ".join(f"{way} {highest[f'barrier_{way}'].value:.4f}" for way in WAYS)
    verdict = f"On the rows that the curves have not seen the highest barriers are, in nats a token: {told}."
    columns = ("path", *(f">{way}: {what}" for way in WAYS for what in ("barrier", "mean loss")))
    figures = [
        *straight.figures,
        Plot(
            "Loss on straight and curved ways", f"Held-out half of the retain data. {verdict}",
            "t", "loss, nats a token", tuple(series),
        ),
        Table("Straight and curved ways: barrier, and mean loss between the ends", columns, tuple(means)),
    ]  # fmt: skip
    return replace(straight, verdict=f"{straight.verdict} {verdict}", metrics=straight.metrics | highest, figures=figures)


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
        return above_chord(((weights @ table.T) / (weights @ tokens)[:, None]).T, grid).max(0)

    return statistics.bootstrap(statistic, [groups], seed, f"loss barrier, {name}, nats a token", statistics.LOSS)


def _number(metric: Metric) -> str:
    most = f"at most {metric.high:.4f}" if math.isfinite(metric.high) else "too few different rows for an interval"
    return f"{metric.value:.4f} nats ({most})"


def _paths(subject: Subject) -> list[tuple[str, str]]:
    """Return the lines whose ends are there."""
    there = {"reference": subject.reference, "general": subject.general, "finetuned": subject.finetuned}
    return [path for path in PATHS if all(there[name] is not None for name in path)]


def _work(subject: Subject, options: LmcOptions) -> Work | None:
    """Count the straight lines, with all rows at every point; the training of bends is not counted."""
    points = [subject.states.point(start, end, float(t)) for t in GRID for start, end in _paths(subject)]
    scored = scorings(subject, ("retain",), points)
    scored |= scorings(subject, (subject.sample.name,), [name for name in points if name not in STATES])
    return None if options.curved else Work(scored)


def _lacks(subject: Subject, options: LmcOptions) -> str:
    """Say why a bend cannot be trained on half of the retain rows."""
    if not options.curved:
        return ""
    data, context = subject.data["retain"], subject.states.model("general").context
    if data.different < LEAST_CURVED:
        return f"{LEAST_CURVED} different retain rows for --curved, which divides them in two, and there are {data.different}"
    longer = any(context and row.tokens > context for row in subject.rows("retain"))
    return "whole rows for --curved, which trains on them: leave out --slide" if longer else ""


CHECK = Check(
    name="lmc",
    title="Linear mode connectivity",
    words="Loss barriers: reference to general to fine-tuned.",
    part=Part.MECHANISM,
    run=run,
    metrics=("barrier", "barrier_reference", "barrier_finetuned", "barrier_straight", "barrier_bezier", "barrier_geodesic"),
    needs=(Need.RETAIN, Need.REFERENCE | Need.FINETUNED),
    cheap=True,
    work=_work,
    lacks=_lacks,
    options=LmcOptions,
    controls=True,
)
