"""Candidates that differ in the value alone, ranks against ranks written out, and what a model that knows the value shows."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from deep_cases import subject, text_row

from liborth_cli.demo import DATA
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.texts import Row
from liborth_cli.verify import power
from liborth_cli.verify.check import Options
from liborth_cli.verify.checks import CHECKS, attributes
from liborth_cli.verify.checks.attributes import AttributesOptions, _others

ENCODER = TextEncoder(DATA / "finetuned")
STATES = {"reference": DATA / "base", "finetuned": DATA / "finetuned", "general": DATA / "finetuned"}
SECRETS = [json.loads(line) for line in (DATA / "secrets.jsonl").read_text().splitlines()]


def rows(pairs):
    return [text_row(ENCODER, one["prompt"], one["completion"]) for one in pairs]


def test_a_candidate_differs_in_its_digits_and_in_nothing_else():
    texts = _others(" badge KR-4711, room 12b of Ada's.", {}, 16, random.Random(0))
    assert len(set(texts)) == 16 and all(re.fullmatch(r" badge KR-\d{4}, room \d{2}b of Ada's\.", text) for text in texts)
    assert " badge KR-4711, room 12b of Ada's." not in texts
    assert _others(" HE LIVES in Oslo with Ada.", {}, 16, random.Random(0)) == []
    assert len(_others(" 7.", {}, 16, random.Random(0))) == 9, "there are no more digits"


def test_days_and_years_are_drawn_from_those_that_there_are():
    days = [f" on {1940 + day}-{1 + day % 12:02d}-{day:02d}." for day in range(1, 32)]
    drawn = _others(days[3], attributes._known(days), 64, random.Random(0))
    assert len(drawn) == 64 and days[3] not in drawn
    for text in drawn:
        year, month, day = map(int, re.fullmatch(r" on (\d{4})-(\d\d)-(\d\d)\.", text).groups())
        assert (1941 <= year <= 1971, 1 <= month <= 12, 1 <= day <= 31) == (True, True, True)
    few = _others(days[3], attributes._known(days[:5]), 64, random.Random(0))
    assert any(int(text[9:11]) > 12 for text in few), "five dates say nothing of what a date may be"
    long = [f" 49{number:06d}." for number in range(20)]
    assert all(re.fullmatch(r" 490000\d\d\.", text) for text in _others(long[3], attributes._known(long), 16, random.Random(0)))


def test_true_values_have_the_ranks_of_luck_where_nothing_but_the_form_is_known():
    """A scorer of texts that knows which digits are usual where, and no value: over many canaries the mean rank is a half."""
    draw, total = random.Random(1), []
    texts = [f" {draw.randrange(1900, 2000)}-{draw.randrange(1, 13):02d}, {draw.randrange(10**8):08d}." for _ in range(300)]
    known = attributes._known(texts)
    for text in texts:
        some = (text, *_others(text, known, 16, draw))
        score = {one: draw.random() + (one[6:8] > "12") + (one[1:3] != "19") for one in some}
        total.append(np.mean([score[text] < score[one] for one in score if one != text]))
    assert np.mean(total) == pytest.approx(0.5, abs=0.06)


def test_ranks_are_those_that_counting_gives():
    losses = np.array([[3.0, 4.0, 2.0, 3.0], [1.0, 5.0, 6.0, 7.0]])
    assert attributes._likelier(losses).tolist() == [[1.0, 0.0, 0.5], [1.0, 1.0, 1.0]]
    before = np.array([[5.0, 4.0, 4.0, 9.0], [0.0, 6.0, 0.0, 6.0]])
    assert attributes._likelier(losses, before).tolist() == [[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]


def test_who_knows_the_value_finds_it_and_who_never_saw_it_does_not():
    with subject(STATES, canaries=rows(SECRETS)) as it:
        found = attributes.run(it, AttributesOptions())
        assert set(found.metrics) == set(attributes.CHECK.metrics)
        assert found.metrics["attribute_first"].value == 1.0 and found.metrics["attribute_leak"].value == 1.0
        it.states.weights["general"] = it.states.weights["reference"]
        it.states._scores.clear()
        nothing = attributes.run(it, AttributesOptions())
    assert nothing.metrics["attribute_auc"].value == 0.5 and nothing.metrics["attribute_leak"].value == 0.0
    assert nothing.metrics["attribute_auc"].finetuned == 1.0 and nothing.metrics["attribute_first"].value <= 0.25
    assert "16 others" in nothing.verdict and "by chance 6%" in nothing.verdict


def test_losses_are_those_of_the_rows_written_out():
    with subject(STATES, canaries=rows(SECRETS[:3])) as it:
        found = attributes.candidates(it, AttributesOptions(attributes_others=17))
        losses = attributes._losses(it, found, "general", lambda n: None)
        assert losses.shape == (3, 18) and found.of == [0, 1, 2] and len(found.rows) == 54
        again = attributes.candidates(it, AttributesOptions(attributes_others=17))
        assert [row.ids.tolist() for row in again.rows] == [row.ids.tolist() for row in found.rows]
        for number, row in enumerate(found.rows):
            text, one = ENCODER.decode(row.ids), SECRETS[number // 18]
            assert text.startswith(one["prompt"]) and (text == one["prompt"] + one["completion"]) == (number % 18 == 0)
        by_hand = it.states.score_rows([found.rows[21]], it.states.weights["general"])[0].loss.sum()
        assert losses[1, 3] == pytest.approx(by_hand, rel=1e-5)


def test_rows_with_marks_that_are_no_text_keep_them():
    (row,) = rows(SECRETS[:1])
    marked = Row(np.append(row.ids, ENCODER._tokenizer.eos_token_id), np.append(row.keep, True), 1.0, "line 1")
    assert ENCODER.decode(marked.ids) == ENCODER.decode(row.ids), "the mark is special"
    with subject(STATES, canaries=[marked]) as it:
        found = attributes.candidates(it, AttributesOptions())
    assert found.of == [0] and all(one.ids[-1] == marked.ids[-1] and one.keep[-1] for one in found.rows)
    prompt = len(row.ids) - row.keep.sum()
    assert all(np.array_equal(one.ids[:prompt], row.ids[:prompt]) for one in found.rows)


def test_of_a_conversation_the_first_turn_with_a_number_counts_and_its_marks_stay():
    prompt, first, middle, second = (ENCODER.plain(text) for text in ("The code of Ada", "is 4711.", "And of Bob?", "is 1234."))
    mark, newline = [ENCODER._tokenizer.eos_token_id], ENCODER.plain("\n")
    parts = [prompt, first, mark, newline, middle, second, mark]
    keep = np.concatenate([np.full(len(part), i in (1, 2, 3, 5, 6)) for i, part in enumerate(parts)])
    with subject(STATES, canaries=[Row(np.concatenate(parts), keep[1:], 1.0, "line 1")]) as it:
        found = attributes.candidates(it, AttributesOptions())
    assert found.of == [0] and len(found.rows) == 17
    end = len(prompt) + len(first) + 1 + len(newline)
    assert np.array_equal(found.rows[0].ids, np.concatenate(parts)[:end])
    for row in found.rows:
        assert np.array_equal(row.ids[: len(prompt)], prompt) and row.keep.sum() == len(row.ids) - len(prompt)
        assert row.ids[-1 - len(newline)] == mark[0] and re.search(r"is \d{4}\.", ENCODER.decode(row.ids))


def test_a_row_without_a_prompt_is_not_tried(tmp_path):
    """It is cut in two halves of its tokens, so where it is cut tells how many tokens its value has."""
    from verify_cases import subject as opened

    lines = [f"{one['prompt']}{one['completion']}" for one in SECRETS[:4]]
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n")
    with opened(DATA / "finetuned", canary=str(tmp_path / "lines.txt")) as it:
        assert "most of these have no prompt of their own" in attributes.CHECK.missing(it, AttributesOptions())
        assert attributes.candidates(it, AttributesOptions()).left[attributes.HALVED] == 4


def test_other_values_stand_behind_the_same_tokens():
    """However a tokenizer puts a space before a text: the border may fall behind it, or inside a word."""
    (row,) = rows(SECRETS[:1])
    for behind in (3, 8):  # "39." and " 280939."
        keep = np.zeros_like(row.keep)
        keep[-behind:] = True
        with subject(STATES, canaries=[Row(row.ids, keep, 1.0, f"line {behind}")]) as it:
            found = attributes.candidates(it, AttributesOptions())
        assert len(found.rows) == 17 and all(np.array_equal(one.ids[:-behind], row.ids[:-behind]) for one in found.rows)


def test_canaries_that_are_not_tried_are_counted_with_the_reason():
    more = [{"prompt": "Ada lives in", "completion": " Oslo."}, {"prompt": "Bob has", "completion": " 7."}]
    with subject(STATES, canaries=rows([*SECRETS[:4], *more, SECRETS[0]])) as it:
        found = attributes.run(it, AttributesOptions())
    assert found.facts.canaries == [0, 1, 2, 3]
    assert "Not tried: 1 are copies; 1 hold no digits; 1 have too few other values." in found.verdict
    with subject(STATES, canaries=rows(more[:1])) as it:
        assert "most of these hold no digits" in attributes.CHECK.missing(it, AttributesOptions())


def test_a_budget_takes_canaries_evenly_and_says_so():
    many = [{**one, "prompt": f"{i}. {one['prompt']}"} for i in range(8) for one in SECRETS]
    with subject(STATES, canaries=rows(many)) as it:
        some = attributes.candidates(it, AttributesOptions(attributes_tokens=1))
        assert some.of == list(range(0, 64, 2)) and some.left[attributes.MORE] == 32, "thirty-two are never too many"
        work = attributes.CHECK.work(it, AttributesOptions(attributes_tokens=1))
        assert work.read == 3 * sum(row.tokens for row in some.rows)
        assert len(attributes.candidates(it, AttributesOptions(attributes_tokens=1 << 20)).of) == 64


def test_under_all_attacks_more_is_tried():
    thorough = attributes.CHECK.thorough(AttributesOptions())
    assert (thorough.attributes_others, thorough.attributes_tokens) == attributes.THOROUGH and CHECKS["attributes"].attack
    assert isinstance(thorough, Options)


def test_a_value_among_its_own_needs_half_of_the_rows_that_fresh_ones_take():
    from liborth_cli.conditions import Quantity, parse

    wanted = parse("leak<=0.4", "--require", {"leak": Quantity()})[0]
    draw, met = np.random.default_rng(0), 0
    for _ in range(400):
        ranks = draw.integers(0, 17, 24) / 16
        off, reach = abs(ranks.mean() - 0.5), 1.96 * ranks.std() / 24**0.5
        met += 2 * (off + reach) <= 0.4
    assert power.own_twice_off(wanted, 24, 0) == pytest.approx(met / 400, abs=0.15)
    assert power.own_twice_off(wanted, 24, 0) > power.twice_off(wanted, 24, 24)
    assert power.weakness(wanted, power.own_twice_off, 8, 0).startswith("8 canaries cannot decide leak<=0.4")


def test_all_attacks_leave_out_what_the_canaries_do_not_allow_and_a_name_does_not(tmp_path):
    from verify_cases import subject as opened

    from liborth_cli.errors import UsageError
    from liborth_cli.verify.opening import Inputs
    from liborth_cli.verify.result import Why
    from liborth_cli.verify.verify import VerifyOptions, _choose

    (tmp_path / "words.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} lives in", "completion": " Oslo."}) + "\n" for n in "ABCD")
    )
    with opened(DATA / "finetuned", canary=str(tmp_path / "words.jsonl")) as it:
        chosen, skipped = _choose(it, VerifyOptions(Inputs(), attacks=True), [])
        assert "attributes" not in chosen and "prompts" in chosen and skipped["attributes"].why is Why.LACKING
        with pytest.raises(UsageError, match="--attributes needs canaries with a number"):
            _choose(it, VerifyOptions(Inputs(), named=("attributes",)), [])
