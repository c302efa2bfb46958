"""Wide factors in short: the error is what is said, the algebra leaks nothing, and whole rank is exact."""

from dataclasses import asdict, replace

import pytest
import torch
from test_contract import factors, layer_of, rotated_factors, rotation, update

from liborth_cli.curvature.layer import KroneckerFactors
from liborth_cli.errors import BadInput
from liborth_cli.methods import Amount, joint
from liborth_cli.methods.kronecker import DEFAULT_RANK, DENSE_UP_TO, low_rank, rank_for
from liborth_cli.split import SplitOptions, split_matrix
from liborth_cli.split.matrix import predicted


def spiked(size, count, seed, floor=0.01):
    """A few strong directions over a flat floor."""
    q, draw = rotation(size, seed), torch.Generator().manual_seed(seed)
    values = torch.full((size,), floor, dtype=torch.float64)
    values[:count] = torch.rand(count, generator=draw, dtype=torch.float64) + 0.5
    return (q * values) @ q.T


def falling(size, seed, power=1.5):
    q = rotation(size, seed)
    return (q * torch.arange(1, size + 1, dtype=torch.float64).pow(-power)) @ q.T


@pytest.mark.parametrize("rank", [4, 16])
def test_the_error_is_the_error(rank):
    m = falling(96, 1)
    found = low_rank(lambda x: m @ x, 96, rank, m.device)
    y = found.vectors.double()
    short = (y * found.values) @ y.T + found.rest * (torch.eye(96) - y @ y.T)
    assert found.error == pytest.approx(((m - short).norm() / m.norm()).item(), rel=0.3), "measured on random vectors"
    assert found.rest == pytest.approx((m.trace() - found.values.sum()).item() / (96 - rank), rel=0.3)
    best = torch.linalg.eigvalsh(m).flip(0)[:rank]
    assert torch.allclose(found.values, best, rtol=1e-3)


def spiked_factors(shape, seed, floor):
    a, g = spiked(shape[1], 5, seed, floor), spiked(shape[0], 5, seed + 1, floor)
    return KroneckerFactors("w", "w", None, False, 1.0, ("w",), a, g)


def kept(u, retain, forget, hard=False, **settings):
    options = SplitOptions("contrastive", Amount("strength", 0.5, hard), settings=settings)
    return split_matrix(layer_of(u, retain=retain, forget=forget), options)


@pytest.fixture
def whole(monkeypatch):
    """Call this, and covariances of few tokens are not looked for."""
    return lambda: monkeypatch.setattr(joint, "spanning_factor", lambda f: None)


def few_tokens(shape, count, seed, dtype=torch.float64):
    """Factors of so few samples that they leave most directions alone."""
    draw = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(count, n, generator=draw, dtype=torch.float64) for n in (shape[1], shape[0]))
    return KroneckerFactors("w", "w", None, False, 1.0, ("w",), *((x.T @ x / count).to(dtype) for x in (a, g)))


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("shape", [(60, 80), (60, 20), (20, 80)])
def test_forget_data_of_few_tokens_lose_nothing(shape, dtype, apart, whole):
    """A forget covariance of a few tokens has no more directions than that; a side too narrow for them is solved whole.

    In float32 the dense solution takes rounding for directions, and divides it by small retain curvature.
    """
    u, r, f = update(shape).double(), factors(shape, 1), few_tokens(shape, 7, 3, dtype)
    short, report = kept(u, r, f)
    assert "factor_error" not in report.facts, "exact, and nothing to warn about"
    whole()
    dense, other = kept(u, r, f)
    assert (short - dense).norm() < apart * (u - dense).norm()
    assert (report.skill, report.memory) == pytest.approx((other.skill, other.memory), rel=apart)
    assert 0.01 < ((u - short).norm() / u.norm()).item() < 1


def test_several_sets_of_few_tokens(whole):
    shape = (60, 80)
    u, r, sets = update(shape).double(), factors(shape, 1), (few_tokens(shape, 5, 3), few_tokens(shape, 4, 4))

    def both():
        layer = layer_of(u, retain=r)
        layer.forget = sets
        return split_matrix(layer, SplitOptions("contrastive", Amount("strength", 0.5)))[0]

    short = both()
    whole()
    dense = both()
    assert (short - dense).norm() < 1e-9 * (u - dense).norm()


