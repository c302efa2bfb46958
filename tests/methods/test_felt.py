"""What a basis says is felt of its cut is what the removed matrix itself says."""

import pytest
import torch
from test_contract import factors, layer_of, split, tokens, update

from liborth_cli.curvature.layer import SampledFactors
from liborth_cli.linalg.rows import Samples
from liborth_cli.methods import METHODS, Amount
from liborth_cli.split.matrix import predicted

SHAPE = (22, 31)


def sampled(shape, seed, count=5):
    one = tokens(shape, seed, count)
    return SampledFactors(Samples(one.inputs / count**0.5), Samples(one.gradients / count**0.5))


@pytest.mark.parametrize("strength", [0.01, 10.0])
@pytest.mark.parametrize("method", ["contrastive", "tokenwise"])
def test_what_is_felt_is_what_the_removed_part_says(method, strength):
    u, retain = update(SHAPE).double(), factors(SHAPE, 10)
    felt = (tokens(SHAPE, 3, 4), tokens(SHAPE, 5, 5)) if method == "tokenwise" else None
    forget = sampled(SHAPE, 4)
    kept, report = split(u, method, "strength", "top", value=strength, retain=retain, felt=felt, forget=forget)
    wanted = predicted(1.0, u - kept, retain, felt or (forget,))
    assert report.felt is not None
    assert report.felt.dimension == pytest.approx(wanted.memory_dimension, rel=1e-6)
    assert report.felt.retain_cost == pytest.approx(wanted.retain_cost, rel=1e-6)
    assert report.felt.forget_gain == pytest.approx(wanted.forget_gain, rel=1e-6)


def test_samples_give_the_cut_of_their_covariance():
    u, few = update(SHAPE).double(), sampled(SHAPE, 4)
    dense = factors(SHAPE, 0)
    for side in ("input_covariance", "gradient_covariance"):
        object.__setattr__(dense, side, getattr(few, side).dense(torch.float64))
    kept = [split(u, "contrastive", "strength", "top", value=1.0, forget=one)[0] for one in (few, dense)]
    assert torch.allclose(*kept, atol=1e-9)


def test_many_tokens_say_nothing_of_their_own():
    layer = layer_of(update(SHAPE).double(), felt=(tokens(SHAPE, 3, count=20),))
    basis = METHODS["tokenwise"].basis(layer, Amount("strength", 0.1))
    assert basis.felt(1.0) is None
