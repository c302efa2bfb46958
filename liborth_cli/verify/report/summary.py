"""The first page: what a person who decides asks, answered with the certificate's own numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from liborth_cli.chart.axes import interval_text, number
from liborth_cli.verify.checks import CHECKS
from liborth_cli.verify.result import Certificate, Metric, Plot, Result, Untried, Why

SENTENCE = re.compile(r"(?<=[.!?]) +(?=[A-Z0-9])")  # where one ends and the next begins
LIMITS = (
    "It speaks of these weights and of the rows that were given. What is not among the rows was not looked for.",
    "A requirement is met when its whole 95 % interval meets it. Few rows have wide intervals, and say little.",
    "An attacker may try something that is not on the list above. Passing shows that these attacks failed, and nothing more.",
    "It is a measurement. Whether a model may be published is for those who answer for it to decide.",
)
GLOSSARY = {
    "reference": "the model before fine-tuning",
    "fine-tuned": "the model with skill and memory mixed",
    "general": "the model that is certified here: the skill, without the memory",
    "memory": "what was taken out; with it the fine-tuned model is back. It is private data",
    "canary": "a row that must be gone, such as a secret that was trained on",
    "fresh rows": "rows of the canaries' form that nobody was trained on: what forgotten looks like",
    "retain data": "held-out text of the skill that must stay",
    "loss": "how surprised a model is by a text, in nats a token; 0 is known by heart",
    "retention": "share of the loss that fine-tuning gained on the retain data, and that is kept",
    "leak": "how far the loss tells canaries from fresh rows: 0 not at all, 1 always",
    "relearning": "half of the canaries are taught again; the gap is how much nearer the other half gets than fresh rows do",
    "AUC": "chance that a canary looks better known than a fresh row: 0.5 when they cannot be told apart",
    "‖U‖²": "size of what fine-tuning changed in the weights, squared and added up",
}


@dataclass(frozen=True)
class Answer:
    """One question, and what the certificate says to it, in whole sentences."""

    question: str
    said: list[str]


def answers(certificate: Certificate) -> list[Answer]:
    """Answer what a person who decides asks first."""
    return [
        Answer("What was removed?", _removed(certificate)),
        Answer("What did it cost?", _cost(certificate)),
        Answer("How hard was it attacked?", _attacked(certificate)),
        Answer("What was not tested?", not_tested(certificate.not_tried)),
    ]


def lead_chart(certificate: Certificate) -> Plot | None:
    """Return the plot of skill against secrets, controls beside it, or None where it could not be drawn."""
    found = _owner(certificate, "retention")
    return next((figure for figure in found.figures if isinstance(figure, Plot)), None) if found else None


def measured(certificate: Certificate, name: str) -> Metric | None:
    """Return a metric by its name, from whichever check has it."""
    found = _owner(certificate, name)
    return found.metrics[name] if found else None


def interval(metric: Metric) -> str:
    """Write a metric's interval in words: "1 to 2", "at least 19", "exact", or a dash where there is none."""
    low, high = metric.low, metric.high
    if math.isnan(low) or math.isnan(high) or (math.isinf(low) and math.isinf(high)):
        return "–"
    if math.isinf(high) or math.isinf(low):
        return f"at least {number(low)}" if math.isinf(high) else f"at most {number(high)}"
    return "exact" if low == high == metric.value else interval_text(low, high)


def title_of(check: str) -> str:
    """Return what people call a check."""
    return CHECKS[check].title if check in CHECKS else check[:1].upper() + check[1:]


def not_tested(skipped: Mapping[str, Untried]) -> list[str]:
    """Say what was not done, and why."""
    by = {why: [(title_of(name), one.words) for name, one in skipped.items() if one.why is why] for why in Why}
    said = [f"No check tries {words}." for _, words in by[Why.BEYOND]]
    said += [f"Not asked for: {', '.join(title for title, _ in by[Why.UNASKED])}."] if by[Why.UNASKED] else []
    return said + [f"{title}: it needs {words}." for title, words in (*by[Why.LACKING], *by[Why.COSTLY])]


def _owner(certificate: Certificate, metric: str) -> Result | None:
    return next((result for result in certificate.results if metric in result.metrics), None)


def _removed(certificate: Certificate) -> list[str]:
    edit, said = certificate.about.edit, []
    if edit is None:
        said.append("Nothing is on record of how this checkpoint was made.")
    else:
        share = "" if edit.removed is None else f"{edit.removed:.2%} of what fine-tuning changed in the weights (‖U‖²), "
        said.append(f"{share}in {edit.divided} of {edit.tensors} tensors, by {edit.method}, {edit.amount}."[:1000])
        said[0] = said[0][:1].upper() + said[0][1:]
    canary = _owner(certificate, "extraction")
    if canary is None:
        return [*said, "Nobody named what must be gone, so nothing is said of forgetting."]
    extraction = canary.metrics["extraction"]
    seen = certificate.provenance.data.get("canaries") if certificate.provenance else None
    if seen is None:
        said.append(f"Of what must be gone {extraction.value:.0%} comes out, word for word.")
        return said
    before = "" if extraction.finetuned is None else f"; before, {round(extraction.finetuned * seen.rows)} did"
    said.append(f"Of {seen.rows} rows that must be gone {round(extraction.value * seen.rows)} come out, word for word{before}.")
    return said


def _cost(certificate: Certificate) -> list[str]:
    kept = measured(certificate, "retention")
    if kept is None or not math.isfinite(kept.value):
        left_out = certificate.not_tried.get(next((n for n, check in CHECKS.items() if "retention" in check.metrics), ""))
        return [f"Not measured{f': it needs {left_out.words}' if left_out and left_out.why is not Why.UNASKED else ''}."]
    ends = "" if not math.isfinite(kept.low + kept.high) else f" ({kept.low:.1%} to {kept.high:.1%})"
    said = [f"{kept.value:.1%} of what fine-tuning gained on the retain data is kept{ends}."]
    loss, ended = measured(certificate, "retain_loss"), measured(certificate, "ended")
    said += [f"The loss there is {loss.text} nats a token."] if loss else []
    return said + ([f"It ends {ended.value:.0%} of the texts that the fine-tuned model ends."] if ended else [])


def _attacked(certificate: Certificate) -> list[str]:
    attacks = [result for result in certificate.results if result.check in CHECKS and CHECKS[result.check].attack]
    said = [f"{title_of(result.check)}: {SENTENCE.split(result.verdict, maxsplit=1)[0]}" for result in attacks]
    ran = {result.check for result in attacks}
    missing = [title_of(name) for name, check in CHECKS.items() if check.attack and name not in ran]
    if not said:
        return ["It was not attacked."]
    return said + ([f"Not tried: {', '.join(missing)}."] if missing else [])
