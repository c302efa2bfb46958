"""`--samples`: which of the given texts the memory delta carries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from liborth_cli.verify import statistics
from liborth_cli.verify.check import Check, Need, Options, Part, Work, option
from liborth_cli.verify.result import Facts, Plot, Result, Series, Table
from liborth_cli.verify.subject import Subject

SHOWN = 200


@dataclass(frozen=True)
class SamplesOptions(Options):
    """What is ranked."""

    samples: str | None = option(None, "Rank these texts by what the memory delta carries of each.")


@dataclass
class SamplesFacts(Facts):
    """Numbers of the rows, the most carried first; what the memory carries of each row, nats a token; and their files."""

    order: list[int]
    carried: list[float]
    files: list[str]


def run(subject: Subject, options: SamplesOptions) -> Result:
    """Rank rows by loss at β = 0 minus loss at β = 1, nats a token: a direct measurement.

    What the memory carries of a text is what its removal costs that text. Influence functions estimate such effects from
    gradients at one point, and in deep networks they do not follow what removal does (Bae et al. 2022, arXiv 2209.05364); here
    both models are run. Positive: the text got worse when the memory was taken out. Running text is ranked window by window.
    Losses: (n,) for n rows.
    """
    some, states = subject.reader.text([str(options.samples)], "--samples"), subject.states
    rows = some.rows
    scores = [states.score_rows(rows, states.weights[state]) for state in ("general", "finetuned")]
    (general, tokens), (finetuned, _) = map(statistics.totals, scores)
    change = (general - finetuned) / tokens
    order = np.argsort(-change, kind="stable")
    labels = [subject.label(int(i), rows[i]) for i in order]
    if len(set(labels)) < len(labels):
        labels = [f"{label}, window {i + 1}" for label, i in zip(labels, order, strict=True)]
    metric = statistics.bootstrap(
        lambda w: (w @ (general - finetuned)) / (w @ tokens), [some.groups], subject.seed,
        "loss at β = 0 minus β = 1, mean over the samples, nats a token",
    )  # fmt: skip
    top = order[0]
    verdict = (
        f"The memory carries most of {labels[0]}: taking it out costs {change[top]:.3f} nats a token there, {metric.value:.3f} "
        f"on average over {len(rows)} samples, and least {labels[-1]}, {change[order[-1]]:.3f}."
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
    facts = SamplesFacts([int(i) for i in order], carried=change.tolist(), files=list(some.files))
    return Result("samples", verdict, None, {"carried": metric}, [Table(title, columns, tuple(cells[:SHOWN])), plot], facts)


def _work(subject: Subject, options: SamplesOptions) -> Work:
    return Work(read=2 * sum(row.tokens for row in subject.reader.text([str(options.samples)], "--samples").rows))


CHECK = Check(
    name="samples",
    title="Samples the memory carries",
    words="",
    part=Part.MECHANISM,
    run=run,
    metrics=("carried",),
    needs=(Need.FINETUNED,),
    cheap=True,
    work=_work,
    options=SamplesOptions,
    lacks=lambda subject, options: "" if options.samples else "--samples, a file of texts",
)
