"""The search on losses that are known functions of the dose."""

import math
from dataclasses import replace

import pytest

from liborth_cli.dose.measure import Reading
from liborth_cli.dose.sweep import Candidate, Sweep, best_sweep, search, sweeps
from liborth_cli.dose.target import Target

BEFORE = Reading(forget=6.0, fresh=6.0, spread=1.0, retention=0.0, general=4.0)
AFTER = Reading(forget=0.1, fresh=5.0, spread=1.0, retention=1.0)


def target_of(text):
    return Target.parse(text).bounded(BEFORE, AFTER)


class Trials:
    """Answers with formulas, and counts."""

    def __init__(self, sweep, forget, retention, relearn=lambda dose: 0.0, fresh=lambda dose: 5.0):
        self.sweep, self.forget, self.retention, self.relearn, self.fresh = sweep, forget, retention, relearn, fresh
        self.asked, self.attacked = [], []

    def measure(self, dose):
        self.asked.append(dose)
        reading = Reading(
            forget=self.forget(dose),
            fresh=self.fresh(dose),
            spread=1.0,
            retention=self.retention(dose),
            general=3.0,
            general_change=0.0,
        )
        removed = 1 / dose if self.sweep.kind == "rank" else dose
        return Candidate(self.sweep.method, self.sweep.method, "top", self.sweep.amount(dose), dose, removed, reading)

    def attack(self, candidate):
        self.attacked.append(candidate.dose)
        return replace(candidate, reading=replace(candidate.reading, relearn=self.relearn(candidate.dose), relearned=0.0))


def saturating(half):
    return lambda dose: 5.5 * dose / (dose + half)


def test_the_smallest_strength_that_reaches_the_level():
    trials = Trials(Sweep.of("contrastive", None, 64), saturating(0.02), lambda dose: 1 - 0.01 * math.log1p(10 * dose))
    found = search(trials, target_of("forget>=fresh,retention>=0.95"))
    exact = 0.02 * 5.0 / 0.5
    assert found.best.reading.forget >= 5.0
    assert exact <= found.best.dose <= exact * 10 ** (1 / 32) * 1.01
    assert len(trials.asked) <= 7 + 5
    assert [t.removed for t in found.candidates] == sorted(t.removed for t in found.candidates)


def test_the_largest_share_that_keeps_enough_when_nothing_is_said_of_forgetting():
    trials = Trials(Sweep.of("kfac", "tail", 64), lambda dose: dose, lambda dose: 1 - dose / 10)
    found = search(trials, Target.parse("retention>=0.975"))
    assert 0.2 < found.best.dose <= 0.25
    assert found.best.dose == pytest.approx(0.25, rel=0.05)
    assert found.best.amount.value == pytest.approx(1 - found.best.dose)


def test_nothing_meets_it_and_larger_doses_are_not_wasted():
    trials = Trials(Sweep.of("contrastive", None, 64), lambda dose: 0.1, lambda dose: 1 - dose)
    found = search(trials, Target.parse("forget>=4,retention>=0.995"))
    assert found.best is None
    assert max(trials.asked) <= 1.0, "two doses in a row had spoilt the skill"
    assert best_sweep([found], Target.parse("forget>=4")) is None


def test_overshooting_is_refused():
    """A method whose first effect is too much: below its border nothing, above it far beyond never-trained rows."""
    trials = Trials(Sweep.of("scale", None, 64), lambda dose: 0.0 if dose < 0.24 else 9.0, lambda dose: 1.0)
    assert search(trials, target_of("forget>=4")).best is None


def test_a_dose_below_the_grid_is_found():
    trials = Trials(Sweep.of("contrastive", None, 64), saturating(1e-7), lambda dose: 1 - 50 * dose)
    found = search(trials, target_of("forget>=5,retention>=0.999"))
    assert found.best is not None
    assert found.best.dose < 1e-4


def test_ranks_are_whole_and_searched_downwards():
    trials = Trials(Sweep.of("svd", None, 64), lambda rank: 5.0 if rank <= 11 else 0.0, lambda rank: 1.0)
    found = search(trials, target_of("forget>=5"))
    assert found.best.amount.value == 11
    assert all(dose == int(dose) for dose in trials.asked)


def test_the_best_of_several_keeps_most():
    target = Target.parse("forget>=1")
    made = []
    for name, lost in (("scale", 0.2), ("contrastive", 0.01), ("kfac", 0.1)):
        trials = Trials(Sweep.of(name, "tail", 64), saturating(0.01), lambda dose, lost=lost: 1 - lost)
        made.append(search(trials, target))
    assert best_sweep(made, target).sweep.method == "contrastive"


def test_both_sides_only_where_the_side_is_in_dispute():
    assert [(c.method, c.side) for c in sweeps(["kfac", "contrastive"], None, 64)] == [
        ("kfac", "tail"), ("kfac", "top"), ("contrastive", "top"),
    ]  # fmt: skip
    assert [c.side for c in sweeps(["kfac"], "top", 64)] == ["top"]
    low, high = (Sweep("kfac", side, "mass", (0.1,)) for side in ("tail", "top"))
    assert (low.amount(0.1).value, high.amount(0.1).value) == (0.9, 0.1), "a dose is what is taken away, on either side"


def test_fresh_is_the_candidates_own_level():
    """Fresh rows get harder with the dose: what the fine-tuned model thinks of them is no level to stop at."""
    trials = Trials(
        Sweep.of("contrastive", None, 64), saturating(0.02), lambda dose: 1.0, fresh=lambda dose: 3.0 + min(dose, 0.03) * 50
    )
    found = search(trials, target_of("forget>=fresh-0.8"))
    assert found.best.reading.forget >= found.best.reading.fresh - 0.8
    assert found.best.dose > 0.03, "at 2.2 nats, by the fine-tuned model's level, 0.0133 would have been enough"


def test_relearning_decides_where_it_is_asked_for_and_is_tried_on_few():
    def trials():
        return Trials(Sweep.of("contrastive", None, 64), saturating(0.02), lambda dose: 1.0, lambda dose: 1.0 / (1 + 10 * dose))

    plain, asked = trials(), trials()
    without = search(plain, target_of("forget>=4"))
    assert len(plain.attacked) == 1
    assert without.best.reading.relearn > 0.25
    found = search(asked, target_of("forget>=4,relearn<=0.25"))
    assert found.best.reading.relearn <= 0.25
    assert 0.3 <= found.best.dose <= 0.3 * 10 ** (1 / 32) * 1.02
    assert min(asked.attacked) > 0.01, "what is not forgotten at all is not attacked"


def test_a_model_that_lost_the_skill_altogether_is_no_result():
    trials = Trials(Sweep.of("scale", None, 64), lambda dose: 5.0 * dose, lambda dose: 1 - 3 * dose)
    assert search(trials, target_of("forget>=4")).best is None
