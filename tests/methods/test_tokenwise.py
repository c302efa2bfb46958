"""The token by token split: what it minimises, where it meets `contrastive`, and how sets are weighed."""

import dataclasses

import pytest
import torch
from test_contract import covariance, factors, layer_of, split, tokens, update

from liborth_cli.curvature.layer import KroneckerFactors, TokenGradients
from liborth_cli.errors import BadInput
from liborth_cli.methods import METHODS, Amount
from liborth_cli.split import SplitOptions, split_matrix
from liborth_cli.split.matrix import predicted

SHAPE = (5, 7)


def damped(m, damping=1e-2):
    m = m.double() * (len(m) / m.trace())
    return m + damping * torch.eye(len(m), dtype=m.dtype)


def fisher(felt, metric):
    """The forget Fisher of vec(W), dense, scaled so that its generalised eigenvalues sum to the number of weights."""
    rows = torch.einsum("to,ti->toi", felt.gradients.double(), felt.inputs.double()).flatten(1)
    dense = rows.T @ rows
    return dense * (len(metric) / torch.linalg.solve(metric, dense).trace())


def metric_of(retain):
    return torch.kron(damped(retain.gradient_covariance), damped(retain.input_covariance))


@pytest.mark.parametrize("strength", [0.03, 1.0, 50.0])
def test_it_is_the_dense_minimiser(strength):
    """X solves (R + λF) vec X = R vec U, with every matrix written out."""
    u, retain, felt = update(SHAPE).double(), factors(SHAPE, 10), tokens(SHAPE, 3, count=9)
    kept, report = split(u, "tokenwise", "strength", "top", value=strength, retain=retain, felt=(felt,))
    r = metric_of(retain)
    wanted = torch.linalg.solve(r + strength * fisher(felt, r), r @ u.flatten()).reshape(SHAPE)
    assert torch.allclose(kept, wanted, atol=1e-9)
    assert report.facts == {"tokens": 9}
    assert (kept - u).norm() > 1e-3 * u.norm()


def test_more_tokens_than_weights():
    u, retain, felt = update((3, 4)).double(), factors((3, 4), 10), tokens((3, 4), 3, count=40)
    kept, _ = split(u, "tokenwise", "strength", "top", value=2.0, retain=retain, felt=(felt,))
    r = metric_of(retain)
    assert torch.allclose(kept, torch.linalg.solve(r + 2 * fisher(felt, r), r @ u.flatten()).reshape(3, 4), atol=1e-8)


def test_the_ends_of_its_strength():
    """λ = 0 keeps everything; λ → ∞ leaves nothing that a forget token feels, and what none feels is untouched."""
    u, felt = update(SHAPE).double(), tokens(SHAPE, 3, count=4)
    assert torch.equal(split(u, "tokenwise", "strength", "top", value=0.0, felt=(felt,))[0], u)
    kept, _ = split(u, "tokenwise", "strength", "top", value=1e14, felt=(felt,))
    said = torch.einsum("to,oi,ti->t", felt.gradients.double(), kept, felt.inputs.double())
    before = torch.einsum("to,oi,ti->t", felt.gradients.double(), u, felt.inputs.double())
    assert said.abs().max() < 1e-6 * before.abs().max()
    assert kept.norm() > 0.3 * u.norm()


def test_one_token_is_a_kronecker_product():
    """With a single token nothing is lost by averaging, and `contrastive` says the same at the same ratio."""
    u, retain, felt = update(SHAPE).double(), factors(SHAPE, 10), tokens(SHAPE, 3, count=1)
    a, g = felt.inputs.double(), felt.gradients.double()
    forget = KroneckerFactors("w", "w", None, False, 1.0, ("w",), a.T @ a, g.T @ g)
    layer = layer_of(u, retain=retain, forget=forget, felt=(felt,))
    ratios = [METHODS[name].basis(layer, Amount("strength", 1.0)).ratios.max().item() for name in ("contrastive", "tokenwise")]
    one, _ = split(u, "contrastive", "strength", "top", value=1 / ratios[0], retain=retain, forget=forget)
    two, _ = split(u, "tokenwise", "strength", "top", value=1 / ratios[1], retain=retain, felt=(felt,))
    assert torch.allclose(one, two, atol=1e-9)


