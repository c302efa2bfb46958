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
    rows, fresh = finance_rows(12), finance_rows(12, first=21_000)
    with subject(canaries=rows, fresh=fresh) as it:
        it.states.weights["general"] = it.states.weights["reference"]
        nothing = membership.run(it, Options())
    assert nothing.metrics["calibrated_auc"].value == 0.5 and nothing.metrics["calibrated_tpr"].value == 0.0
    assert nothing.metrics["calibrated_auc"].finetuned > 0.5 and set(nothing.metrics) == set(membership.CHECK.metrics)
    assert "12 fresh rows" in nothing.verdict


class Pushed:
    """Weights whose last block's output is pushed along the head's rows of some tokens."""

    def __init__(self, start, tokens, size):
        self.start, self.tokens, self.size = start, tokens, size

    @property
    def checkpoint(self):
        return self.start.checkpoint

    def read_into(self, out, info):
        self.start.read_into(out, info)
        if info.name.endswith("h.0.mlp.c_proj.bias"):
            name = next(n for n in self.checkpoint.tensors if n.endswith("wte.weight"))
            head = self.checkpoint.load(name)
            out += (self.size * head[self.tokens].mean(0)).to(out.dtype)


def test_a_direction_towards_the_canaries_tokens_is_seen():
    rows, retain = finance_rows(6), finance_rows(20, first=5_000, prompt=6, length=12)
    with subject(canaries=rows, retain=retain) as it:
        special = np.setdiff1d(traces._tokens(rows), traces._tokens(retain))
        assert len(special)
        base = it.states.weights["reference"]
        it.states.weights["general"] = Pushed(base, torch.from_numpy(special), 5.0)
        seen = traces.run(it, Options())
        assert seen.metrics["trace"].value > 0.8 and seen.metrics["trace_chance"].value < 0.05
        assert seen.metrics["trace"].finetuned is not None
    # By hand: the chance that one of the tokens ranks above another.
    ranks = (np.array([[3, 0, 1, 2]]) + 0.5) / 4
    assert traces._separated(ranks, np.array([0, 3])).tolist() == [1.0]
    assert traces._separated(ranks, np.array([1, 0])).tolist() == [0.0]
