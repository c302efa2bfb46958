"""A float32 factorisation is used where it is shown to be enough, and what it costs is what was said."""

import pytest
import torch

from liborth_cli.errors import BadInput
from liborth_cli.linalg.rows import Samples, spanning_factor
from liborth_cli.methods import whitening
from liborth_cli.methods.whitening import Whitening, distance, mean_scale, unit


def covariance(size, floor, seed=0):
    q = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    values = torch.logspace(0, floor, size, dtype=torch.float64)
    return ((q * values) @ q.T).float()


def test_float32_is_used_where_it_is_enough_and_float64_where_it_is_not():
    c = covariance(600, -6)
    assert Whitening.of(c, 1e-2, "w", 1e-4).lower.dtype == torch.float32
    assert Whitening.of(c, 1e-2, "w").lower.dtype == torch.float64, "an exact split asks for no excess"
    assert Whitening.of(c, 1e-6, "w", 1e-10).lower.dtype == torch.float64, "a small excess is not reached"
    assert Whitening.of(c[:64, :64], 1e-2, "w", 1e-4).lower.dtype == torch.float64, "small matrices cost nothing"


@pytest.mark.parametrize("damping", [1e-2, 1e-5])
def test_the_distance_is_the_distance_or_a_little_more(damping):
    c = covariance(600, -6)
    lower, scale = whitening._single(c, damping, 1e9), mean_scale(c)
    wide = lower.double()
    r = c.double() * scale + damping * torch.eye(600)
    off = torch.linalg.solve_triangular(wide, wide @ wide.T - r, upper=False)
    off = torch.linalg.solve_triangular(wide, off.T, upper=False)
    assert 0.9 <= distance(lower, c, scale, damping) / off.norm().item() <= 1.5
    values = torch.linalg.svdvals(off)
    assert values[0] <= distance(lower, c, scale, damping, norm=4) <= 2 * values.pow(4).sum() ** 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitening_takes_vectors_as_they_lie(dtype):
    lower = torch.randn(70, 70, dtype=dtype).tril_() + 20 * torch.eye(70, dtype=dtype)
    metric, rows = Whitening(lower), torch.randn(9, 70, dtype=torch.float64)
    inverse = torch.linalg.inv(lower.double())
    for x in (rows.T, rows.T.contiguous(), rows.T[:, :1], rows.T[:, ::2]):
        assert torch.allclose(metric.whiten(x), inverse @ x, rtol=1e-5, atol=1e-6)
        assert torch.allclose(metric.unwhiten(x), inverse.T @ x, rtol=1e-5, atol=1e-6)
        assert torch.allclose(metric.colour(metric.unwhiten(x)), x, rtol=1e-4, atol=1e-5)


def test_the_objective_ends_within_the_excess():
    c, f, excess, damping = covariance(600, -7), torch.randn(40, 600, dtype=torch.float64), 1e-4, 1e-2
    u = torch.randn(600, dtype=torch.float64)
    r = unit(c) + damping * torch.eye(600)

    def objective(x):
        return ((x - u) @ r @ (x - u) + (f @ x).square().sum()).item()

    def solve(lower):
        white = lower.whiten(f.T)
        return u - lower.unwhiten(white @ torch.linalg.solve(torch.eye(40) + white.T @ white, f @ u))

    found = Whitening.of(c, damping, "w", excess)
    assert found.lower.dtype == torch.float32
    best = objective(torch.linalg.solve(r + f.T @ f, r @ u))
    assert objective(solve(Whitening.of(c, damping, "w"))) == pytest.approx(best, rel=1e-9)
    assert best <= objective(solve(found)) <= best * (1 + excess)


def test_what_is_not_positive_is_refused_in_either_precision():
    broken = covariance(600, -2)
    broken[0, 0] = -1.0
    with pytest.raises(BadInput, match="not positive"):
        Whitening.of(broken, 1e-2, "w", 1e-4)


def test_samples_stand_for_their_covariance():
    rows = torch.randn(5, 30, dtype=torch.float64)
    samples = Samples(rows)
    assert torch.allclose(samples.dense(torch.float64), rows.T @ rows)
    assert torch.allclose(unit(samples), unit(rows.T @ rows))
    w = spanning_factor(samples)
    assert w.shape == (30, 5)
    assert torch.allclose(w @ w.T, rows.T @ rows)
    many = spanning_factor(Samples(torch.randn(20, 30, dtype=torch.float64) @ torch.diag(torch.arange(30) < 4).double()))
    assert many is not None
    assert many.shape[1] <= 4, "more samples than count as few, and four directions"
