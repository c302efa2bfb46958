"""`--sweep`: what comes back, and when, as memory is mixed in from β = 0 to β = 1."""

from __future__ import annotations

from liborth_cli.verify.intervals import mean_loss
from liborth_cli.verify.result import Metric, Plot, Result, Series
from liborth_cli.verify.subject import Subject

METRICS = ("beta_recited",)
BETAS = tuple(i / 10 for i in range(11))
NAMES = {"canaries": "what must be gone", "fresh": "never trained on", "retain": "skill that must stay"}


def run(subject: Subject) -> Result:
    """Score every list of rows at W(β) = W_g + β·(W_f − W_g), β = 0, 0.1, …, 1, formed while it is read.

    Where the memory is neurons that `tune` added, β multiplies what they write, as in `excise`.

    `beta_recited` is the least β of the grid at which a canary comes out greedily (2 when none does): how much of the memory
    has to come back before the text does. A general checkpoint at the edge of reciting recites at a small β. Losses are in
    nats a token, with intervals over rows; the lines between weights are those of `--lmc` (WiSE-FT, arXiv 2109.01903).

    Raises:
        UsageError: when there is no memory and no fine-tuned checkpoint, or no data.
    """
    if subject.grown is None:
        subject.need("finetuned", "sweep", "the memory file or --finetuned")
    lists = [name for name in ("canaries", "fresh", "retain") if name in subject.evaluators]
    if not lists:
        subject.need("canaries", "sweep", "--canary or --retain-data")
    series, spans = [], {}
    for name in lists:
        points = [mean_loss(subject.score(name, subject.restored(beta)), subject.seed, "") for beta in BETAS]
        spans[name] = points
        values, low, high = (tuple(getattr(p, which) for p in points) for which in ("value", "low", "high"))
        series.append(Series(NAMES[name], BETAS, values, low, high))
    metrics: dict[str, Metric] = {}
    sentences = []
    levels = {"never trained on": spans["fresh"][0].value} if "fresh" in spans else {}
    if subject.canaries:
        first = next((beta for beta in BETAS if _recites(subject, beta)), None)
        metrics["beta_recited"] = Metric.exact(2.0 if first is None else first, "least β at which a canary is recited; 2: none")
        ends = spans["canaries"]
        sentences.append(f"The loss of the canaries goes from {ends[0].value:.3f} at β = 0 to {ends[-1].value:.3f} at β = 1")
        sentences.append("none is recited at any β" if first is None else f"the first is recited at β = {first:g}")
    if "retain" in spans:
        ends = spans["retain"]
        sentences.append(f"the skill's loss goes from {ends[0].value:.3f} to {ends[-1].value:.3f}")
    verdict = "; ".join(sentences) + "."
    verdict = verdict[0].upper() + verdict[1:]
    plot = Plot(
        "Memory mixed in", f"Mean loss at β from 0 (general) to 1 (fine-tuned). {verdict}", "β", "loss, nats a token",
        tuple(series), levels=levels,
    )  # fmt: skip
    return Result("sweep", verdict, None, metrics, [plot])


def _recites(subject: Subject, beta: float) -> bool:
    scores = subject.score("canaries", subject.restored(beta))
    return any(score.hit.all() for score in scores)