@pytest.mark.parametrize("sets", [1, 2])
def test_a_table_gives_up_the_tokens_that_were_forgotten(whole, sets):
    """An embedding's A is a diagonal of frequencies: rows of tokens that the forget data do not have stay as they are."""
    shape, counts = (20, 80), torch.zeros(2, 80, dtype=torch.float64)
    counts[0, [2, 3, 50]], counts[1, [3, 70]] = torch.tensor([3.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0]).double()
    r, f = factors(shape, 1), [few_tokens(shape, 4, seed) for seed in (3, 4)][:sets]
    layer = layer_of(update(shape).double(), retain=replace(r, input_covariance=torch.linspace(0.1, 2, 80).double()))
    layer.forget = tuple(replace(one, input_covariance=count) for one, count in zip(f, counts, strict=False))

    def skill():
        options = SplitOptions("contrastive", Amount("strength", 0.5))
        return split_matrix(replace(layer, update=layer.update.clone()), options)[0]

    short = skill()
    touched = (short - layer.update).abs().sum(0).nonzero()[:, 0].tolist()
    assert touched == ([2, 3, 50] if sets == 1 else [2, 3, 50, 70])
    whole()
    dense = skill()
    assert (short - dense).norm() < 1e-9 * (layer.update - dense).norm()


def test_forget_data_that_feel_nothing_take_nothing():
    """An expert that no forget token reached, or a layer without a loss behind it."""
    shape = (60, 80)
    u, r = update(shape).double(), factors(shape, 1)
    nothing = KroneckerFactors("w", "w", None, False, 1.0, ("w",), torch.zeros(80, 80), torch.zeros(60, 60))
    skill, report = kept(u, r, nothing)
    assert torch.equal(skill, u)
    assert report.leading is not None
    assert predicted(1.0, report.leading.on_orthonormal(torch.float64), r, (nothing,)).forget_gain == [0.0]


def test_what_is_predicted_of_two_thin_factors():
    shape = (60, 80)
    u, r, f = update(shape).double(), factors(shape, 1), few_tokens(shape, 7, 3)
    skill, report = kept(u, r, f)
    assert report.leading is not None
    assert torch.allclose(report.leading.whole(torch.float64), u - skill)
    thin, dense = (asdict(predicted(1.0, d, r, (f,))) for d in (report.leading.on_orthonormal(torch.float32), u - skill))
    assert thin["forget_gain"] == pytest.approx(dense["forget_gain"], rel=1e-4)
    for name in ("retain_cost", "memory_dimension"):
        assert thin[name] == pytest.approx(dense[name], rel=1e-4)


def test_wide_factors_of_few_directions_in_short(whole):
    shape = (60, 80)
    u, r, f = update(shape).double(), factors(shape, 1), spiked_factors(shape, 11, 0.0)
    whole()
    short, report = kept(u, r, f, factor_rank=6)
    assert report.facts["factor_error"] < 1e-6
    assert torch.allclose(short, kept(u, r, f)[0], atol=1e-6)
    with pytest.raises(BadInput, match="hard cut needs whole factors"):
        kept(u, r, f, True, factor_rank=6)


def test_the_short_form_commutes_with_rotations():
    shape = (40, 64)
    u, r, f = update(shape).double(), factors(shape, 1), spiked_factors(shape, 31, 0.0)
    left, right = rotation(40, 7), rotation(64, 8)
    f = replace(f, input_moment=f.input_covariance, gradient_moment=f.gradient_covariance)
    turned = [rotated_factors(x, left, right) for x in (r, f)]
    plain = left @ kept(u, r, f, factor_rank=8)[0] @ right.T
    gap = (kept(left @ u @ right.T, *turned, factor_rank=8)[0] - plain).norm() / plain.norm()
    assert gap < 1e-6


def test_more_directions_come_closer():
    shape = (96, 96)
    u = update(shape).double()
    r, f = (KroneckerFactors("w", "w", None, False, 1.0, ("w",), falling(96, s), falling(96, s + 1)) for s in (1, 11))
    whole = kept(u, r, f)[0]
    gaps = [((kept(u, r, f, factor_rank=k)[0] - whole).norm() / (u - whole).norm()).item() for k in (4, 12, 23)]
    assert gaps[0] > gaps[1] > gaps[2]


def test_only_wide_matrices_are_shortened():
    assert rank_for(torch.empty(DENSE_UP_TO + 1, DENSE_UP_TO + 1, device="meta"), None) == DEFAULT_RANK
    assert rank_for(torch.empty(DENSE_UP_TO, DENSE_UP_TO, device="meta"), None) is None
    assert rank_for(torch.empty(64, 64), 16) is None
    assert rank_for(torch.empty(65, 65), 16) == 16
    assert rank_for(torch.empty(9000), None) is None, "a diagonal is never wide"
    assert rank_for(torch.empty(4, 9000, 9000, device="meta"), None) is None
