r"""`--tofu DIR`: forgetting and what it costs, by the measures of TOFU (Maini et al. 2024, arXiv 2401.06121).

From local files in TOFU's own format (JSON lines): one `forget*_perturbed.json`, `retain_perturbed.json`,
`real_authors_perturbed.json`, `world_facts_perturbed.json`. A row holds `question`, `answer`, several `perturbed_answer` (wrong
ones) and perhaps a `paraphrased_answer`; where there is none the answer stands for it. The prompt is
"Question: …\nAnswer: ", and with P(a) = exp(−mean loss a token of answer a):

- **probability**: P(answer); for real authors and world facts its share of P(answer) + Σ P(perturbed).
- **ROUGE-L recall** of the greedy answer, at most 200 tokens, against `answer`.
- **truth ratio** R = mean P(perturbed) / P(paraphrased); reported as max(0, 1 − R), on the forget set as min(R, 1/R).
- **model utility**: harmonic mean of the nine numbers of the three sets that are not to be forgotten.
- **forget quality**: p-value of the two-sided Kolmogorov–Smirnov test between the truth ratios on the forget set and those
  of a model that was retrained without it (`--tofu-retained MODEL`), both with the geometric mean over the perturbed
  answers, as in TOFU's program. Above 0.05 the two cannot be told apart.

Greedy answers need all weights in memory; the losses stream. Options: `tofu` (a directory), `tofu_forget` (such as "forget05";
otherwise the largest there is), `tofu_retained`, `limit` (rows a set, spread evenly).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from liborth_cli.checkpoint.hub import resolve
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import OutOfResources
from liborth_cli.measure import rouge
from liborth_cli.measure.generate import generate, hold
from liborth_cli.measure.scores import Evaluator
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.weights import Point, Weights
from liborth_cli.verify import resampling
from liborth_cli.verify.questions import completion_row, need_tokenizer
from liborth_cli.verify.result import Figure, Metric, Result, Table
from liborth_cli.verify.shared_model import shared_model
from liborth_cli.verify.subject import Subject
from liborth_cli.verify.tofu_files import FORGET, OPEN, SETS, Item, read_sets

CHECK = "tofu"
METRICS = (
    "tofu_forget_probability", "tofu_forget_rouge", "tofu_forget_truth_ratio", "tofu_model_utility", "tofu_forget_quality",
)  # fmt: skip
WRITTEN = 200
KINDS = ("probability", "rouge", "truth_ratio")


@dataclass(frozen=True)
class Numbers:
    """What one model scores on one set, a number a row.

    Attributes:
        values: (rows, 3): probability, ROUGE-L recall (NaN where nothing could be written), truth ratio as reported.
        raw_ratio: with the geometric mean over the perturbed answers, (rows,): what the KS test compares.
        texts: what was written.
    """

    values: np.ndarray
    raw_ratio: np.ndarray
    texts: list[str]


def run(subject: Subject) -> Result:
    """Score the general model, and reference and fine-tuned one beside it.

    Args:
        subject: with `options["tofu"]`.

    Returns:
        `tofu_forget_probability`, `tofu_forget_rouge`, `tofu_forget_truth_ratio`, `tofu_model_utility`, and with a retained
        model `tofu_forget_quality`.

    Raises:
        BadInput: when a file is missing, malformed, or a row longer than the context; without a tokenizer.
    """
    encoder, model = need_tokenizer(subject, CHECK), shared_model(subject)
    name, sets = read_sets(subject.options["tofu"], subject.options.get("tofu_forget"), subject.options.get("limit"))
    states = [state for state in ("reference", "finetuned", "general") if state in subject.states]
    found: dict[str, dict[str, Numbers]] = {}
    total = len(states) * sum(len(items) for items in sets.values())
    with subject.console.progress("TOFU", total, "questions") as progress:
        for state in states:
            found[state] = {}
            for group, items in sets.items():
                found[state][group] = measure(model, subject.states[state], encoder, items, group)
                progress.advance(len(items))
    retained = _retained(subject, encoder, sets[FORGET])
    return _report(subject, name, sets, found, retained)


def measure(model: BlockModel, weights: Weights, encoder: TextEncoder, items: Sequence[Item], group: str) -> Numbers:
    """Score one model on one set.

    Args:
        model: of the weights' shapes.
        weights: what is scored.
        encoder: the tokenizer.
        items: the questions.
        group: name of the set; it decides how probability and truth ratio are reported.

    Returns:
        The numbers.
    """
    losses = answer_losses(model, weights, encoder, items)
    texts = written_answers(model, weights, encoder, items)
    probability, ratio, raw = [], [], []
    for answer, paraphrased, *perturbed in losses:
        true, wrong = np.exp(-answer), np.exp(-np.array(perturbed))
        probability.append(true / (true + wrong.sum()) if group in OPEN else true)
        r = wrong.mean() / np.exp(-paraphrased)
        ratio.append(min(r, 1 / r) if group == FORGET else max(0.0, 1 - r))
        raw.append(np.exp(np.mean(perturbed) - paraphrased))
    recalls = [rouge.recall(item.answer, text) for item, text in zip(items, texts, strict=False)] or [np.nan] * len(items)
    return Numbers(np.stack([probability, recalls, ratio], 1), np.array(raw), texts)


def answer_losses(model: BlockModel, weights: Weights, encoder: TextEncoder, items: Sequence[Item]) -> list[list[float]]:
    """Return, for each question, the mean loss a token of its answer, the paraphrased and the perturbed ones, in nats."""
    rows = [
        completion_row(encoder, item.prompt, answer, model.context, item.where)
        for item in items
        for answer in (item.answer, item.paraphrased, *item.perturbed)
    ]
    scores = iter(Evaluator(model, rows).score(weights))
    return [[float(next(scores).loss.mean()) for _ in range(2 + len(item.perturbed))] for item in items]


def written_answers(model: BlockModel, weights: Weights, encoder: TextEncoder, items: Sequence[Item]) -> list[str]:
    """Return the greedy answer to each question; nothing when the weights do not fit into memory."""
    try:
        hold(model, weights)
    except OutOfResources:
        return []
    return [encoder.decode(ids) for ids in generate(model, [encoder.prompt(item.prompt) for item in items], WRITTEN)]


def utility(*groups: np.ndarray) -> np.ndarray:
    """Return the harmonic mean of the means of all columns of (draws, rows, 3) arrays, (draws,); 0 when a mean is 0."""
    means = np.concatenate([group.mean(1) for group in groups], 1)
    with np.errstate(divide="ignore"):
        return means.shape[1] / (1 / means).sum(1)


def _retained(subject: Subject, encoder: TextEncoder, items: Sequence[Item]) -> np.ndarray | None:
    """Score the model that never saw the forget set, (rows,), or return None when there is none."""
    given = subject.options.get("tofu_retained")
    if given is None:
        return None
    with Checkpoint.open(resolve(str(given)).path) as checkpoint:
        model = BlockModel(Point(checkpoint), shared_model(subject).dtype, subject.run.device)
        try:
            losses = answer_losses(model, Point(checkpoint), encoder, items)
        finally:
            model.close()
    return np.array([np.exp(np.mean(perturbed) - paraphrased) for _, paraphrased, *perturbed in losses])


def _report(
    subject: Subject,
    name: str,
    sets: dict[str, list[Item]],
    found: dict[str, dict[str, Numbers]],
    retained: np.ndarray | None,
) -> Result:
    from scipy.stats import ks_2samp

    mine, result = found["general"], Result(CHECK, "")
    for column, kind in enumerate(KINDS):
        values = mine[FORGET].values[:, column]
        if np.isfinite(values).all():
            result.metrics[f"tofu_forget_{kind}"] = resampling.mean(values, subject.seed, f"mean {kind} on {name}")
    kept = [mine[group].values for group in SETS if group != FORGET]
    sentences = [f"TOFU, {name} ({len(sets[FORGET])} questions):"]
    if all(np.isfinite(values).all() for values in kept):
        metric = resampling.bootstrap(kept, utility, subject.seed, "harmonic mean of nine numbers that should stay high")
        result.metrics["tofu_model_utility"] = metric
        sentences.append(f"model utility {metric.value:.3f} ({metric.low:.3f} to {metric.high:.3f});")
    words = [f"{kind.replace('_', ' ')} {mine[FORGET].values[:, c].mean():.3f}" for c, kind in enumerate(KINDS)]
    sentences.append(f"on what should be forgotten: {', '.join(words)}.")
    if retained is not None:
        test: Any = ks_2samp(mine[FORGET].raw_ratio, retained)
        p = float(test.pvalue)
        result.metrics["tofu_forget_quality"] = Metric.exact(p, "p-value of the KS test against the retrained model")
        sentences.append(
            f"Forget quality {p:.3g}: the truth ratios can{'not' if p > 0.05 else ''} be told from the retrained model's."
        )
    else:
        sentences.append("Forget quality was not measured: it needs --tofu-retained, a model trained without the forget set.")
    if not mine[FORGET].texts:
        sentences.append("ROUGE was not measured: writing answers needs all weights in memory.")
    result.verdict = " ".join(sentences)
    result.figures.append(_table(found))
    result.facts = {
        "forget_set": name,
        "rows": {group: len(items) for group, items in sets.items()},
        "means": {s: {g: dict(zip(KINDS, _means(n), strict=True)) for g, n in groups.items()} for s, groups in found.items()},
    }
    if subject.show_text:
        pairs = zip(sets[FORGET], mine[FORGET].texts, strict=False)
        result.facts["written"] = [{"question": i.question, "answer": i.answer, "written": text} for i, text in pairs]
    return result


def _table(found: dict[str, dict[str, Numbers]]) -> Figure:
    rows: list[tuple[Any, ...]] = []
    for state, groups in found.items():
        kept = [groups[group].values for group in SETS if group != FORGET]
        rows.append(
            (state, *(mean for group in SETS for mean in _means(groups[group])), float(utility(*(k[None] for k in kept))[0]))
        )
    columns = ("model", *(f">{group}: {kind.replace('_', ' ')}" for group in SETS for kind in KINDS), ">model utility")
    return Table("TOFU", columns, tuple(rows))


def _means(numbers: Numbers) -> list[float]:
    return [float(mean) for mean in numbers.values.mean(0)]
