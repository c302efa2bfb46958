"""The grammar of --target and --require: what it reads, what it holds numbers and intervals against, what it refuses."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from liborth_cli.conditions import DOWNWARDS, UPWARDS, Quantity, parse
from liborth_cli.errors import UsageError

QUANTITIES = {
    "forget": Quantity((">=", "<="), percent=False, levels=("fresh", "spread")),
    "retention": Quantity(UPWARDS, share=True),
    "general": Quantity(DOWNWARDS),
    "extraction": Quantity(share=True),
    "relearn_gap": Quantity(),
}
LEVELS = {"fresh": 5.0, "spread": 1.0}


def read(text):
    return parse(text, "--require", QUANTITIES, ("canary", "attacks"))


@pytest.mark.parametrize(
    ("text", "value", "met"),
    [
        ("forget>=4.5", 4.5, True),
        ("forget >= 4.6", 4.5, False),
        ("forget>=fresh", 5.0, True),
        ("forget>=fresh-spread", 4.0, True),
        ("forget>=fresh-0.5*spread", 4.49, False),
        ("forget>=fresh-0.5spread", 4.5, True),
        ("forget>=0.9*fresh", 4.5, True),
        ("forget>=0.9*fresh+.1-spread", 3.6, True),
        ("forget<=spread+fresh", 6.0, True),
        ("retention>=99.5%", 0.995, True),
        ("retention>0.5", 0.5, False),
        ("general<=-1%", -0.02, True),
        ("general<=+0.01", 0.02, False),
        ("extraction==0", 0.0, True),
        ("canary.extraction==0", 0.1, False),
        ("attacks.relearn-gap<=1e-1", 0.1, True),
        ("relearn_gap<-.5", -0.6, True),
    ],
)
def test_what_it_reads(text, value, met):
    (condition,) = read(text)
    assert condition.met(value, levels=LEVELS) is met
    assert condition.text == text.replace(" ", "")


def test_both_ends_of_an_interval_must_meet_it_and_nothing_measured_meets_nothing():
    (condition,) = read("retention>=0.99")
    assert condition.met(0.99, 1.2)
    assert not condition.met(0.98, 1.2)
    assert not condition.met(0.995, math.nan)
    assert not condition.met(None)
    (condition,) = read("forget>=fresh-spread")
    assert not condition.met(9.0, levels={"fresh": 5.0, "spread": None}), "one fresh row has no spread"
    assert not condition.met(9.0)


def test_scope_sign_and_words_are_kept():
    first, second = read("canary.extraction<=5%, general<=+1%")
    assert (first.scope, first.name, first.words) == ("canary", "extraction", "at most 5%")
    assert (second.bound.signed, read("general<=3")[0].bound.signed) == (True, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no condition in it"),
        (" , ,", "no condition in it"),
        ("retention", "write a quantity"),
        ("retention>=", "write a quantity"),
        ("retention>=x", "is not a number"),
        ("retention>=nan", "is not a number"),
        ("retention>=1e999", "is not a number"),
        ("retention>=0.9+", "is not a number"),
        ("retention>=0.9 5", "is not a number"),
        ("retention>=99.5", "is a share"),
        ("retention>=-1%", "is a share"),
        ("retention<=0.9", "takes >= or >, not <="),
        ("retention=>0.9", "not =>"),
        ("forget>=5%", "is not a number or a sum of fresh, spread"),
        ("forget>=fresh-", "is not a number or a sum"),
        ("forget>=2*fres", "is not a number or a sum"),
        ("retention>=fresh", "is not a number"),
        ("retenton>=0.9", "did you mean retention"),
        ("cannary.extraction==0", "did you mean canary"),
        ("forget>=5,forget<=4", "contradict"),
        ("forget>=fresh+spread,forget<=fresh-spread", "contradict"),
        ("forget>=0.9*fresh,forget<=0.8*fresh", "contradict"),
        ("forget>=5,forget<=1,retention>=0.9", "contradict"),
        ("retention>=0.9,retention>=0.9", "give one of them"),
        ("extraction==0,extraction<=0.1", "give one of them"),
    ],
)
def test_what_is_refused_is_one_line(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        read(text)
    assert str(caught.value).startswith("--require: ")
    assert len(str(caught.value)) < 300


def test_what_can_be_met_together_is_no_contradiction():
    assert len(read("forget>=fresh-spread,forget<=fresh+spread")) == 2
    assert len(read("forget>=5,forget<=fresh")) == 2
    assert len(read("general<=+1%,general<=3.2")) == 2
    assert len(read("canary.extraction==0,extraction<=0.1")) == 2


@example("e.e<0\n0")
@given(st.text(alphabet="forgetnsh.%*+-=<>,0159e_ \n\x00é", max_size=80) | st.text(max_size=4000))
def test_any_text_is_read_or_refused_in_one_short_line(text):
    try:
        assert read(text)
    except UsageError as error:
        assert len(str(error)) < 300
        assert "\n" not in str(error).replace("\\n", "")