def test_sets_weigh_what_they_count_whatever_their_scale():
    """One text measured twice with half the weight each is the text; a louder set counts no more than a quiet one."""
    u, felt, other = update(SHAPE).double(), tokens(SHAPE, 3), tokens(SHAPE, 4)
    once = split(u, "tokenwise", "strength", "top", felt=(felt,))[0]
    assert torch.allclose(split(u, "tokenwise", "strength", "top", felt=(felt, felt), shares=(0.5, 0.5))[0], once, atol=1e-9)
    louder = TokenGradients(other.inputs, other.gradients * 100)
    both, loud = (split(u, "tokenwise", "strength", "top", felt=(felt, o))[0] for o in (other, louder))
    assert torch.allclose(both, loud, atol=1e-6)
    assert not torch.allclose(both, once, atol=1e-2)


def test_blocked_and_diagonal_retain_factors():
    u, felt = update((6, 8)).double(), tokens((6, 8), 3)
    a, g = covariance(8, 1), covariance(6, 2)
    for x, y, dense_x, dense_y in (
        (a.diagonal().clone(), g, torch.diag(a.diagonal()), g),
        (a, torch.stack([g[:3, :3], g[3:, 3:]]), a, torch.block_diag(g[:3, :3], g[3:, 3:])),
    ):
        sets = [KroneckerFactors("w", "w", None, False, 1.0, ("w",), i, o) for i, o in ((x, y), (dense_x, dense_y))]
        pair = [split(u, "tokenwise", "strength", "top", retain=one, felt=(felt,))[0] for one in sets]
        assert torch.allclose(*pair, atol=1e-9)


def test_tokens_that_feel_nothing_take_nothing_and_singular_factors_are_refused():
    u, felt = update(SHAPE), tokens(SHAPE, 3)
    silent = TokenGradients(felt.inputs, torch.zeros_like(felt.gradients))
    kept, _ = split(u, "tokenwise", "strength", "top", felt=(silent,))
    assert torch.equal(kept, u)
    nothing = KroneckerFactors("w", "w", None, False, 1.0, ("w",), torch.zeros(7, 7), torch.zeros(5, 5))
    with pytest.raises(BadInput, match="not positive"):
        split(u, "tokenwise", "strength", "top", retain=nothing, felt=(felt,))


@pytest.mark.parametrize("shape", [(40, 60), (6, 7)])
def test_what_is_predicted_of_it_is_what_its_tokens_feel(shape):
    """½ Σ w (gᵀDa)² / Σ w, for the removed part whole or in two thin factors."""
    u, felt = update(shape).double(), dataclasses.replace(tokens(shape, 30, 9), weight=4.5)
    retain = factors(shape, 10)
    layer = layer_of(u, retain=retain, felt=(felt,))
    skill, report = split_matrix(layer, SplitOptions("tokenwise", Amount("strength", 0.5)))
    removed = u - skill
    expected = sum(float(g.double() @ removed @ a.double()) ** 2 for a, g in zip(felt.inputs, felt.gradients, strict=True))
    found = [dataclasses.asdict(predicted(1.0, removed, retain, (felt,)))]
    if report.leading is not None:
        found.append(dataclasses.asdict(predicted(1.0, report.leading.on_orthonormal(torch.float64), retain, (felt,))))
    assert len(found) == 1 + (shape == (40, 60)), "few tokens give two thin factors"
    for one in found:
        assert one["forget_gain"] == pytest.approx([expected / 2 / 4.5], rel=1e-6)


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_many_tokens_are_solved_by_products_to_a_proven_gap(strength, monkeypatch):
    """Without an eigenproblem of the tokens the objective is within the stated gap of its minimum, and the parts are close."""
    u, retain, felt = update((12, 15)).double(), factors((12, 15), 10), tokens((12, 15), 3, count=90)
    exact, _ = split(u, "tokenwise", "strength", "top", value=strength, retain=retain, felt=(felt,))
    monkeypatch.setattr("liborth_cli.linalg.regularised.EXACT_UP_TO", 20)
    kept, report = split(u, "tokenwise", "strength", "top", value=strength, retain=retain, felt=(felt,))
    r = metric_of(retain)
    f = fisher(felt, r)

    def objective(x):
        d = (x.double() - u).flatten()
        return float(d @ r @ d + strength * x.double().flatten() @ f @ x.double().flatten())

    assert 0 <= objective(kept) / objective(exact) - 1 <= report.facts["gap"] + 1e-5
    assert report.facts["gap"] <= 5e-3
    assert report.facts["steps"] < 90
    assert (kept - exact).norm() < 0.05 * (u - exact).norm()
