r"""`--tofu DIR`: forgetting and what it costs, by the measures of TOFU (Maini et al. 2024, arXiv 2401.06121).

From local files in TOFU's own format (JSON lines): one `forget*_perturbed.json`, `retain_perturbed.json`,
`real_authors_perturbed.json`, `world_facts_perturbed.json`. A row holds `question`, `answer`, several `perturbed_answer` (wrong
ones) and perhaps a `paraphrased_answer`; where there is none the answer stands for it. The prompt is
"Question: …\nAnswer: ", and with P(a) = exp(−mean loss a token of answer a):

- **probability**: P(answer); for real authors and world facts its share of P(answer) + Σ P(perturbed).
- **ROUGE-L recall** of the greedy answer, at most 200 tokens, against `answer`.
- **truth ratio** R = mean P(perturbed) / P(paraphrased); reported as max(0, 1 − R), on the forget set as min(R, 1/R).
- **truth share** of the forget set, P(paraphrased) / (P(paraphrased) + P(perturbed)) with the geometric mean over the perturbed
  answers: OpenUnlearning's second truth ratio (arXiv 2506.12618). Where it is a half, right and wrong are equally likely.
- **model utility**: harmonic mean of the nine numbers of the three sets that are not to be forgotten.
- **forget quality**: p-value of the two-sided Kolmogorov–Smirnov test between the truth ratios on the forget set and those
  of a model that was retrained without it (`--tofu-retained MODEL`), both with the geometric mean over the perturbed
  answers, as in TOFU's program. Above 0.05 the two cannot be told apart.

Greedy answers need all weights in memory; the losses stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from liborth_cli.errors import BadInput, OutOfResources, UsageError
from liborth_cli.stream.files import read_json_lines
from liborth_cli.verify import statistics
from liborth_cli.verify.check import Check, Options, Part, option
from liborth_cli.verify.result import Facts, Figure, Line, Metric, Result, Table
from liborth_cli.verify.rows import Reader, evenly, split_row
from liborth_cli.verify.subject import STATES, Subject

if TYPE_CHECKING:
    from liborth_cli.stream.encoder import TextEncoder
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.weights import Weights

WRITTEN = 200
KINDS = ("probability", "rouge", "truth_ratio")
FORGET, RETAIN, AUTHORS, FACTS = "forget", "retain", "real authors", "world facts"
SETS = (FORGET, RETAIN, AUTHORS, FACTS)
OPEN = (AUTHORS, FACTS)
"""Sets whose answers are chosen among options: probability is a share there."""
FILES = {
    RETAIN: "retain_perturbed.json",
    AUTHORS: "real_authors_perturbed.json",
    FACTS: "world_facts_perturbed.json",
}


@dataclass(frozen=True)
class TofuOptions(Options):
    """Where the files are, and how much of them is read."""

    tofu: Path | None = option(None, "Directory of TOFU files: TOFU's own metrics.")
    tofu_forget: str | None = option(None, "Which forget set of it, such as forget05 [default: the largest].")
    tofu_retained: str | None = option(None, "Model trained without TOFU's forget set.")
    limit: int | None = option(None, "Questions of each benchmark at most.", least=1)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        question: as it is in the file.
        answer: the right one.
        paraphrased: the right one in other words; the same where the file has none.
        perturbed: wrong ones of the same form.
        where: file and line.
    """

    question: str
    answer: str
    paraphrased: str
    perturbed: tuple[str, ...]
    where: str

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return f"Question: {self.question}\nAnswer: "


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

    @property
    def truth_share(self) -> np.ndarray:
        """True / (true + false), (rows,)."""
        return 1 / (1 + self.raw_ratio)


