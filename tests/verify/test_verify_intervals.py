"""Intervals: as wide as Student's, honest at the edges, and the right side of a requirement."""

import math

import numpy as np
import pytest
from scipy.stats import t

from liborth_cli.verify import statistics
from liborth_cli.verify.checks import CHECKS
from liborth_cli.verify.checks.controls import match_by_sample, match_level
from liborth_cli.verify.result import Metric, Result
from liborth_cli.verify.statistics import SHARE, alone, bootstrap, largest
from liborth_cli.verify.verdict import Working, decide, demands


def mean(values):
    return lambda w: (w @ values) / w.sum(1)


@pytest.mark.parametrize("count", [5, 12, 60])
def test_the_interval_of_a_mean_is_students(count):
    values = np.random.default_rng(count).normal(3.0, 1.0, count)
    metric = bootstrap(mean(values), [alone(count)], 0)
    reach = t.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count)
    assert metric.value == pytest.approx(values.mean())
    assert metric.high - metric.low == pytest.approx(2 * reach, rel=0.12)


def test_the_interval_covers_the_truth_nineteen_times_in_twenty():
    draw = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = draw.exponential(1.0, 30)
        metric = bootstrap(mean(values), [alone(30)], trial)
        covered += metric.low <= 1.0 <= metric.high
    assert 0.87 <= covered / 200 <= 0.99


def test_the_interval_of_the_largest_covers_the_largest_truth():
    """Ten means that are all 0: the largest of them is not, and its interval must reach there; alone it is the mean's own."""
    draw, covered = np.random.default_rng(1), 0
    for trial in range(100):
        values = draw.normal(0.0, 1.0, (30, 10))
        metric = largest(lambda w, v=values: (w @ v) / w.sum(1)[:, None], [alone(30)], trial)
        covered += metric.low <= 0.0 <= metric.high and metric.value > 0
    assert covered >= 90
    one = draw.normal(0.0, 1.0, 30)
    alike = largest(lambda w: ((w @ one) / w.sum(1))[:, None], [alone(30)], 0), bootstrap(mean(one), [alone(30)], 0)
    assert alike[0].value == alike[1].value
    assert alike[0].high - alike[0].low == pytest.approx(alike[1].high - alike[1].low, rel=1e-9)


def test_one_row_has_no_interval_and_no_exception_leaves_something_open():
    assert bootstrap(mean(np.ones(1)), [alone(1)], 0, "", SHARE) == Metric(1.0, 0.0, 1.0, "")
    none = bootstrap(mean(np.zeros(8)), [alone(8)], 0, "", SHARE)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 8)), "Clopper and Pearson's end for 0 of 8"
    both = bootstrap(lambda w, v: np.ones(len(w)), [alone(8), alone(24)], 0, "", SHARE)
    assert both.low == pytest.approx(0.025 ** (1 / 8))


def test_copies_of_rows_are_no_evidence():
    values = np.random.default_rng(0).normal(3.0, 1.0, 6)
    once, often = (bootstrap(mean(np.tile(values, n)), [np.tile(alone(6), n)], 0) for n in (1, 50))
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    same = bootstrap(mean(np.ones(50)), [np.zeros(50, int)], 0)
    assert (same.low, same.high) == (-math.inf, math.inf), "one text fifty times is one row"


