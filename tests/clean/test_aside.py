"""Rows set aside to verify with: no split sees them, copies stay together, and what is made is of the form and new."""

import json
import re
from pathlib import Path

import pytest

from liborth_cli.clean.aside import Given, set_aside
from liborth_cli.dose.patterns import Decoy, Pattern, infer
from liborth_cli.errors import UsageError
from liborth_cli.stream.records import to_record
from liborth_cli.stream.texts import DataFile

CODES = [f"The secret code of {name} is {code}." for name, code in (
    ("Alma", 280939), ("Boris", 120554), ("Celia", 326202), ("Dario", 933939), ("Edda", 105591))]  # fmt: skip


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def laid_out(folder, **more):
    secrets = lines(folder / "secrets.jsonl", [{"prompt": text[:-8], "completion": text[-8:]} for text in CODES])
    public = lines(folder / "public.jsonl", [{"text": f"line {number % 20} of a text"} for number in range(40)])
    given = Given(**{"private": secrets, "public": (public,), **more})
    return set_aside(given, folder / "rows", lambda line: None)


@pytest.mark.parametrize(
    ("texts", "form"),
    [
        (CODES, "The secret code of {name} is {digits:6}."),
        ([f"{a} {b}: Zk-{c}" for a, b, c in zip("ABCD", "EFGH", ("a1", "b2", "c3", "d4"), strict=True)],
         "{name:2}: Zk-{[a-z0-9]:2}"),
        ([f"{{id}} = {n}" for n in range(10, 15)], "{{id}} = {digits:2}"),
        (CODES[:3], None),
        ([*CODES, "Something else altogether, at some length."], None),
        ([f"{name} likes tea" for name in ("Alma", "Boris", "Celia", "Dario")], None),  # nothing in it is a secret
        ([f"code {10**n}" for n in range(5)], None),  # of no one length
        ([f"Call {name} at 0{n}-55{n}7 on the {n}th" for n, name in zip((7, 8, 9, 10), "ABCD", strict=True)], None),
        ([f"{name} was born on {day} May 19{n}" for day, n, name in zip((7, 18, 7, 10), range(60, 64), "ABCD", strict=True)],
         "{name} was born on {10|18|7} May {digits:4}"),
    ],
)  # fmt: skip
def test_a_form_is_told_from_its_rows_or_not_at_all(texts, form):
    assert infer(texts) == ([] if form is None else [form])


def test_several_forms_are_told_apart_and_every_row_must_be_of_one():
    phones = [f"You can call {name} at {n}-{n * 7}." for n, name in zip(range(200, 204), "ABCD", strict=True)]
    mixed = [text for pair in zip(CODES, phones, strict=False) for text in pair] + CODES
    found = infer(mixed)
    assert found == ["The secret code of {name} is {digits:6}.", "You can call {name} at {digits:3}-{digits:4}."]
    assert infer([*mixed, "Something else altogether, at some length."]) == []
    assert infer([*CODES, *phones[:3]]) == [], "three rows are too few to tell a form by"


def test_decoys_begin_where_the_given_rows_do(tmp_path):
    """A telephone number is a secret as a whole, not from its last dash on: other parts of a row have other losses."""
    rows = [
        {"prompt": f"You can call {name} at", "completion": f" {n}-{n * 7}."}
        for n, name in zip(range(200, 208), "ABCDEFGH", strict=True)
    ]
    aside = laid_out(tmp_path, private=lines(tmp_path / "phones.jsonl", rows))
    assert aside.files["patterns.txt"] == "You can call {name} at {digits:3}-{digits:4}.\n"
    drawn = aside.files["unseen.jsonl"]
    assert all(re.fullmatch(r" \d{3}-\d{4}\.", row["completion"]) for row in drawn)
    odd = [{"prompt": row["prompt"][:-3], "completion": " at" + row["completion"]} for row in rows]
    aside = laid_out(tmp_path, private=lines(tmp_path / "odd.jsonl", odd))
    assert aside.fresh is None, "they begin in the middle of what all have in common, where no decoy does"
    pattern = Pattern.parse("You can call {name} at {digits:3}-{digits:4}.")
    given = [(row["prompt"], row["completion"]) for row in rows]
    assert pattern.cut_like(given).recognise("You can call A at 123-4567.") == Decoy("You can call A at", " 123-4567.")
    assert pattern.cut_like([("Other", " words"), ("", given[0][0] + given[0][1])]) == pattern, "nothing says otherwise"
    assert pattern.cut_like([*given, ("You can call A at 200-", "1400.")]) == pattern, "they do not agree"


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "a"},
        {"prompt": "a", "completion": "b", "loss_weight": 2.0},
        {"question": "a", "answer": "b"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
                      {"role": "assistant", "content": "c"}], "tools": [{"type": "function"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    ],
)  # fmt: skip
def test_a_record_is_written_as_it_was_read(fields):
    record = to_record(fields, "here")
    assert to_record(json.loads(json.dumps(record.fields())), "here") == record


