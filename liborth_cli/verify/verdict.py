"""Requirements: read, sent to the check that measures them, and decided on whole intervals."""

from __future__ import annotations

import difflib
import importlib.util
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from liborth_cli.errors import UsageError
from liborth_cli.verify import CHECKS
from liborth_cli.verify.result import Metric, Requirement, Result

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
WORDS = {"<=": "at most", ">=": "at least", "==": "exactly", "<": "below", ">": "above"}


@dataclass(frozen=True)
class Condition:
    """One parsed requirement.

    Attributes:
        text: as the user wrote it, without spaces.
        check: the check that was named before a dot, or "".
        metric: what is measured.
        comparison: a key of `COMPARISONS`.
        bound: what it is held against.
    """

    text: str
    check: str
    metric: str
    comparison: str
    bound: float


def parse(text: str | None) -> list[Condition]:
    """Read "extraction==0, retention>=0.99, barrier<=5%".

    Args:
        text: conditions with commas between them; a metric may be written with its check, `canary.extraction`.

    Raises:
        UsageError: when one cannot be read, or names a check that does not exist.
    """
    found = []
    for part in filter(None, (p.strip() for p in (text or "").split(","))):
        match = re.fullmatch(r"(?:([\w-]+)\.)?([\w-]+)\s*(<=|>=|==|<|>)\s*(\S+)", part)
        bound = _number(match[4]) if match else math.nan
        if match is None or not math.isfinite(bound):
            raise UsageError(f"--require {part!r}: write a metric, one of <= >= == < >, and a number: retention>=0.99")
        check, metric = match[1] or "", match[2].replace("-", "_")
        if check and check not in CHECKS:
            raise UsageError(f"--require {part!r}: there is no check {check!r}; there are {', '.join(CHECKS)}")
        found.append(Condition(re.sub(r"\s+", "", part), check, metric, match[3], bound))
    return found


def known_metrics() -> dict[str, str]:
    """Return metric → the check that measures it, for the checks that declare theirs (a tuple METRICS in their module)."""
    found: dict[str, str] = {}
    for check in CHECKS:
        for metric in _declared(check) or ():
            found.setdefault(metric, check)
    return found


def _declared(check: str) -> tuple[str, ...] | None:
    """Return what a check declares; nothing when it is not built in, None when it is and declares nothing."""
    name = f"liborth_cli.verify.{CHECKS[check]}"
    if importlib.util.find_spec(name) is None:
        return ()
    return getattr(importlib.import_module(name), "METRICS", None)


def checks_for(conditions: Sequence[Condition], running: Sequence[str]) -> list[str]:
    """Say which checks the conditions need, beyond those that run anyway.

    Raises:
        UsageError: when no check measures something; names what exists.
    """
    known, needed = known_metrics(), []
    for condition in conditions:
        check = condition.check or known.get(condition.metric, "")
        # A check that is built in and does not declare its metrics may still turn out to measure this one.
        if not check and all(_declared(name) is not None for name in CHECKS):
            raise UsageError(unknown(condition, known))
        if check and check not in running:
            needed.append(check)
    return list(dict.fromkeys(needed))


def unknown(condition: Condition, known: Sequence[str] | dict[str, str]) -> str:
    """Say what there is in place of a metric that there is not."""
    close = difflib.get_close_matches(condition.metric, list(known), 1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"--require {condition.text!r}: nothing measures {condition.metric!r}{hint} There are: {', '.join(sorted(known))}"


def decide(conditions: Sequence[Condition], results: Sequence[Result]) -> list[Requirement]:
    """Hold the results against the conditions.

    A condition is met when both ends of the 95 % interval meet it, so what is true only by luck of the rows is not met. A
    metric that came out as no number meets nothing.

    Raises:
        UsageError: when no result has the metric; names what was measured.
    """
    return [_decide(condition, results) for condition in conditions]


def _decide(condition: Condition, results: Sequence[Result]) -> Requirement:
    for result in results:
        metric = result.metrics.get(condition.metric)
        if metric is not None and condition.check in ("", result.check):
            holds = COMPARISONS[condition.comparison]
            ends = (metric.low, metric.high, metric.value)
            met = all(not math.isnan(end) and holds(end, condition.bound) for end in ends)
            lucky = not met and not math.isnan(metric.value) and holds(metric.value, condition.bound)
            return Requirement(condition.text, result.check, metric, met, _sentence(condition, metric, met, lucky))
    raise UsageError(unknown(condition, sorted({name for result in results for name in result.metrics})))


def _sentence(condition: Condition, metric: Metric, met: bool, lucky: bool) -> str:
    wanted = f"{WORDS[condition.comparison]} {condition.bound:g}"
    found = f"{condition.metric} is {show(metric)}"
    if met:
        return f"Met: {found}, {wanted} as required."
    return f"NOT met: {found}, which is not {wanted}" + (" over the whole interval." if lucky else ".")


def show(metric: Metric) -> str:
    """Render a metric with its interval, where it has one."""
    if metric.low == metric.high == metric.value or math.isnan(metric.value):
        return f"{metric.value:.4g}"
    return f"{metric.value:.4g} (95 % interval {metric.low:.4g} to {metric.high:.4g})"


def _number(text: str) -> float:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return math.nan
