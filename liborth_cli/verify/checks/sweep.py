"""`--sweep`: what comes back, and when, as memory is mixed in from β = 0 to β = 1."""

from __future__ import annotations

from collections.abc import Sequence

from liborth_cli.verify import statistics
from liborth_cli.verify.check import Check, Need, Options, Part, Work, scorings
from liborth_cli.verify.memorisation import recited
from liborth_cli.verify.result import Metric, Plot, Result, Series
from liborth_cli.verify.subject import Subject

BETAS = tuple(i / 10 for i in range(11))
NAMES = {"canaries": "what must be gone", "fresh": "never trained on", "retain": "skill that must stay"}
NEVER = 2.0
"""β beyond the grid, where nothing was recited on it."""


def run(subject: Subject, options: Options) -> Result:
    """Score every list of rows at W(β) = W_g + β·(W_f − W_g), β = 0, 0.1, …, 1, formed while it is read.

    Where the memory is neurons that `tune` added, β multiplies what they write, as in `excise`.

    `beta_recited` is the least β of the grid at which a canary comes out greedily (2 when none does): how much of the memory
    has to come back before the text does. A general checkpoint at the edge of reciting recites at a small β. Losses are in
    nats a token, with intervals over rows; the lines between weights are those of `--lmc` (WiSE-FT, arXiv 2109.01903). What the
    retain rows lose between the two ends is for the figure, and is measured on a sample of them.
    """
    series, spans, sentences = [], {}, []
    metrics: dict[str, Metric] = {}
    names = [subject.states.restored(beta) for beta in BETAS]
    lists = [name for name in NAMES if name in subject.data]
    with subject.console.progress("sweep", len(names), "models") as progress:
        subject.states.score_all(lists, [names[0], names[-1]], progress.advance)
        subject.states.score_all(_between(subject), names[1:-1], progress.advance)
    for rows in lists:
        points = spans[rows] = [_point(subject, rows, names, number) for number in range(len(names))]
        values, low, high = (tuple(getattr(p, which) for p in points) for which in ("value", "low", "high"))
        series.append(Series(NAMES[rows], BETAS, values, low, high))
    if "canaries" in spans:
        hits = [recited(subject.score("canaries", name)) for name in names]
        first = next((beta for beta, count in zip(BETAS, hits, strict=True) if count), NEVER)
        metric = Metric.exact(first, "least β at which a canary is recited; 2: none")
        metrics["beta_recited"] = metric.beside(0.0 if hits[-1] else NEVER)
        ends = spans["canaries"]
        sentences.append("no canary is recited at any β" if first == NEVER else f"the first canary is recited at β = {first:g}")
        sentences.append(f"their loss goes from {ends[0].value:.3f} at β = 0 to {ends[-1].value:.3f} at β = 1")
    if "retain" in spans:
        ends = spans["retain"]
        between = "" if subject.sample.whole else f" (between them: on {subject.sample.words})"
        sentences.append(f"the skill's loss goes from {ends[0].value:.3f} to {ends[-1].value:.3f}{between}")
    verdict = "; ".join(sentences) + "."
    verdict = verdict[0].upper() + verdict[1:]
    levels = {"never trained on": spans["fresh"][0].value} if "fresh" in spans else {}
    plot = Plot(
        "Memory mixed in", f"Mean loss at β from 0 (general) to 1 (fine-tuned). {verdict}", "β", "loss, nats a token",
        tuple(series), levels=levels,
    )  # fmt: skip
    return Result("sweep", verdict, None, metrics, [plot])


def _between(subject: Subject) -> list[str]:
    """Return the lists of rows that are scored between the ends."""
    return [subject.sample.name if name == "retain" else name for name in NAMES if name in subject.data]


def _point(subject: Subject, rows: str, names: Sequence[str], number: int) -> Metric:
    """Return the mean loss at one β."""
    if rows != "retain" or number in (0, len(names) - 1):
        return statistics.mean_loss(subject.score(rows, names[number]), subject.groups(rows), subject.seed)
    first, last = (statistics.totals(subject.score(rows, name))[0] for name in (names[0], names[-1]))
    return subject.drawn(names[number], (1 - BETAS[number]) * first + BETAS[number] * last)


def _work(subject: Subject, options: Options) -> Work:
    names = [subject.states.restored(beta) for beta in BETAS]
    return Work(scorings(subject, tuple(NAMES), [names[0], names[-1]]) | scorings(subject, _between(subject), names[1:-1]))


CHECK = Check(
    name="sweep",
    title="Dose of memory",
    words="Losses at β = 0 … 1.",
    part=Part.MECHANISM,
    run=run,
    metrics=("beta_recited",),
    needs=(Need.WHOLE, Need.CANARIES | Need.RETAIN),
    cheap=True,
    work=_work,
    controls=True,
)
