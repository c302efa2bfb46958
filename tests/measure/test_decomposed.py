"""Matrices decomposed once and divided at any amount: what `split_matrix` gives, up to rounding."""

import pytest
import torch

from liborth_cli.linalg.truncated import energy
from liborth_cli.measure import decomposed
from liborth_cli.measure.decomposed import Decomposed
from liborth_cli.methods import Amount, Layer
from liborth_cli.split import SplitOptions, split_matrix


def layer(shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    u = torch.randn(shape, generator=draw) @ torch.diag(torch.linspace(1, 0.05, shape[1]))
    return Layer(f"w{seed}", u, energy(u), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_it_divides_as_a_split_does_and_decomposes_once(shape, monkeypatch):
    found, calls = Decomposed(1 << 20), []
    whole = decomposed.leading_subspace
    monkeypatch.setattr(decomposed, "leading_subspace", lambda *words: calls.append(1) or whole(*words))
    for amount in (Amount("energy", 0.5), Amount("energy", 0.9), Amount("energy", 1.0), Amount("rank", 3)):
        options = SplitOptions("svd", amount)
        (one, report), (other, expected) = found(layer(shape), options), split_matrix(layer(shape), options)
        assert torch.allclose(one, other, atol=1e-4)
        assert report.memory == pytest.approx(expected.memory, abs=1e-5)
    assert len(calls) == 1


def test_without_room_nothing_is_kept():
    found, options = Decomposed(100), SplitOptions("svd", Amount("energy", 0.5))
    assert torch.equal(found(layer((20, 30)), options)[0], split_matrix(layer((20, 30)), options)[0])
    assert not found._kept