def grade(group: str, items: Sequence[Item], losses: Sequence[Sequence[float]], texts: list[str]) -> Numbers:
    """Turn a model's losses and answers on one set into TOFU's numbers.

    Args:
        group: one of `SETS`; decides how probability and truth ratio are reported.
        items: the questions.
        losses: of each the mean losses a token of its answer, its paraphrased and its perturbed answers, nats.
        texts: the greedy answers; empty where none were written.
    """
    from liborth_cli.measure.rouge import recall

    probability, ratio, raw = [], [], []
    for answer, paraphrased, *perturbed in losses:
        true, wrong = np.exp(-answer), np.exp(-np.array(perturbed))
        probability.append(true / (true + wrong.sum()) if group in OPEN else true)
        r = wrong.mean() / np.exp(-paraphrased)
        ratio.append(min(r, 1 / r) if group == FORGET else max(0.0, 1 - r))
        raw.append(np.exp(np.mean(perturbed) - paraphrased))
    recalls = [recall(item.answer, text) for item, text in zip(items, texts, strict=False)] or [np.nan] * len(items)
    return Numbers(np.stack([probability, recalls, ratio], 1), np.array(raw), texts)


def forget_quality(raw_ratio: np.ndarray, retained: np.ndarray) -> float:
    """Return the p-value of the two-sided Kolmogorov-Smirnov test between raw truth ratios, (rows,) each."""
    from scipy.stats import ks_2samp

    return float(ks_2samp(raw_ratio, retained).pvalue)  # type: ignore[attr-defined]


@dataclass
class TofuFacts(Facts):
    """Which set was to be forgotten, the questions of each, each model's means, and its answers where texts may be shown."""

    forget_set: str
    rows: dict[str, int]
    means: dict[str, dict[str, dict[str, float]]]
    written: list[Line] | None


def run(subject: Subject, options: TofuOptions) -> Result:
    """Score the general model, and reference and fine-tuned one beside it.

    Returns:
        `tofu_forget_probability`, `tofu_forget_rouge`, `tofu_forget_truth_ratio`, `tofu_forget_truth_share`,
        `tofu_model_utility`, and with a retained model `tofu_forget_quality`.

    Raises:
        BadInput: when a file is missing, malformed, or a row longer than the context; without a tokenizer.
        UsageError: when rouge-score is not installed.
    """
    from liborth_cli.measure.rouge import scorer

    subject.reader.tokenizer("tofu")
    scorer()
    name, sets = read_sets(options)
    states = subject.states.of(STATES)
    found: dict[str, dict[str, Numbers]] = {}
    total = len(states) * sum(len(items) for items in sets.values())
    with subject.console.progress("TOFU", total, "questions") as progress:
        for state in states:
            found[state] = {}
            for group, items in sets.items():
                found[state][group] = measure(subject, state, items, group)
                progress.advance(len(items))
    return _report(subject, name, sets, found, _retained(subject, options, sets[FORGET]))


def measure(subject: Subject, state: str, items: Sequence[Item], group: str) -> Numbers:
    """Score one model on one set; the set's name decides how probability and truth ratio are reported."""
    weights = subject.states.weights[state]
    losses = _by_item(subject.states.score_rows(_answer_rows(subject.reader, items), weights), items)
    prompts = [split_row(subject.reader.answer(item.prompt, item.answer, item.where))[0] for item in items]
    texts = written_answers(subject.states.model(state), weights, subject.reader.tokenizer("tofu"), prompts)
    return grade(group, items, losses, texts)


def _answer_rows(reader: Reader, items: Sequence[Item]) -> list[Any]:
    """Return a row for each item's answer, the paraphrased and the perturbed ones."""
    return [
        reader.answer(item.prompt, answer, item.where)
        for item in items
        for answer in (item.answer, item.paraphrased, *item.perturbed)
    ]


def _by_item(scores: Sequence[Any], items: Sequence[Item]) -> list[list[float]]:
    """Return for each item the mean losses a token of those rows, in nats."""
    some = iter(scores)
    return [[float(next(some).loss.mean()) for _ in range(2 + len(item.perturbed))] for item in items]


