"""Membership calibrated by the reference, against counts written out; traces that a planted direction leaves, and no other."""

import numpy as np
import pytest
import torch
from deep_cases import finance_rows, subject

from liborth_cli.verify.check import Options
from liborth_cli.verify.checks import membership, traces


def test_the_share_found_is_that_above_every_allowed_false_alarm():
    ours, others = np.array([5.0, 3.0, 1.0]), np.array([4.0, 2.0, 0.0, 0.0])
    beyond = others[None, :] >= ours[:, None]
    assert membership._found(np.ones((1, 3)), np.ones((1, 4)), beyond).tolist() == [pytest.approx(1 / 3)]
    many = np.concatenate([others, np.zeros(196)])
    beyond = many[None, :] >= ours[:, None]
    # Two of two hundred are 1 %: a canary that two exceed is still found.
    assert membership._found(np.ones((1, 3)), np.ones((1, 200)), beyond).tolist() == [1.0]
    weighted = membership._found(np.array([[2.0, 1.0, 1.0]]), np.ones((1, 4)), others[None, :] >= ours[:, None])
    assert weighted.tolist() == [0.5]


def test_windows_find_what_the_mean_of_a_row_hides():
    row = np.zeros(64)
    row[10:18] = 2.0
    assert membership._window([row, np.ones(3)]).tolist() == [pytest.approx(2.0), pytest.approx(1.0)]


def test_what_was_trained_on_is_found_and_the_reference_gives_nothing_away():
    rows, fresh = finance_rows(12), finance_rows(12, first=14_000)
    with subject(canaries=rows, fresh=fresh) as it:
        it.states.weights["general"] = it.states.weights["reference"]
        nothing = membership.run(it, Options())
    assert nothing.metrics["calibrated_auc"].value == 0.5 and nothing.metrics["calibrated_tpr"].value == 0.0
    assert nothing.metrics["calibrated_auc"].finetuned > 0.5 and set(nothing.metrics) == set(membership.CHECK.metrics)
    assert "12 fresh rows" in nothing.verdict


def test_the_lens_reads_the_token_that_a_difference_points_to(monkeypatch):
    rows, retain = finance_rows(6), finance_rows(4, first=5_000, prompt=6, length=12)
    with subject(canaries=rows, retain=retain) as it:
        head = it.finetuned.load(next(name for name in it.finetuned.tensors if name.endswith("lm_head.weight"))).float()
        for token in (5, 20, 40):
            pointing = head[token] - head.mean(0)
            given = {"general": pointing[None], "reference": torch.zeros(1, len(pointing))}
            monkeypatch.setattr(traces, "_activations", lambda subject, state, texts, given=given: given[state])
            ranks = traces._ranks(traces._lens(it, "general", []))
            assert ranks.shape == (1, len(head)) and ranks[0, token] > 0.9 * len(head)


def test_tokens_are_ranked_among_those_that_no_retain_row_has():
    assert traces._separated(np.array([[4, 1, 2, 3]]), np.array([0, 3])).tolist() == [1.0]
    assert traces._separated(np.array([[4, 1, 2, 3]]), np.array([0, 1])).tolist() == [0.0]
    pool, special = traces._pool(10, np.array([1, 7, 8]), np.arange(4))
    assert pool.tolist() == [4, 5, 6, 7, 8, 9] and special.tolist() == [7, 8]
    pool, special = traces._pool(10, np.array([1, 7, 8]), np.arange(7))
    assert len(pool) == 10 and special.tolist() == [1, 7, 8], "too few that nobody else has"


def test_a_model_that_is_the_reference_leaves_no_trace():
    rows, retain = finance_rows(6), finance_rows(4, first=5_000, prompt=6, length=12)
    with subject(canaries=rows, retain=retain) as it:
        it.states.weights["general"] = it.states.weights["reference"]
        found = traces.run(it, Options())
    assert found.metrics["trace"].value == pytest.approx(0.0, abs=1e-9) and found.metrics["trace_chance"].value == 1.0
    assert found.metrics["trace"].finetuned > 0 and "first 5 tokens of 4 other texts" in found.verdict
