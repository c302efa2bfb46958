"""Filters on remembered decompositions give what a split from scratch gives, and decompose once."""

from dataclasses import replace

import pytest
import torch

from liborth_cli.curvature.layer import DiagonalFisher, SampledFactors, TokenGradients
from liborth_cli.dose.remember import Recorded, Remembered
from liborth_cli.linalg.rows import Samples
from liborth_cli.linalg.truncated import energy
from liborth_cli.methods import METHODS, Amount, Layer
from liborth_cli.split.matrix import SplitOptions, split_matrix

CASES = {
    "svd": [Amount("rank", 6), Amount("rank", 2), Amount("rank", 6)],
    "scale": [Amount("scale", 0.7), Amount("scale", 0.2)],
    "magnitude": [Amount("energy", 0.9), Amount("energy", 0.3)],
    "kfac": [Amount("mass", 0.9), Amount("mass", 0.5), Amount("mass", 0.9)],
    "contrastive": [Amount("strength", 0.1), Amount("strength", 10.0), Amount("strength", 0.1)],
}


class Pair:
    """Two layers with factors, made afresh whenever they are asked for."""

    def __init__(self):
        from liborth_cli.curvature.layer import KroneckerFactors

        generator = torch.Generator().manual_seed(0)

        def covariance(size):
            samples = torch.randn(4 * size, size, generator=generator) * torch.rand(size, generator=generator)
            return samples.T @ samples / len(samples)

        def factors(rows, cols):
            return KroneckerFactors("l", "l", None, False, 1.0, ("l",), covariance(cols), covariance(rows))

        self.parts = [
            (f"layer{i}", torch.randn(shape, generator=generator), factors(*shape), factors(*shape))
            for i, shape in enumerate([(12, 20), (24, 16)])
        ]

    def layers(self, several=False):
        for i, (name, update, retain, forget) in enumerate(self.parts):
            layer = Layer(name, update.clone(), energy(update), torch.Generator().manual_seed(i), retain=retain)
            layer.forget = (forget,)
            yield layer


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("side", ["tail", "top"])
@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_it_divides_like_the_split_itself(method, side, budget, monkeypatch):
    remembered, pair = Remembered(budget, rank=6), Pair()
    for amount in CASES[method]:
        options, recorded = SplitOptions(method, amount, side), Recorded(remembered)
        for layer, fresh in zip(pair.layers(), pair.layers(), strict=True):
            skill, report = recorded(layer, options)
            expected, wanted = split_matrix(fresh, options)
            torch.testing.assert_close(skill, expected, rtol=1e-4, atol=1e-4)
            assert report.memory == pytest.approx(wanted.memory, abs=1e-4)
        shares = list(recorded.shares.values())
        assert recorded.removed == pytest.approx(sum(e * m for e, m in shares) / sum(e for e, _ in shares))


def tokens_of(shape, count, seed):
    draw = torch.Generator().manual_seed(seed)
    return (TokenGradients(torch.randn(count, shape[1], generator=draw), torch.randn(count, shape[0], generator=draw), count),)


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("method", ["kfac", "contrastive", "tokenwise", "diagonal", "impact"])
def test_what_is_kept_needs_no_factors_gives_the_same_bits_and_no_more_bytes_than_was_said(method, count):
    amounts = {"kfac": "mass", "diagonal": "mass", "impact": "density"}
    options = SplitOptions(method, Amount(amounts.get(method, "strength"), 0.3))
    remembered, said, every = Remembered(0), 0, []
    for i, layer in enumerate(Pair().layers()):
        shape = tuple(layer.update.shape)
        layer.tokens = tokens_of(shape, count, i)
        one = layer.tokens[0]
        layer.forget = (SampledFactors(Samples(one.inputs), Samples(one.gradients), count),) if count == 3 else layer.forget
        layer.diagonal = DiagonalFisher("l", 1.0, torch.rand(shape))
        expected, _ = split_matrix(replace(layer, update=layer.update.clone()), options)
        remembered.learn(layer, options)
        said += METHODS[method].dose_bytes(shape, shape, count)
        every.append((layer.name, layer.update, layer.generator, layer.energy, expected))
    assert 0 < remembered.nbytes <= 1.2 * said + 64 * count
    for name, update, generator, total, expected in every:
        skill, _ = remembered(Layer(name, update, total, generator), options)
        assert torch.equal(skill, expected)


def test_decompositions_are_made_once_and_again_only_without_room(monkeypatch):
    calls = []
    real = METHODS["contrastive"].basis
    monkeypatch.setattr(
        type(METHODS["contrastive"]), "basis", lambda self, layer, amount: calls.append(1) or real(layer, amount)
    )
    for budget, expected in ((1 << 30, 2), (0, 6)):
        calls.clear()
        remembered = Remembered(budget)
        for amount in CASES["contrastive"]:
            for layer in Pair().layers():
                remembered(layer, SplitOptions("contrastive", amount))
        assert len(calls) == expected