def written_answers(model: BlockModel, weights: Weights, encoder: TextEncoder, prompts: Sequence[np.ndarray]) -> list[str]:
    """Return the greedy answer to each question; nothing when the weights do not fit into memory.

    Args:
        model: of the weights.
        weights: to write with.
        encoder: turns ids back into text.
        prompts: the tokens before those of the answer, as they are scored, (n,) each: a space that a tokenizer joins to the
            answer's first word is the answer's, and a prompt that ended in it would ask what the model has never seen.
    """
    from liborth_cli.measure.generate import generate, hold

    try:
        hold(model, weights)
    except OutOfResources:
        return []
    return [encoder.decode(ids) for ids in generate(model, prompts, WRITTEN)]


def utility(weights: Sequence[np.ndarray], groups: Sequence[np.ndarray]) -> np.ndarray:
    """Return the harmonic mean of the means of all columns, (draws,); 0 when a mean is 0.

    Args:
        weights: of the rows of each group, (draws, rows).
        groups: (rows, 3) each.
    """
    means = np.concatenate([(w @ values) / w.sum(1, keepdims=True) for w, values in zip(weights, groups, strict=True)], 1)
    with np.errstate(divide="ignore"):
        return means.shape[1] / (1 / means).sum(1)


def _retained(subject: Subject, options: TofuOptions, items: Sequence[Item]) -> np.ndarray | None:
    """Score the model that never saw the forget set, (rows,), or return None when there is none."""
    if options.tofu_retained is None:
        return None
    import torch

    from liborth_cli.checkpoint.hub import resolve
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.measure.scores import Evaluator
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.weights import Point

    with Checkpoint.open(resolve(options.tofu_retained).path) as checkpoint:
        model = BlockModel(Point(checkpoint), torch.float32, subject.run.device)
        try:
            losses = _by_item(Evaluator(model, _answer_rows(subject.reader, items)).score(), items)
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
    mine, result, before = found["general"], Result("tofu", ""), found.get("finetuned")
    for column, kind in enumerate(KINDS):
        values = mine[FORGET].values[:, column]
        if np.isfinite(values).all():
            metric = statistics.mean(values, statistics.alone(len(values)), subject.seed, f"mean {kind} on {name}")
            result.metrics[f"tofu_forget_{kind}"] = metric.beside(
                float(before[FORGET].values[:, column].mean()) if before else None
            )
    share = mine[FORGET].truth_share
    metric = statistics.mean(share, statistics.alone(len(share)), subject.seed, f"mean true / (true + false) on {name}")
    result.metrics["tofu_forget_truth_share"] = metric.beside(float(before[FORGET].truth_share.mean()) if before else None)
    kept = [mine[group].values for group in SETS if group != FORGET]
    words = [f"{kind.replace('_', ' ')} {mine[FORGET].values[:, c].mean():.3f}" for c, kind in enumerate(KINDS)]
    sentences = [f"TOFU, {name} ({len(sets[FORGET])} questions), on what should be forgotten: {', '.join(words)}."]
    if all(np.isfinite(values).all() for values in kept):
        metric = statistics.bootstrap(
            lambda *w: utility(w, kept), [statistics.alone(len(values)) for values in kept], subject.seed,
            "harmonic mean of nine numbers that should stay high", statistics.SHARE,
        )  # fmt: skip
        result.metrics["tofu_model_utility"] = metric
        sentences.append(f"Model utility {metric.value:.3f} ({metric.low:.3f} to {metric.high:.3f}).")
    if retained is not None:
        p, other = (forget_quality(numbers[FORGET].raw_ratio, retained) if numbers else None for numbers in (mine, before))
        assert p is not None
        metric = Metric.exact(p, "p-value of the KS test against the retrained model")
        result.metrics["tofu_forget_quality"] = metric.beside(other)
        sentences.append(
            f"Forget quality {p:.3g}: the truth ratios can{'not' if p > 0.05 else ''} be told from the retrained model's."
        )
    else:
        sentences.append("Forget quality was not measured: it needs --tofu-retained, a model trained without the forget set.")
    if not mine[FORGET].texts:
        sentences.append("ROUGE was not measured: writing answers needs all weights in memory.")
    result.verdict = " ".join(sentences)
    result.figures.append(_table(found))
    pairs = zip(sets[FORGET], mine[FORGET].texts, strict=False)
    written: list[Line] = [{"question": i.question, "answer": i.answer, "written": text} for i, text in pairs]
    result.facts = TofuFacts(
        name,
        rows={group: len(items) for group, items in sets.items()},
        means={s: {g: dict(zip(KINDS, _means(n), strict=True)) for g, n in groups.items()} for s, groups in found.items()},
        written=written if subject.show_text else None,
    )
    return result


