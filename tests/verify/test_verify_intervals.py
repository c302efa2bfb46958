"""Intervals: as wide as Student's, honest at the edges, and the right side of a requirement."""

import math

import numpy as np
import pytest
from scipy.stats import t

from liborth_cli.errors import UsageError
from liborth_cli.verify.controls import match_level, retention
from liborth_cli.verify.intervals import measured, measured_two
from liborth_cli.verify.result import Metric, Result
from liborth_cli.verify.verdict import checks_for, decide, parse


def mean(values):
    return lambda w: (w @ values) / w.sum(1)


@pytest.mark.parametrize("count", [5, 12, 60])
def test_the_interval_of_a_mean_is_students(count):
    values = np.random.default_rng(count).normal(3.0, 1.0, count)
    metric = measured(mean(values), count, 0, "")
    reach = t.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count)
    assert metric.value == pytest.approx(values.mean())
    assert metric.high - metric.low == pytest.approx(2 * reach, rel=0.12)


def test_the_interval_covers_the_truth_nineteen_times_in_twenty():
    draw = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = draw.exponential(1.0, 30)
        metric = measured(mean(values), 30, trial, "")
        covered += metric.low <= 1.0 <= metric.high
    assert 0.87 <= covered / 200 <= 0.99


def test_one_row_has_no_interval_and_no_exception_leaves_something_open():
    assert measured(mean(np.ones(1)), 1, 0, "", (0.0, 1.0)) == Metric(1.0, 0.0, 1.0, "")
    none = measured(mean(np.zeros(8)), 8, 0, "", (0.0, 1.0))
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 8)), "Clopper and Pearson's end for 0 of 8"
    both = measured_two(lambda w, v: np.ones(len(w)), (8, 24), 0, "", (0.0, 1.0))
    assert both.low == pytest.approx(0.025 ** (1 / 8))


def test_retention_when_fine_tuning_gained_nothing_is_no_number():
    worse = retention(np.array([1.0, 1.0]), np.array([2.0, 2.0]), np.array([3.0, 3.0]), 0)
    assert math.isnan(worse.value)
    result = Result("controls", "", None, {"retention": worse})
    assert not decide(parse("retention>=0"), [result])[0].met


def test_retention_is_the_share_of_the_gain():
    metric = retention(np.array([6.0, 8.0]), np.array([2.5, 4.5]), np.array([2.0, 4.0]), 0)
    assert metric.value == pytest.approx(7 / 8)


@pytest.mark.parametrize(
    "text, value, low, high, met",
    [
        ("a==0", 0, 0, 0, True), ("a==0", 0, 0, 0.1, False), ("a>=0.99", 0.995, 0.991, 1.2, True),
        ("a>=0.99", 0.995, 0.985, 1.2, False), ("a<=5%", 0.05, 0.04, 0.05, True), ("a<0.05", 0.04, 0.03, 0.05, False),
        ("a > 0.9", 0.95, 0.91, 0.99, True), ("a<=1", math.nan, math.nan, math.nan, False),
        ("a<=1", 0.5, -math.inf, math.inf, False), ("canary.a>=-1", 0.5, -0.5, math.inf, True),
    ],
)  # fmt: skip
def test_a_requirement_holds_over_the_whole_interval_or_not_at_all(text, value, low, high, met):
    (decided,) = decide(parse(text), [Result("canary", "", None, {"a": Metric(value, low, high)})])
    assert (decided.met, decided.sentence.startswith("Met" if met else "NOT met")) == (met, True)
    assert decided.sentence.endswith(".")


@pytest.mark.parametrize("text", ["retention", "retention=>1", "retention>=high", "a>=nan", "nonsense.retention>=1", ">=1"])
def test_a_requirement_that_cannot_be_read_is_a_usage_error(text):
    with pytest.raises(UsageError, match="--require"):
        parse(text)


def test_requirements_call_the_checks_that_measure_them():
    assert checks_for(parse("extraction==0, retention>=0.9,barrier<=1"), []) == ["canary", "controls", "lmc"]
    assert checks_for(parse("extraction==0"), ["canary"]) == []
    assert parse("") == parse(None) == []


def test_a_metric_nobody_measured_is_named_with_what_there_is():
    result = Result("canary", "", None, {"extraction": Metric.exact(0)})
    with pytest.raises(UsageError, match="did you mean extraction"):
        decide(parse("extractoin==0"), [result])


def test_matching_finds_the_amount_or_says_that_it_cannot():
    amount, matched = match_level(lambda x: 3 - 2 * x, 2.2, 0.005)
    assert (amount, matched) == (pytest.approx(0.4, abs=0.01), True)
    bumpy = [0]

    def valley(x):
        bumpy[0] += 1
        return 1 + 4 * (x - 0.6) ** 2

    amount, matched = match_level(valley, 1.1, 0.01)
    assert matched and valley(amount) == pytest.approx(1.1, abs=0.02)
    assert bumpy[0] <= 12
    amount, matched = match_level(lambda x: 3 - x, 0.5, 0.01)
    assert (amount, matched) == (1.0, False)
