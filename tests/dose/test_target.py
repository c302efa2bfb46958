"""The target's grammar: what it reads, what it holds readings against, and what contradicts itself."""

import pytest

from liborth_cli.dose.gauge import Reading
from liborth_cli.dose.target import Target
from liborth_cli.errors import UsageError

READING = Reading(forget=4.5, recited=0.0, level=5.0, level_spread=1.0, retention=0.996, general=3.03, general_change=0.008)


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
        ("forget>=fresh-spread, retention>=0.995, general<=+1%", True),
        ("forget>=fresh-spread, retention>=0.999, general<=+1%", False),
    ],
)
def test_readings_are_held_against_it(text, met):
    assert Target.parse(text).met(READING) is met


def test_what_was_not_measured_is_not_met():
    assert not Target.parse("retention>=0").met(Reading(forget=1.0))


def test_the_ceiling_is_always_there():
    target = Target.parse("forget>=fresh").with_ceiling()
    assert target.met(Reading(forget=5.5, level=5.0, level_spread=1.0))
    assert not target.met(Reading(forget=6.5, level=5.0, level_spread=1.0)), "secrets that are too hard stand out"
    assert target.gone(Reading(forget=6.5, level=5.0, level_spread=1.0))
    assert target.missed(Reading(forget=6.5, level=5.0, level_spread=1.0)) == ["forget<=fresh+spread"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forget>=5,forget<=4", "contradict each other"),
        ("forget>=fresh,forget<=0.5*fresh,forget>=1", "give one of them"),
        ("forget>=fresh+spread,forget<=fresh-spread", "contradict each other"),
        ("retention>=0.9,retention>=0.8", "give one of them"),
        ("retention<=0.9", "retention takes >="),
        ("general>=1%", "general takes <="),
        ("retention>=99.5", "is a share"),
        ("general<=+3", "is a share of the loss"),
        ("skill>=0.9", "none of forget, recited, retention, general"),
        ("forget>4", "takes >= or <="),
        ("forget>=fresh-", "no loss or fresh"),
        ("forget>=5%", "no loss or fresh"),
        ("retention>=fresh", "no number"),
        ("", "none of"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        Target.parse(text)


@pytest.mark.parametrize("text", ["forget>=2*fresh", "forget>=fresh+2*spread", "forget>=fresh+1*spread,retention>=0.5"])
def test_asking_for_more_than_never_trained_contradicts_the_ceiling(text):
    if "1*" in text:
        Target.parse(text).with_ceiling()
        return
    with pytest.raises(UsageError, match="ceiling"):
        Target.parse(text).with_ceiling()
