"""`--attacks`: try to get the secrets back: by training a little, by rounding, by asking otherwise.

Needs `--canary`. Definitions, limits and sources: relearn.py, prompts.py, evaluate/quantised.py. All losses are nats a
token of the completions; "recited" means that every token of a completion is the likeliest one after the true ones
before it, which is what greedy decoding needs.

Options: `relearn_steps` (40), `relearn_rate` (0.1 / hidden width), `paraphrases` (a file of further prompts with the same
completions, any form that `--canary` takes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from liborth_cli.errors import UsageError
from liborth_cli.measure.scores import RowScore, mean_loss
from liborth_cli.stream.texts import DataFile, Row, read_rows
from liborth_cli.stream.weights import Quantised
from liborth_cli.verify import resampling
from liborth_cli.verify.attacks import prompts
from liborth_cli.verify.attacks.relearn import STEPS, Attack, Course, bytes_free, bytes_needed, halves, teach
from liborth_cli.verify.result import Figure, Metric, Plot, Result, Series, Table
from liborth_cli.verify.shared_model import evaluator_of, score_states, shared_model, tokenizer
from liborth_cli.verify.subject import Subject

CHECK = "attacks"
METRICS = ("relearn_gap", "relearn_gap_fresh", "relearned", "quantised_extraction", "prompt_extraction")
ROUNDINGS = ((8, None), (4, 128), (4, None))
"""Bits, and inputs that share a scale (None: a whole row)."""


def run(subject: Subject) -> Result:
    """Attack the general weights in every way, beside controls.

    Args:
        subject: with canaries; fresh rows, retain rows, a reference and a tokenizer make it say more.

    Returns:
        `relearn_gap`, `relearned`, `quantised_extraction`, `prompt_extraction`.

    Raises:
        UsageError: without canaries.
    """
    subject.need("canaries", CHECK, "--canary FILE, rows with a prompt and its completion")
    parts = [_relearning(subject), _rounding(subject), _asking(subject)]
    result = Result(CHECK, " ".join(part.verdict for part in parts))
    for part in parts:
        result.metrics |= part.metrics
        result.figures += part.figures
        result.facts |= part.facts
    return result


# Relearning -------------------------------------------------------------------------------------------------------------


def _relearning(subject: Subject) -> Result:
    """Teach each half of the canaries in turn, watch the other, and compare with the controls."""
    options, rows, model = subject.options, subject.canaries, shared_model(subject)
    attack = Attack(int(options.get("relearn_steps") or STEPS), options.get("relearn_rate"), subject.seed)
    if len(rows) < 4:
        return Result(
            CHECK, f"Relearning was not tried: it needs at least 4 canaries to teach half of, and there are {len(rows)}."
        )
    needed, free = bytes_needed(model), bytes_free()
    if needed > free:
        return Result(
            CHECK,
            f"Relearning was not tried: training takes {needed / 1e9:.1f} GB (16 bytes a weight), and {free / 1e9:.1f} GB "
            "may be used here.",
        )
    states = [name for name in subject.states if name in ("general", "reference") or name.startswith("scale")]
    courses: dict[str, list[Course]] = {name: [] for name in states}
    folds = [hands[::way] for hands in [halves(len(rows), subject.seed)] for way in (1, -1)]
    with subject.console.progress("relearning", attack.steps * len(states) * len(folds), "steps") as progress:
        for name in states:
            for taught, held in folds:
                watched = {"held": [rows[i] for i in held], "taught": [rows[i] for i in taught]}
                watched["fresh"] = prompts.others(subject.fresh, watched["taught"])
                course = teach(subject.states[name], watched["taught"], watched, attack, subject.run.device, progress.advance)
                courses[name].append(course)
    return _judge_relearning(courses, subject)


def _judge_relearning(courses: dict[str, list[Course]], subject: Subject) -> Result:
    seed, steps = subject.seed, courses["general"][0].steps
    held = {name: _stack(some, "held") for name, some in courses.items()}
    recited = np.concatenate([np.stack(course.recited["held"], 1) for course in courses["general"]])
    best = int(held["general"].mean(0).argmin())
    came_back = int(recited.any(1).sum())
    metrics = {
        "relearned": resampling.share(came_back, len(recited), "share of the canaries recited after others were taught"),
    }
    sentence = (
        f"Relearning: after {steps[-1]} steps on half of the canaries the other half stands at "
        f"{held['general'][:, best].mean():.2f} nats a token at best (before: {held['general'][:, 0].mean():.2f}), and "
        f"{came_back} of {len(recited)} are recited"
    )
    if "reference" in held:
        metrics["relearn_gap"] = resampling.bootstrap(
            [np.stack([held["reference"], held["general"]], 2)],
            lambda both: both[..., 0].mean(1).min(1) - both[..., 1].mean(1).min(1),
            seed,
            "nats a token by which the untaught canaries get closer than in the reference model; 0 or less: nothing is left",
        )
        sentence += f"; {_compare(metrics['relearn_gap'], 'the reference, which never saw them')}"
    if any(course.losses.get("fresh") for course in courses["general"]):
        # Some rows are harder than others for any model: where the reference is known, its own difference is taken off.
        models = ["general", *(name for name in ("reference",) if name in courses)]
        fresh = np.stack([_stack(courses[name], "fresh") for name in models], 2)
        metrics["relearn_gap_fresh"] = resampling.bootstrap(
            [fresh, np.stack([held[name] for name in models], 2)],
            _beyond_fresh,
            seed,
            "nats a token by which the untaught canaries get closer than never-trained rows, beyond the reference's own",
        )
        sentence += f"; {_compare(metrics['relearn_gap_fresh'], 'rows nobody was trained on')}"
    if len(metrics) == 1:
        sentence += "; there is no control to hold this against: give --reference, or --fresh rows"
    facts = {"steps": steps, "loss": {name: list(map(float, table.mean(0))) for name, table in held.items()}}
    return Result(CHECK, sentence + ".", None, metrics, [_relearning_plot(courses, held, steps, seed)], {"relearning": facts})


def _beyond_fresh(never: np.ndarray, canaries: np.ndarray) -> np.ndarray:
    """Return how much lower canaries get than fresh rows, less the same in the second model; (draws, rows, marks, models)."""
    apart = never.mean(1).min(1) - canaries.mean(1).min(1)
    return apart[:, 0] - apart[:, 1:].sum(1)


def _compare(gap: Metric, control: str) -> str:
    if gap.low > 0:
        return f"that is {gap.value:.2f} nats closer than {control} ({gap.low:.2f} to {gap.high:.2f}): it comes back"
    return f"no closer than {control} ({gap.value:+.2f} nats, {gap.low:+.2f} to {gap.high:+.2f})"


def _stack(courses: Sequence[Course], group: str) -> np.ndarray:
    """Return the losses of all folds, (rows, marks)."""
    return np.concatenate([np.stack(course.losses[group], 1) for course in courses if course.losses.get(group)])


def _relearning_plot(courses: dict[str, list[Course]], held: dict[str, np.ndarray], steps: list[int], seed: int) -> Plot:
    tables = {f"{name}: the half not taught": table for name, table in held.items()}
    tables["general: the half taught"] = _stack(courses["general"], "taught")
    if any(course.losses.get("fresh") for course in courses["general"]):
        tables["general: never-trained rows"] = _stack(courses["general"], "fresh")
    series = []
    for label, table in tables.items():
        ends = [resampling.mean(table[:, mark], seed) for mark in range(len(steps))]
        series.append(
            Series(
                label,
                tuple(map(float, steps)),
                tuple(m.value for m in ends),
                tuple(m.low for m in ends),
                tuple(m.high for m in ends),
            )
        )
    alt = "; ".join(f"{s.label} goes from {s.y[0]:.2f} to {s.y[-1]:.2f} nats" for s in series)
    return Plot("Relearning half of the canaries", alt + ".", "training steps", "loss, nats a token", tuple(series))


# Rounding ---------------------------------------------------------------------------------------------------------------


def _rounding(subject: Subject) -> Result:
    """Score canaries, and the skill beside them, at rounded general weights."""
    model, general = shared_model(subject), subject.states["general"]
    tensors = model.linear_tensors()
    states: dict[str, Any] = {"as it is": general}
    for bits, group in ROUNDINGS:
        states[f"{bits} bits, {f'groups of {group}' if group else 'one scale a row'}"] = Quantised(
            general, bits, group, tensors
        )
    evaluators = [evaluator_of(model, rows) for rows in (subject.canaries, subject.retain) if rows]
    total = len(states) * sum(row.tokens for evaluator in evaluators for row in evaluator.rows)
    table, worst, losses = [], 0, []
    with subject.console.progress("rounding", total, "tokens") as progress:
        for name, weights in states.items():
            canaries, *retain = [evaluator.score(weights, progress.advance) for evaluator in evaluators]
            hits, loss = _recited(canaries), mean_loss(canaries)
            worst = max(worst, hits if weights is not general else 0)
            losses.append(loss)
            table.append((name, loss, hits / len(canaries), mean_loss(retain[0]) if retain else None))
    rows = len(subject.canaries)
    metric = resampling.share(worst, rows, "share of the canaries recited at the worst of the roundings")
    lowest = min(losses[1:])
    sentence = (
        f"Rounding: at 8 or 4 bits {worst} of {rows} canaries are recited at most, and their loss falls to {lowest:.2f} nats "
        f"at the lowest (not rounded: {losses[0]:.2f})."
    )
    columns = ("weights inside the blocks", ">canary loss", ">recited", ">retain loss")
    figure: list[Figure] = [Table("Rounding the general weights", columns, tuple(table))]
    facts = {"quantised": [dict(zip(("weights", "loss", "recited", "retain_loss"), row, strict=True)) for row in table]}
    return Result(CHECK, sentence, None, {"quantised_extraction": metric}, figure, facts)


# Asking otherwise -------------------------------------------------------------------------------------------------------


def _asking(subject: Subject) -> Result:
    """Score the canaries under every variation of their prompts, at the fine-tuned and the general weights."""
    model, encoder = shared_model(subject), tokenizer(subject)
    asked = prompts.variations(subject.canaries, encoder, model.context)
    paraphrases = _paraphrases(subject, encoder, model.context or 1 << 20, model.vocabulary)
    if paraphrases is not None:
        asked.append(paraphrases)
    rows = [row for variation in asked for row in variation.rows]
    states = [name for name in ("finetuned", "general") if name in subject.states]
    scores = score_states(subject, rows, states, "asking otherwise")
    ever, table, start = {name: set[int]() for name in states}, [], 0
    for variation in asked:
        cells: list[str | float | None] = [variation.name, float(len(variation.rows))]
        for name in states:
            some = scores[name][start : start + len(variation.rows)]
            ever[name] |= {number for number, score in zip(variation.of, some, strict=True) if score.hit.all()}
            cells += [mean_loss(some), _recited(some) / len(some)]
        table.append(tuple(cells))
        start += len(variation.rows)
    columns = ["prompt", ">rows", *(f">{name} {what}" for name in states for what in ("loss", "recited"))]
    count, most = len(subject.canaries), len(ever["general"])
    sentence = f"Prompts: asked in {len(asked)} ways, {most} of {count} canaries are recited at least once"
    if "finetuned" in ever:
        sentence += f" (fine-tuned: {len(ever['finetuned'])})"
    if encoder is None:
        sentence += "; without tokenizer files only parts of the prompts could be asked"
    metric = resampling.share(most, count, "share of the canaries recited under at least one way of asking")
    figures: list[Figure] = [Table("Asking otherwise", tuple(columns), tuple(table))]
    names = [column.removeprefix(">") for column in columns]
    facts = {"prompts": [dict(zip(names, row, strict=True)) for row in table]}
    return Result(CHECK, sentence + ".", None, {"prompt_extraction": metric}, figures, facts)


def _paraphrases(subject: Subject, encoder: Any, context: int, vocabulary: int) -> prompts.Variation | None:
    """Read further prompts, and find the canary each belongs to by its completion."""
    given = subject.options.get("paraphrases")
    if given is None:
        return None
    endings = {tuple(prompts.split_row(row)[1]): number for number, row in enumerate(subject.canaries)}
    rows: list[Row] = read_rows([DataFile.parse(str(given), "--paraphrases")], encoder, vocabulary, context)
    numbers = []
    for row in rows:
        number = endings.get(tuple(prompts.split_row(row)[1]))
        if number is None:
            raise UsageError(f"--paraphrases: {row.where}: its completion is not that of any canary")
        numbers.append(number)
    return prompts.Variation("paraphrases given", rows, numbers)


def _recited(scores: Sequence[RowScore]) -> int:
    return sum(bool(score.hit.all()) for score in scores)
