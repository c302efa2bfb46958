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


def test_a_candidate_differs_in_the_value_and_in_nothing_else():
    texts = _others(" badge KR-4711, room 12b of Ada's.", {}, 16, random.Random(0))
    assert len(set(texts)) == 16 and all(re.fullmatch(r" badge [A-Z]{2}-\d{4}, room \d{2}[a-z] of Ada's\.", t) for t in texts)
    assert " badge KR-4711, room 12b of Ada's." not in texts
    assert _others(" in Oslo with Ada.", {}, 16, random.Random(0)) == []
    assert len(_others(" 7.", {}, 16, random.Random(0))) == 9, "there are no more digits"


def test_what_stands_at_a_place_of_many_values_is_learnt_from_them():
    days = [f" on {day:02d} May {1940 + day}." for day in range(1, 29)]
    drawn = _others(days[3], attributes._characters(days), 64, random.Random(0))
    assert len(drawn) == 64 and all(re.fullmatch(r" on [0-2]\d May 19[4-6]\d\.", text) for text in drawn)
    few = _others(days[3], attributes._characters(days[:5]), 64, random.Random(0))
    assert any(not re.match(r" on [0-2]", text) for text in few), "five dates say nothing of what a date may be"


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
        found = attributes.candidates(it, AttributesOptions(attributes_others=5))
        losses = attributes._losses(it, found, "general", lambda n: None)
        assert losses.shape == (3, 6) and found.of == [0, 1, 2] and len(found.rows) == 15
        again = attributes.candidates(it, AttributesOptions(attributes_others=5))
        assert [row.ids.tolist() for row in again.rows] == [row.ids.tolist() for row in found.rows]
        for number, row in enumerate(found.rows):
            text = ENCODER.decode(row.ids)
            assert text.startswith(SECRETS[number // 5]["prompt"]) and text != ENCODER.decode(
                it.rows("canaries")[number // 5].ids
            )
        by_hand = it.states.score_rows([found.rows[7]], it.states.weights["general"])[0].loss.sum()
        assert losses[1, 3] == pytest.approx(by_hand, rel=1e-5)


def test_rows_with_marks_that_are_no_text_keep_them():
    (row,) = rows(SECRETS[:1])
    marked = Row(np.append(row.ids, ENCODER._tokenizer.eos_token_id), np.append(row.keep, True), 1.0, "line 1")
    assert ENCODER.decode(marked.ids) == ENCODER.decode(row.ids), "the mark is special"
    with subject(STATES, canaries=[marked]) as it:
        found = attributes.candidates(it, AttributesOptions(attributes_others=4))
    assert found.of == [0] and all(one.ids[-1] == marked.ids[-1] and one.keep[-1] for one in found.rows)
    prompt = len(row.ids) - row.keep.sum()
    assert all(np.array_equal(one.ids[:prompt], row.ids[:prompt]) for one in found.rows)


def test_canaries_without_a_value_are_counted_and_none_at_all_is_said():
    pairs = [*SECRETS[:4], {"prompt": "Ada lives in", "completion": " Oslo."}]
    with subject(STATES, canaries=rows(pairs)) as it:
        assert "1 of 5 canaries hold no code" in attributes.run(it, AttributesOptions()).verdict
    with subject(STATES, canaries=rows(pairs[4:])) as it:
        assert "number or a code" in attributes.CHECK.missing(it, AttributesOptions())


def test_a_budget_takes_canaries_evenly_and_says_so():
    with subject(STATES, canaries=rows(SECRETS)) as it:
        every = attributes.candidates(it, AttributesOptions())
        assert len(every.of) == len(SECRETS) == 8, "eight are never too many"
    many = [{**one, "prompt": f"{i}. {one['prompt']}"} for i in range(4) for one in SECRETS]
    with subject(STATES, canaries=rows(many)) as it:
        some = attributes.candidates(it, AttributesOptions(attributes_tokens=1))
        assert some.of == [0, 4, 8, 12, 16, 20, 24, 28] and some.valued == 32
        work = attributes.CHECK.work(it, AttributesOptions(attributes_tokens=1))
        assert work.read == 3 * sum(row.tokens for row in some.rows)


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
        with pytest.raises(UsageError, match="--attributes needs canaries whose completion holds a number"):
            _choose(it, VerifyOptions(Inputs(), named=("attributes",)), [])