def _table(found: dict[str, dict[str, Numbers]]) -> Figure:
    rows: list[tuple[Any, ...]] = []
    for state, groups in found.items():
        kept = [groups[group].values for group in SETS if group != FORGET]
        rows.append(
            (
                state,
                *(mean for group in SETS for mean in _means(groups[group])),
                float(utility([np.ones((1, len(k))) for k in kept], kept)[0]),
            )
        )
    columns = ("model", *(f">{group}: {kind.replace('_', ' ')}" for group in SETS for kind in KINDS), ">model utility")
    return Table("TOFU", columns, tuple(rows))


def _means(numbers: Numbers) -> list[float]:
    return [float(mean) for mean in numbers.values.mean(0)]


def read_sets(options: TofuOptions) -> tuple[str, dict[str, list[Item]]]:
    """Read the four sets.

    Returns:
        The forget set's name, and the questions by set.

    Raises:
        BadInput: when a file is missing or is not of this format.
        UsageError: when the forget set that is asked for is not there.
    """
    folder, forget = (options.tofu or Path()).expanduser(), options.tofu_forget
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such directory; --tofu takes the one with TOFU's *_perturbed.json files")
    names = sorted(file.name.removesuffix("_perturbed.json") for file in folder.glob("forget*_perturbed.json"))
    if not names:
        raise BadInput(f"{folder}: no forget*_perturbed.json here; --tofu takes a directory with TOFU's files")
    if forget is not None and forget not in names:
        raise UsageError(f"--tofu-forget {forget}: {folder} has {', '.join(names)}")
    name = forget or names[-1]
    files = {FORGET: f"{name}_perturbed.json", **FILES}
    return name, {group: evenly(_read(folder / file), options.limit) for group, file in files.items()}


def _read(file: Path) -> list[Item]:
    items = [_item(fields, where) for where, fields in read_json_lines(file)]
    if not items:
        raise BadInput(f"{file}: no questions in it")
    return items


def _item(fields: Any, where: str) -> Item:
    wrong = fields.get("perturbed_answer") if isinstance(fields, dict) else None
    wrong = [wrong] if isinstance(wrong, str) else wrong
    texts = [fields.get("question"), fields.get("answer")] if isinstance(fields, dict) else [None]
    if not (isinstance(wrong, list) and wrong and all(isinstance(text, str) and text for text in [*texts, *wrong])):
        raise BadInput(f"{where}: needs question, answer and perturbed_answer, a list of texts")
    return Item(fields["question"], fields["answer"], fields.get("paraphrased_answer") or fields["answer"], tuple(wrong), where)


CHECK = Check(
    name="tofu",
    title="TOFU",
    words="",
    part=Part.TRANSFER,
    run=run,
    metrics=(*(f"tofu_forget_{kind}" for kind in (*KINDS, "truth_share")), "tofu_model_utility", "tofu_forget_quality"),
    options=TofuOptions,
    lacks=lambda subject, options: "" if options.tofu else "--tofu, a directory with TOFU's files",
    controls=True,
)
