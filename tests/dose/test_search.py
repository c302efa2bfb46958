"""The search on losses that are known functions of the dose."""

import math

import pytest

from liborth_cli.dose.courses import Course, course, courses
from liborth_cli.dose.gauge import Reading
from liborth_cli.dose.search import choose, search
from liborth_cli.dose.target import Target
from liborth_cli.dose.trials import Trial


class Bench:
    """Answers with formulas, and counts."""

    def __init__(self, course, forget, retention):
        self.course, self.forget, self.retention, self.asked = course, forget, retention, []

    def measure(self, dose):
        self.asked.append(dose)
        reading = Reading(
            forget=self.forget(dose),
            level=5.0,
            level_spread=1.0,
            retention=self.retention(dose),
            general=3.0,
            general_change=0.0,
        )
        removed = 1 / dose if self.course.kind == "rank" else dose
        return Trial(self.course.method, self.course.method, "top", self.course.amount(dose), dose, removed, reading)


def saturating(half):
    return lambda dose: 5.5 * dose / (dose + half)


def test_the_smallest_strength_that_reaches_the_level():
    bench = Bench(course("contrastive", None, 64), saturating(0.02), lambda dose: 1 - 0.01 * math.log1p(10 * dose))
    found = search(bench, Target.parse("forget>=fresh,retention>=0.95").with_ceiling())
    exact = 0.02 * 5.0 / 0.5
    assert found.best.reading.forget >= 5.0
    assert exact <= found.best.dose <= exact * 10 ** (1 / 32) * 1.01
    assert len(bench.asked) <= 7 + 5
    assert [t.removed for t in found.trials] == sorted(t.removed for t in found.trials)


def test_the_largest_share_that_keeps_enough_when_nothing_is_said_of_forgetting():
    bench = Bench(course("kfac", "tail", 64), lambda dose: dose, lambda dose: 1 - dose / 10)
    found = search(bench, Target.parse("retention>=0.975"))
    assert 0.2 < found.best.dose <= 0.25
    assert found.best.dose == pytest.approx(0.25, rel=0.05)
    assert found.best.amount.value == pytest.approx(1 - found.best.dose)


def test_nothing_meets_it_and_larger_doses_are_not_wasted():
    bench = Bench(course("contrastive", None, 64), lambda dose: 0.1, lambda dose: 1 - dose)
    found = search(bench, Target.parse("forget>=4,retention>=0.995"))
    assert found.best is None
    assert max(bench.asked) <= 1.0, "two doses in a row had spoilt the skill"
    assert choose([found], Target.parse("forget>=4")) is None


def test_overshooting_is_refused():
    """A method whose first effect is too much: below its border nothing, above it far beyond never-trained rows."""
    bench = Bench(course("scale", None, 64), lambda dose: 0.0 if dose < 0.24 else 9.0, lambda dose: 1.0)
    assert search(bench, Target.parse("forget>=4").with_ceiling()).best is None


def test_a_dose_below_the_grid_is_found():
    bench = Bench(course("contrastive", None, 64), saturating(1e-7), lambda dose: 1 - 50 * dose)
    found = search(bench, Target.parse("forget>=5,retention>=0.999").with_ceiling())
    assert found.best is not None
    assert found.best.dose < 1e-4


def test_ranks_are_whole_and_searched_downwards():
    bench = Bench(course("svd", None, 64), lambda rank: 5.0 if rank <= 11 else 0.0, lambda rank: 1.0)
    found = search(bench, Target.parse("forget>=5").with_ceiling())
    assert found.best.amount.value == 11
    assert all(dose == int(dose) for dose in bench.asked)


def test_the_best_of_several_keeps_most():
    target = Target.parse("forget>=1")
    made = []
    for name, lost in (("scale", 0.2), ("contrastive", 0.01), ("kfac", 0.1)):
        bench = Bench(course(name, "tail", 64), saturating(0.01), lambda dose, lost=lost: 1 - lost)
        made.append(search(bench, target))
    assert choose(made, target).course.method == "contrastive"


def test_both_sides_only_where_the_side_is_in_dispute():
    assert [(c.method, c.side) for c in courses(["kfac", "contrastive"], None, 64)] == [
        ("kfac", "tail"), ("kfac", "top"), ("contrastive", "top"),
    ]  # fmt: skip
    assert [c.side for c in courses(["kfac"], "top", 64)] == ["top"]
    low, high = (Course("kfac", side, "mass", (0.1,)) for side in ("tail", "top"))
    assert (low.amount(0.1).value, high.amount(0.1).value) == (0.9, 0.1), "a dose is what is taken away, on either side"
