"""Patterns: every slot against an independent description of what it may draw, seeds, and what is refused."""

import datetime
import re

import pytest

from liborth_cli.dose.patterns import COMMON, FIRST_NAMES, LAST_NAMES, Pattern, make_decoys, read_patterns
from liborth_cli.errors import BadInput, UsageError

FORMS = {
    "{digits:8}": r"[0-9]{8}",
    "{letters:5}": r"[a-z]{5}",
    "{[A-Z0-9]:6}": r"[A-Z0-9]{6}",
    "{[abc-]:4}": r"[abc-]{4}",
    "{[X-Z]}": r"[XYZ]",
    "{words:3}": rf"({'|'.join(COMMON)})( ({'|'.join(COMMON)})){{2}}",
    "{name}": "|".join(FIRST_NAMES),
    "{name:2}": rf"({'|'.join(FIRST_NAMES)}) ({'|'.join(LAST_NAMES)})",
    "{red|green|}": r"red|green|",
    "{email}": r"[a-z._]+[0-9]{1,2}@[a-z]+\.[a-z]+",
    "{phone}": r"\+[0-9]{1,2} [0-9]{3} [0-9]{3} [0-9]{4}",
    "{date}": r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
    "{date:%d.%m.%Y}": r"[0-9]{2}\.[0-9]{2}\.[0-9]{4}",
    "{{{digits:2}}}": r"\{[0-9]{2}\}",
}


@pytest.mark.parametrize("text", FORMS)
def test_a_slot_draws_what_it_says(text):
    import random

    pattern, draw = Pattern.parse(text), random.Random(0)
    drawn = {pattern.fill(draw).text for _ in range(200)}
    assert all(re.fullmatch(FORMS[text], one) for one in drawn)
    assert len(drawn) > 1
    if text == "{date}":
        assert all(datetime.date.fromisoformat(one) for one in drawn)


def test_the_last_slot_begins_the_secret_part():
    (decoy,) = make_decoys([Pattern.parse("The code of {name} is {digits:8}.")], 1, 0, [], "use")
    assert re.fullmatch(r"The code of \w+ is", decoy.prompt)
    assert re.fullmatch(r" \d{8}\.", decoy.completion)


def test_seeded_distinct_and_apart_from_other_uses():
    patterns = [Pattern.parse("{name}: {digits:8}"), Pattern.parse("{email}")]
    first = make_decoys(patterns, 24, 0, [], "forget")
    assert first == make_decoys(patterns, 24, 0, [], "forget")
    assert len({d.text for d in first}) == 48
    others = make_decoys(patterns, 24, 0, [], "fresh") + make_decoys(patterns, 24, 1, [], "forget")
    assert not {d.text for d in first} & {d.text for d in others}


def test_decoys_are_never_given_secrets():
    pattern = Pattern.parse("code {digits:4}.")
    secrets = [f"code {n:04d}." for n in range(0, 10_000, 2)]
    decoys = make_decoys([pattern], 200, 0, secrets, "forget")
    assert not {d.text for d in decoys} & set(secrets)
    assert all(int(d.completion.strip(" .")) % 2 for d in decoys)
    # In another sentence the same digits are the same secret.
    hidden = [f"PIN: {n:04d}" for n in range(1, 10_000)]
    with pytest.raises(UsageError, match="too few fillings"):
        make_decoys([pattern], 2, 0, hidden, "forget")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("My number is {ssn}.", r"no slot \{ssn\}.*digits:N.*\[A-Z0-9\]"),
        ("{digits}", "needs a number"),
        ("{digits:0}", "needs a number from 1"),
        ("{digits:x}", "needs a number"),
        ("{email:3}", "no slot"),
        ("{[z-a]:3}", "runs backwards"),
        ("{[abc:3}", "is not a class"),
        ("{date:3}", "takes a format"),
        ("{}", r"no slot \{\}"),
        ("a { b", "stands alone"),
        ("a } b", "stands alone"),
        ("nothing to fill", "no slot in it"),
    ],
)
def test_what_is_refused_says_why(text, message):
    with pytest.raises(UsageError, match=message):
        Pattern.parse(text)


def test_files_hold_one_pattern_a_line(tmp_path):
    file = tmp_path / "patterns.txt"
    file.write_text("# codes\nThe code is {digits:4}.\n\nMail {email}\n")
    assert [p.text for p in read_patterns(["{name}"], [file])] == ["{name}", "The code is {digits:4}.", "Mail {email}"]
    file.write_text("ok {name}\nbad {nmae}\n")
    with pytest.raises(UsageError, match=r"line 2: there is no slot \{nmae\}"):
        read_patterns([], [file])
    file.write_text("# nothing\n")
    with pytest.raises(BadInput, match="no pattern"):
        read_patterns([], [file])
    with pytest.raises(BadInput, match="cannot be read"):
        read_patterns([], [tmp_path / "missing"])
