"""The target's grammar: what it reads, what it holds readings against, and what contradicts itself."""

import pytest

from liborth_cli.dose.measure import Reading
from liborth_cli.dose.target import Target
from liborth_cli.errors import UsageError

READING = Reading(
    forget=4.5, recited=0.0, fresh=5.0, spread=1.0, retention=0.996, general=3.03, general_change=0.008, leak=0.2, relearn=0.1
)
BEFORE = Reading(forget=6.0, fresh=6.0, spread=1.0, retention=0.0, general=4.0)
AFTER = Reading(forget=0.1, recited=1.0, fresh=5.0, spread=1.0, retention=1.0, general=3.0, general_change=0.0, leak=1.0)


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("forget>=4.5", True),
        ("forget>=4.6", False),
        ("forget <= 4.6, forget >= 4.4", True),
        ("forget>=fresh", False),
        ("forget>=fresh-spread", True),
        ("forget>=fresh-0.5*spread", True),
        ("forget>=fresh-0.4*spread", False),
        ("forget>=fresh-0.5", True),
        ("forget>=0.9*fresh", True),
        ("forget>=0.91*fresh", False),
        ("forget<=fresh+spread", True),
        ("recited<=0", True),
        ("retention>=0.995", True),
        ("retention>=99.5%", True),
        ("retention>=99.7%", False),
        ("general<=+1%", True),
        ("general<=+0.5%", False),
        ("general<=+0.01", True),
        ("general<=-1%", False),
        ("general<=3.1", True),
        ("general<=3.0", False),
        ("leak<=0.25", True),
        ("leak<=10%", False),
        ("relearn<=0.1", True),
        ("relearn<0.1", False),
        ("recited==0", True),
        ("forget>=fresh-spread, retention>=0.995, general<=+1%", True),
        ("forget>=fresh-spread, retention>=0.999, general<=+1%", False),
    ],
)
def test_readings_are_held_against_it(text, met):
    assert Target.parse(text).met(READING) is met


def test_what_was_not_measured_is_not_met():
    assert not Target.parse("retention>=0").met(Reading(forget=1.0))


def test_what_always_holds():
    target = Target.parse("forget>=fresh").bounded(BEFORE, AFTER)
    assert target.met(Reading(forget=5.5, fresh=5.0, spread=1.0, retention=0.9))
    hard = Reading(forget=6.5, fresh=5.0, spread=1.0, retention=0.9)
    assert target.missed(hard) == ["forget<=fresh+spread"], "secrets that are too hard stand out"
    assert target.gone(hard)
    assert not target.met(Reading(forget=6.5, fresh=6.0, spread=1.0, retention=-0.1)), "a broken model has forgotten nothing"
    assert not Target.parse("forget>=5").bounded(Reading(), Reading(forget=0.1)).missed(Reading(forget=9.0)), (
        "nothing to see it by"
    )
    blind = Target.parse("forget>=5").bounded(Reading(general=3.0), Reading(general=2.0, forget=0.1))
    assert blind.missed(Reading(forget=9.0, general=3.4)) == ["general<=3.3"], "where no row shows the skill"


def test_an_overshot_leak_is_past_the_border_and_not_met():
    target = Target.parse("leak<=0.2")
    over = Reading(forget=8.0, fresh=5.0, leak=0.9)
    assert (target.gone(over), target.met(over)) == (True, False)
    assert not target.gone(Reading(forget=3.0, fresh=5.0, leak=0.9))


def test_what_the_fine_tuned_model_meets_promises_nothing():
    assert Target.parse("forget>=4,recited<=0,retention>=0.9").empty(AFTER) == []
    assert Target.parse("forget>=0.05,leak<=1").empty(AFTER) == ["forget>=0.05", "leak<=1"]


def test_a_target_says_what_it_does_not_promise():
    said = Target.parse("forget>=4,leak<=0.2").limits()
    assert "promises forget>=4, leak<=0.2" in said
    assert "recited" in said[said.index("does not promise") :]
    assert "bring them back" in said
    assert "told from" not in said
    assert "does not promise" not in Target.parse("recited==0,leak<=0.2,relearn<=0.2").limits()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no condition in it"),
        ("retention<=0.9", "retention takes >="),
        ("general>=1%", "general takes <="),
        ("general<=+3", "is a share of the loss"),
        ("skill>=0.9", "nothing measures 'skill'.*forget"),
        ("forgot>=4", "did you mean forget"),
        ("forget==4", "forget takes"),
        ("relearn>=1", "relearn takes"),
        ("leak<=20", "is a share"),
        ("recited<=0,recited<=0", "give one of them"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        Target.parse(text)


@pytest.mark.parametrize("text", ["forget>=2*fresh", "forget>=fresh+2*spread", "forget>=fresh+spread+0.1"])
def test_asking_for_more_than_never_trained_contradicts_the_ceiling(text):
    with pytest.raises(UsageError, match="ceiling"):
        Target.parse(text).bounded(BEFORE, AFTER)
    Target.parse("forget>=fresh+1*spread,retention>=0.5").bounded(BEFORE, AFTER)