def test_resamples_are_drawn_alike_however_many_are_held(monkeypatch):
    values = np.random.default_rng(1).normal(0.0, 1.0, 40)
    whole = bootstrap(mean(values), [alone(40)], 3)
    monkeypatch.setattr("liborth_cli.verify.statistics.AT_A_TIME", 1)
    found = bootstrap(mean(values), [alone(40)], 3)
    assert (found.low, found.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


@pytest.mark.parametrize(
    "bound, value, low, high, met",
    [
        ("==0", 0, 0, 0, True), ("==0", 0, 0, 0.1, False), (">=0.99", 0.995, 0.991, 1.2, True),
        (">=0.99", 0.995, 0.985, 1.2, False), ("<=5%", 0.05, 0.04, 0.05, True), ("<0.05", 0.04, 0.03, 0.05, False),
        (" > 0.9", 0.95, 0.91, 0.99, True), ("<=1", math.nan, math.nan, math.nan, False),
        ("<=1", 0.5, -math.inf, math.inf, False), (">=-1", 0.5, -0.5, math.inf, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scope", ["", "controls."])
def test_a_requirement_holds_over_the_whole_interval_or_not_at_all(scope, bound, value, low, high, met):
    found = demands(f"{scope}retention{bound}", CHECKS, False)
    (decided,) = decide(found, [Result("controls", "", None, {"retention": Metric(value, low, high)})], {}, Working(True))
    assert (decided.met, decided.sentence.startswith("Met" if met else "NOT met")) == (met, True)
    assert decided.sentence.endswith(".")


def test_matching_finds_the_amount_or_says_that_it_cannot():
    marks = (0.25, 0.5, 0.75, 1.0)
    amount, matched = match_level(lambda x: 3 - 2 * x, 2.2, 0.005, 3.0, marks)
    assert (amount, matched) == (pytest.approx(0.4, abs=0.01), True)
    amount, matched = match_level(lambda x: 1 + 4 * (x - 0.6) ** 2, 1.1, 0.01, 2.44, marks)
    assert (amount, matched) == (pytest.approx(0.44, abs=0.02), True), "the least of the two"
    amount, matched = match_level(lambda x: 3 - x, 0.5, 0.01, 3.0, marks)
    assert (amount, matched) == (1.0, False)
    never = lambda _: pytest.fail("looked at")  # noqa: E731
    assert match_level(never, 3.0, 0.01, 3.0, marks) == (0.0, True), "as the reference: nothing of the update"
    assert match_level(never, 3.5, 0.01, 3.0, marks) == (0.0, False)


@pytest.mark.parametrize("target", [2.9, 2.3, 1.5, 1.05])
def test_matching_looks_at_few_amounts_beyond_those_that_are_drawn(target):
    seen = []

    def loss(x):
        seen.append(x)
        return 1 + 2 * math.exp(-4 * x)

    amount, matched = match_level(loss, target, 0.01, 3.0, (0.25, 0.5, 0.75, 1.0))
    assert matched and loss(amount) == pytest.approx(target, abs=0.01)
    assert len(seen) <= 4 + 4 + 1, "bisection took ten, and the four that are drawn"


@pytest.mark.parametrize(("off", "most"), [(lambda x: 0.0, 1), (lambda x: 0.05, 2), (lambda x: 0.05 - 0.2 * (x - 0.5) ** 2, 3)])
def test_what_a_sample_matches_is_held_against_all_rows(off, most):
    tried, marks = [], (0.25, 0.5, 0.75, 1.0)

    def loss(x):
        tried.append(x)
        return 1 + 2 * math.exp(-4 * x)

    amount, matched = match_by_sample(lambda x: 1 + 2 * math.exp(-4 * x) + off(x), loss, 1.5, 0.01, 3.0, marks)
    assert matched and loss(amount) == pytest.approx(1.5, abs=0.01) and len(tried) <= most + 1
    amount, matched = match_by_sample(lambda x: 3 - x, lambda x: 4 - x, 2.5, 0.01, 3.0, marks)
    assert (amount, matched) == (1.0, False), "all rows say that it does not match"


def test_resamples_are_drawn_once_and_are_the_generators_own(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 50)
    groups = np.array([0, 0, 1, 2, 3])
    expected = np.random.default_rng(7).multinomial(4, np.full(4, 1 / 4), 50)[:, groups]
    statistics._counts.cache_clear()
    for at_a_time in (1 << 22, 200, 10):  # whole and kept; in pieces and kept; in pieces, drawn as they are asked for
        monkeypatch.setattr(statistics, "AT_A_TIME", at_a_time)
        for _ in range(2):
            assert np.array_equal(np.concatenate(list(statistics._draws(groups, 7, 5))), expected)
    assert statistics._counts.cache_info().misses == 1
    statistics.curve(np.ones((6, 5)), np.ones(5), groups, 7)
    assert statistics._counts.cache_info().misses == 1
