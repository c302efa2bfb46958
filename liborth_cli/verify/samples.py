"""`--samples`: which of the given texts the memory delta carries."""

from __future__ import annotations

import numpy as np

from liborth_cli.verify.intervals import measured, totals
from liborth_cli.verify.result import Plot, Result, Series, Table
from liborth_cli.verify.subject import Subject

METRICS = ("carried",)
SHOWN = 200


def run(subject: Subject) -> Result:
    """Rank rows by loss at β = 0 minus loss at β = 1, nats a token: a direct measurement.

    What the memory carries of a text is what its removal costs that text. Influence functions estimate such effects from
    gradients at one point, and in deep networks they do not follow what removal does (Bae et al. 2022, arXiv 2209.05364); here
    both models are run. Positive: the text got worse when the memory was taken out. Running text is ranked window by window.
    Losses: (n,) for n rows.

    Raises:
        UsageError: without samples, or without memory and fine-tuned checkpoint.
    """
    if "samples" not in subject.evaluators:
        subject.need("retain", "samples", "a file of texts")
    subject.need("finetuned", "samples", "the memory file or --finetuned")
    rows = subject.evaluators["samples"].rows
    (general, tokens), (finetuned, _) = (totals(subject.score("samples", state)) for state in ("general", "finetuned"))
    change = (general - finetuned) / tokens
    order = np.argsort(-change, kind="stable")
    labels = [subject.label(int(i), rows[i]) for i in order]
    if len(set(labels)) < len(labels):
        labels = [f"{label}, window {i + 1}" for label, i in zip(labels, order, strict=True)]
    metric = measured(
        lambda w: (w @ (general - finetuned)) / (w @ tokens), len(rows), subject.seed,
        "loss at β = 0 minus β = 1, mean over the samples, nats a token",
    )  # fmt: skip
    top = order[0]
    verdict = (
        f"Taking the memory out costs the {len(rows)} samples {metric.value:.3f} nats a token on average; most {labels[0]}, "
        f"{change[top]:.3f}, and least {labels[-1]}, {change[order[-1]]:.3f}."
    )
    cells = [
        (rank + 1, label, *(float(v[i] / tokens[i]) for v in (general, finetuned)), float(change[i]), float(tokens[i]))
        for rank, (label, i) in enumerate(zip(labels, order, strict=True))
    ]
    columns = (">rank", "text", ">loss at β = 0", ">loss at β = 1", ">carried, nats a token", ">tokens")
    title = "What the memory carries" + (f", the first {SHOWN} of {len(rows)}" if len(rows) > SHOWN else "")
    ranks = tuple(float(i + 1) for i in range(len(rows)))
    curve = Series("samples", ranks, tuple(change[order].tolist()), marks=tuple(labels), line=False)
    plot = Plot("What the memory carries, ranked", verdict, "rank", "loss at β = 0 minus β = 1, nats a token", (curve,))
    facts = {"order": [int(i) for i in order], "carried": change.tolist()}
    return Result("samples", verdict, None, {"carried": metric}, [Table(title, columns, tuple(cells[:SHOWN])), plot], facts)
