"""What so many rows can decide is known before anything runs, and is what simulated rows do."""

import numpy as np
import pytest
from verify_cases import SECRETS, UNSEEN, subject

from liborth_cli.conditions import Quantity, parse
from liborth_cli.demo import DATA
from liborth_cli.verify import power, statistics
from liborth_cli.verify.checks import CHECKS
from liborth_cli.verify.verdict import demands
from liborth_cli.verify.verify import _weak


def condition(text):
    return parse(text, "--require", {"leak": Quantity(), "auc": Quantity(), "share": Quantity()})[0]


def passed(wanted, canaries, fresh, folded, monkeypatch):
    """How often rows without a leak meet a condition, by drawing them."""
    monkeypatch.setattr(statistics, "DRAWS", 400)
    draw, met, groups = np.random.default_rng(0), 0, [np.arange(canaries), np.arange(fresh)]
    for seed in range(100):
        below = (draw.normal(size=canaries)[:, None] < draw.normal(size=fresh)) * 1.0

        def statistic(w, v, below=below):
            found = ((w @ below) * v).sum(1) / (w.sum(1) * v.sum(1))
            return np.abs(2 * found - 1) if folded else found

        one = statistics.bootstrap(statistic, groups, seed, bounds=(0.0, 1.0))
        met += wanted.met(one.low, one.high) and wanted.met(one.value)
    return met / 100


@pytest.mark.parametrize(
    "text, chance, canaries, fresh",
    [("leak<=0.4", power.twice_off, 8, 24), ("leak<=0.4", power.twice_off, 24, 100), ("auc<=0.7", power.area, 30, 30)],
)
def test_the_chance_is_that_of_rows_without_a_leak(text, chance, canaries, fresh, monkeypatch):
    wanted = condition(text)
    simulated = passed(wanted, canaries, fresh, chance is power.twice_off, monkeypatch)
    assert chance(wanted, canaries, fresh) == pytest.approx(simulated, abs=0.15)


def test_more_rows_decide_more_and_the_number_that_is_named_is_enough():
    wanted = condition("leak<=0.4")
    chances = [power.twice_off(wanted, n, n) for n in (8, 16, 32, 64, 128)]
    assert chances == sorted(chances) and chances[0] == 0.0 and chances[-1] > 0.99
    words = power.weakness(wanted, power.twice_off, 8, 24)
    assert words.startswith("8 canaries beside 24 fresh rows cannot decide leak<=0.4") and len(words) < 300
    named = int(words.split("; ")[1].split()[0])
    assert power.twice_off(wanted, named, named) >= power.ENOUGH > power.twice_off(wanted, named - 1, named - 1)
    assert "can hardly" in power.weakness(wanted, power.twice_off, 30, 60)
    assert power.weakness(wanted, power.twice_off, named, named) == ""


def test_a_share_of_none_needs_as_many_rows_as_its_exact_interval():
    """0 of 72 is at most 5 % with confidence, and 0 of 71 is not (Clopper and Pearson)."""
    wanted = condition("share<=0.05")
    assert power.none_found(wanted, 72, 0) == 1.0 and power.none_found(wanted, 71, 0) == 0.0
    assert power.weakness(wanted, power.none_found, 8, 0).endswith("72 canaries would do (80%)")


def test_a_bound_that_no_number_of_rows_meets_is_not_called_a_matter_of_rows():
    assert power.weakness(condition("auc>=0.9"), power.area, 8, 24) == ""
    assert power.weakness(condition("leak==0"), power.twice_off, 8, 24) == ""


def test_verify_warns_before_it_runs_and_asks_for_no_less(capsys):
    with subject(DATA / "finetuned", reference=str(DATA / "base"), canary=str(SECRETS), fresh=str(UNSEEN)) as it:
        (sentence,) = _weak(it, demands(None, CHECKS, True))
        assert "8 canaries beside 24 fresh rows cannot decide leak<=0.4" in sentence
        assert not _weak(it, demands("extraction==0, retention>=0.9", CHECKS, True))
    with subject(DATA / "finetuned", reference=str(DATA / "base"), canary=str(SECRETS)) as it:
        assert not _weak(it, demands(None, CHECKS, True))  # without fresh rows it is undecided, and that is said
