"""The certificate as a person reads it on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from liborth_cli.console import Console, clean
from liborth_cli.verify.result import Certificate, Metric, Result

MET = {True: "yes", False: "NO", None: "undecided"}


def print_certificate(certificate: Certificate, console: Console) -> None:
    """Print one table of metrics, the requirements and the verdict to stdout; or the JSON document under --json.

    Args:
        certificate: what was found.
        console: where it goes.
    """
    if console.as_json:
        console.result("", certificate.to_json())
        return
    rows = [row for result in certificate.results for row in _rows(result)]
    columns = ("check", "metric", ">value", ">95 % interval", "what it is")
    console.table(columns, rows, f"{certificate.subject}: what was measured", out=True)
    if certificate.requirements:
        lines = [(MET[r.met], r.text, r.check, _value(r.measured), _interval(r.measured))
                 for r in certificate.requirements]  # fmt: skip
        console.table(("met", "requirement", "check", ">value", ">95 % interval"), lines, "Requirements", out=True)
    for name, one in certificate.not_tried.items():
        console.note(f"not tried: {name} ({one.words})")
    first, *others = map(clean, certificate.sentences)
    word = certificate.outcome.value.upper()
    console.result("\n".join([f"{word}: {first.removeprefix('No decision: ')}", *(f"  {other}" for other in others)]), {})


def _rows(result: Result) -> Sequence[tuple[str, ...]]:
    if not result.metrics:
        return [(result.check, "", "", "", "nothing to measure")]
    return [
        (result.check if number == 0 else "", name, _value(metric), _interval(metric), metric.meaning)
        for number, (name, metric) in enumerate(result.metrics.items())
    ]


def _value(metric: Metric) -> str:
    return "—" if math.isnan(metric.value) else f"{metric.value:.4g}"


def _interval(metric: Metric) -> str:
    if math.isnan(metric.low) or math.isnan(metric.high):
        return "—"
    if metric.low == metric.high:
        return "exact"
    return "unknown" if math.isinf(metric.low) and math.isinf(metric.high) else f"{metric.low:.4g} … {metric.high:.4g}"
