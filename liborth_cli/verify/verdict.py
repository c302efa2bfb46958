"""Requirements: which stand, whether what was measured can decide them, and what is said first.

A condition is met when its whole 95 % interval meets it, and when meeting it means something. On forgetting that takes two
things: the fine-tuned model fails it on the same rows (else these rows show nothing), and the model still works (a broken model
recites nothing). What cannot be decided is neither met nor missed, and then there is no verdict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from liborth_cli.conditions import Condition, Quantity, parse
from liborth_cli.errors import UsageError
from liborth_cli.measure.retention import retention
from liborth_cli.verify.check import Check
from liborth_cli.verify.fresh import weakness
from liborth_cli.verify.result import Metric, Outcome, Requirement, Result, Untried
from liborth_cli.verify.subject import Need, Subject

FEW = 20
"""Different canaries below which a certificate says so in its first line."""
LEAST_KEPT = 0.1
"""Share of what fine-tuning gained on the retain data below which nothing of it counts as kept."""
UNMEASURED = Metric.exact(math.nan)


@dataclass(frozen=True)
class Demand:
    """One condition, and the check that measures it.

    Attributes:
        condition: what must hold.
        check: the check's name.
        default: it stands because nothing else was asked.
    """

    condition: Condition
    check: str
    default: bool


@dataclass(frozen=True)
class Working:
    """Whether the model still works.

    Attributes:
        ok: None when that was not measured.
        words: why it is not known that it does, or that it does not.
    """

    ok: bool | None
    words: str = ""


def demands(text: str | None, checks: Mapping[str, Check], canaries: bool) -> list[Demand]:
    """Read `--require`; without it, what the checks require by themselves.

    Args:
        text: of the option, or None.
        checks: all there are.
        canaries: whether what must be gone was named: only then something is required of the model, and not of its files alone.

    Raises:
        UsageError: when a condition cannot be read or nothing measures it.
    """
    quantities = {metric: Quantity() for check in checks.values() for metric in check.metrics}
    if text is not None:
        found = []
        for condition in parse(text, "--require", quantities, checks):
            owner = condition.scope or next(c.name for c in checks.values() if condition.name in c.metrics)
            if condition.name not in checks[owner].metrics:
                raise UsageError(f"--require: {condition.text}: {owner} measures {', '.join(checks[owner].metrics)}")
            found.append(Demand(condition, owner, False))
        return found
    standing = [check for check in checks.values() if check.require and (canaries or check.files)]
    return [
        Demand(condition, check.name, True)
        for check in standing
        for condition in parse(check.require, "--require", quantities, checks)
    ]


def decide(
    wanted: Sequence[Demand], results: Sequence[Result], skipped: Mapping[str, Untried], working: Working
) -> list[Requirement]:
    """Hold the results against the demands.

    Args:
        wanted: the demands.
        results: of the checks that ran.
        skipped: check → why it did not run.
        working: whether the model still works.
    """
    by_check = {result.check: result for result in results}
    return [_decide(demand, by_check.get(demand.check), skipped.get(demand.check), working) for demand in wanted]


def _decide(demand: Demand, result: Result | None, left_out: Untried | None, working: Working) -> Requirement:
    condition = demand.condition
    metric = (result.metrics if result else {}).get(condition.name, UNMEASURED)
    met, sentence = _judge(condition, metric, working)
    if metric is UNMEASURED:
        needs = f": it needs {left_out.words}" if left_out else ""
        met, sentence = None, f"Undecided: {condition.name} was not measured{needs}."
    return Requirement(condition.text, demand.check, metric, met, sentence, demand.default)


def _judge(condition: Condition, metric: Metric, working: Working) -> tuple[bool | None, str]:
    found, wanted = f"{condition.name} is {metric.text}", condition.words
    # The value, too: with an estimate outside its own interval the interval proves nothing.
    if not (condition.met(metric.low, metric.high) and condition.met(metric.value)):
        lucky = condition.met(metric.value)
        return False, f"NOT met: {found}, which is not {wanted}{' over the whole interval: too few rows' if lucky else ''}."
    if metric.forgetting and metric.finetuned is None:
        return None, f"Undecided: {found}, but what the fine-tuned model does on these rows is not known; give --finetuned."
    if metric.forgetting and condition.met(metric.finetuned):
        return (
            None,
            f"Undecided: {found}, and {metric.finetuned:.4g} in the fine-tuned model, so these rows show no forgetting.",
        )
    if metric.forgetting and not working.ok:
        return working.ok, f"{'Undecided' if working.ok is None else 'NOT met'}: {found}, but {working.words}."
    return True, f"Met: {found}, {wanted} as required" + (
        f" (fine-tuned: {metric.finetuned:.4g})." if metric.forgetting else "."
    )


def still_works(subject: Subject) -> Working:
    """Tell whether the model works: on the retain data it loses no more than the model before fine-tuning did.

    And it must keep some of what fine-tuning taught (`LEAST_KEPT`): the model before fine-tuning, or one that was thrown
    back to it, recites nothing either, and that shows no forgetting.
    """
    missing = [need for need in (Need.RETAIN, Need.REFERENCE) if not subject.has(need)]
    if missing:
        needed = " and ".join(need.words.split(",")[0] for need in missing)
        return Working(None, f"whether the model still works was not measured: it needs {needed}")
    general, reference = (subject.loss("retain", name) for name in ("general", "reference"))
    if general > reference:
        words = f"the model no longer works: {general:.3f} nats a token on the retain data, {reference:.3f} before fine-tuning"
        return Working(False, words)
    finetuned = subject.loss("retain", "finetuned") if "finetuned" in subject.states else reference
    kept = retention(reference, general, finetuned)
    if kept <= LEAST_KEPT or general == reference:
        losses = f"{general:.3f} nats a token, {reference:.3f} then, {finetuned:.3f} fine-tuned"
        words = "on the retain data it is the model before fine-tuning over again, which never knew these rows"
        return Working(None, f"{words} ({losses})")
    return Working(True)


def outcome_of(
    subject: Subject,
    checks: Mapping[str, Check],
    results: Sequence[Result],
    requirements: Sequence[Requirement],
    named: Collection[str] = (),
) -> tuple[Outcome, str]:
    """Decide, and say the first sentence: the decision, and what is missing for a better one.

    Args:
        subject: what is verified.
        checks: all there are.
        results: of those that ran.
        requirements: decided.
        named: the checks that the user asked for: sound files pass only where somebody asked about files.
    """
    gaps, count = _gaps(subject, checks, results, requirements), len(requirements)
    broken = [result.verdict for result in results if result.passed is False]
    missed = [requirement.sentence for requirement in requirements if requirement.met is False]
    undecided = [requirement.sentence for requirement in requirements if requirement.met is None]
    recited = max((result.recited for result in results), default=0)
    asked = any(not checks[requirement.check].files for requirement in requirements)
    measured = any(not checks[result.check].files for result in results)
    on_files = any(checks[one.check].files and not one.default for one in requirements)
    if broken or missed:
        return Outcome.FAILED, " ".join([*broken, *missed]) + (f" Measured {gaps}." if gaps and measured else "")
    if recited:
        tail = f"; measured {gaps}" if gaps else ""
        return Outcome.UNDECIDED, f"No decision: {recited} of {len(subject.rows('canaries'))} canaries can be drawn out{tail}."
    if undecided:
        return Outcome.UNDECIDED, f"No decision: {undecided[0]}" + (f" Measured {gaps}." if gaps else "")
    if measured and not asked:
        tail = f"; measured {gaps}" if gaps else ""
        what = "of what the model keeps or forgets nothing was required" if on_files else "nothing was required"
        return Outcome.UNDECIDED, f"No decision: {what}, so nothing was decided{tail}."
    if not asked:
        intact = any(result.check == "integrity" for result in results)
        files = "The files are what they should be" if intact else "Transformers loads it as it was run"
        rest = "nothing was measured of what the model keeps or forgets"
        if named or on_files:
            return Outcome.PASSED, f"{files}; {rest}."
        return Outcome.UNDECIDED, f"No decision: {rest}, and nothing was required. {files}."
    met = f"All {count} requirements are met, over their whole 95 % intervals"
    met = met if count > 1 else "The requirement is met, over its whole 95 % interval"
    return Outcome.PASSED, f"{met}{f', {gaps}' if gaps else ''}."


def _gaps(subject: Subject, checks: Mapping[str, Check], results: Sequence[Result], requirements: Sequence[Requirement]) -> str:
    """Say what weakens any verdict on forgetting: no canaries, few of them, no fresh rows, no attack, too little required."""
    if not subject.has(Need.CANARIES):
        return "without canaries, so nothing is said of forgetting"
    ran, count = {result.check for result in results}, subject.data["canaries"].different
    found = [f"on only {count} different canaries"] if count < FEW else []
    found += [] if subject.has(Need.FRESH) else ["without rows never trained on (--fresh)"]
    found += [weak] if (weak := weakness(subject)) else []
    found += [] if "relearn" in ran else ["without the relearning attack"]
    if requirements:
        found += [f"with {text} not required and not met" for text in _unasked(checks, results, requirements)]
    return ", ".join(found)


def _unasked(checks: Mapping[str, Check], results: Sequence[Result], requirements: Sequence[Requirement]) -> list[str]:
    """Return the default requirements that were not asked for, and that would not have been met."""
    asked = {re.split("[<>=]", requirement.text)[0].rpartition(".")[2] for requirement in requirements}
    measured = {name: metric for result in results for name, metric in result.metrics.items()}
    found = [demand.condition for demand in demands(None, checks, True) if demand.condition.name not in asked]
    return [
        f"{one.text} ({measured[one.name].text})"
        for one in found
        if one.name in measured and not one.met(measured[one.name].low, measured[one.name].high)
    ]