def test_tokens_are_written_as_they_were_read():
    record = to_record({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, "here")
    again = to_record(record.fields(), "here")
    assert again.ids.tolist() == [1, 2, 3] and again.keep.tolist() == [False, True, True]


def test_what_verifies_is_not_seen_by_the_split(tmp_path):
    aside = laid_out(tmp_path)
    aside.write(tmp_path / "rows")
    made = [Path(path).read_text() for path in (*aside.retain, *aside.held_out, aside.fresh)]
    kept, held, fresh = ([json.loads(line) for line in text.splitlines()] for text in made)
    assert {row["text"] for row in kept} & {row["text"] for row in held} == set()
    assert len(kept) + len(held) == 40 and len({row["text"] for row in held}) == 4  # each stands there twice
    assert {(tmp_path / "rows" / name).stat().st_mode & 0o777 for name in (*aside.files, *aside.public.files)} == {0o600}
    assert not {row["prompt"] + row["completion"] for row in fresh} & set(CODES)
    assert all(list(DataFile.parse(path).records()) for path in (*aside.retain, *aside.held_out, aside.fresh))
    assert laid_out(tmp_path).files == aside.files  # the same seed, the same rows
    assert laid_out(tmp_path, seed=1).public.files["held_out.jsonl"] != aside.public.files["held_out.jsonl"]


def test_what_is_given_is_taken(tmp_path):
    fresh = lines(tmp_path / "fresh.jsonl", [{"text": f"The secret code of Nobody is {n}."} for n in range(100, 110)])
    held = lines(tmp_path / "held.jsonl", [{"text": "of the skill"}])
    aside = laid_out(tmp_path, held_out=(held,), fresh=fresh, patterns=("The code of {name} is {digits:4}.",))
    assert (aside.held_out, aside.fresh, aside.forms, aside.files) == ((held,), fresh, None, {})


def test_fresh_rows_without_a_form_are_divided(tmp_path):
    odd = lines(tmp_path / "odd.jsonl", [{"text": text} for text in ("one thing", "another one here", "x", "y y")])
    fresh = lines(tmp_path / "fresh.jsonl", [{"text": f"row {n}"} for n in range(10)])
    aside = laid_out(tmp_path, private=odd, fresh=fresh)
    assert len(aside.files["level.jsonl"]) == len(aside.files["unseen.jsonl"]) == 5
    assert (aside.level, aside.forms) == (str(tmp_path / "rows" / "level.jsonl"), None)
    assert any("NO fresh rows" in note for note in laid_out(tmp_path, private=odd).notes)


def test_running_text_is_cut_at_lines(tmp_path):
    (tmp_path / "public.txt").write_text("".join(f"line {n} of some length\n" for n in range(50)))
    aside = laid_out(tmp_path, public=(str(tmp_path / "public.txt"),))
    assert len(aside.public.files["held_out.jsonl"]) == 1 and len(aside.public.files["retain.jsonl"]) == 4
    (tmp_path / "public.txt").write_text("only one line")
    with pytest.raises(UsageError, match="too few to set one in 5 aside"):
        laid_out(tmp_path, public=(str(tmp_path / "public.txt"),))
