"""Blocks whose graphs stay between the way forward and the way back: nothing of them is computed twice, and no bit differs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from curvature_cases import make_model, make_tokens
from run_curvature import estimate
from test_curvature_invariance import tensors

from liborth_cli.curvature import planned
from liborth_cli.curvature.state import Keeper
from liborth_cli.stream.runner import Runner

DEPTH = 3


@pytest.fixture
def remember(monkeypatch):
    """Have the last blocks of a walk keep their graphs; returns how often each block was run."""
    runs, make, run = Counter(), planned.agreed, Runner.block

    def block(self, index, *args):
        runs[index] += 1
        return run(self, index, *args)

    def last(count):
        monkeypatch.setattr(planned, "agreed", lambda *args: replace(make(*args), resident=True, blockwise=True, graphs=count))
        runs.clear()
        return runs

    monkeypatch.setattr(Runner, "block", block)
    return last


@pytest.mark.parametrize("options", [{}, {"per_token": True}, {"moments": "exact"}, {"moments": "marginal", "diagonal": True}])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_no_bit_differs_and_less_is_computed(family, options, tmp_path, remember):
    model, data = make_model(family, tmp_path / "model"), make_tokens(tmp_path)
    runs = remember(0)
    with estimate(model, data, tmp_path / "twice", **options) as twice:
        before, seen = tensors(twice), dict(runs)
        tokens = {name: layer.tokens for name, layer in twice.layers.items()}
    for count in (1, DEPTH, DEPTH + 5):
        runs = remember(count)
        with estimate(model, data, tmp_path / f"once{count}", **options) as once:
            after = tensors(once)
            assert {name: layer.tokens for name, layer in once.layers.items()} == tokens
        assert before.keys() == after.keys()
        assert all(before[key].equal(after[key]) for key in before)
        assert runs[DEPTH - 1] < seen[DEPTH - 1]
        assert (runs[0] < seen[0]) == (count >= DEPTH)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_run_can_go_on_from_no_place_that_has_a_graph(count, tmp_path, remember, monkeypatch):
    """What is kept of a walk that is stopped has no graphs, and no inputs that were learnt ahead of their gradients."""
    told = []
    monkeypatch.setattr(Keeper, "is_due", lambda self: True)
    monkeypatch.setattr(Keeper, "keep_slots", lambda self, place, *_: told.append((place.level, place.back)))
    remember(count)
    with estimate(make_model("llama", tmp_path / "model"), make_tokens(tmp_path), tmp_path / "out"):
        first = DEPTH - count
        back = [(level, True) for level in reversed(range(DEPTH + 1))]
        assert told == [(level, False) for level in range(1, first + 1)] + [place for place in back if place[0] <= first]
