"""The early stop is honest: whatever the matrix, the bound is above the true sum, and the pairs reach it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liborth_cli.linalg import tridiagonal
from liborth_cli.linalg.tridiagonal import GAP, leading_pairs


@pytest.fixture
def columns(monkeypatch):
    """Collect how many columns each reduction needed."""
    seen = []
    pairs = tridiagonal._Reduction.pairs

    def spy(self, count, upper):
        seen.append(self.done)
        return pairs(self, count, upper)

    monkeypatch.setattr(tridiagonal._Reduction, "pairs", spy)
    return seen


def wishart(n, samples, seed=0):
    u = torch.randn(n, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return u @ u.T / samples


def check(g, count, dtype=torch.float64):
    """Hold the result against a full decomposition in float64; return it."""
    truth = torch.linalg.eigvalsh(g.double()).flip(0)
    found = leading_pairs(g.to(dtype, copy=True).contiguous(), count)
    best, rest = truth[:count].sum().item(), truth[count:].sum().item()
    unit = 50 * torch.finfo(dtype).eps * best
    vectors = found.vectors.double()
    captured = (vectors * (g.double() @ vectors)).sum().item()
    assert best <= found.upper + unit
    assert best - captured <= GAP * rest + unit
    assert found.upper - best <= GAP * rest + unit
    assert torch.allclose(vectors.T @ vectors, torch.eye(count, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(found.values.double(), truth[:count], atol=max(unit, GAP * rest))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [600, 1800])
def test_a_flat_bulk_stops_early(columns, dtype, samples):
    g = wishart(600, samples)
    g[:5, :5] += 100 * torch.diag(torch.arange(1, 6, dtype=torch.float64))
    check(g, 32, dtype)
    assert max(columns) <= 300


def test_copies_of_an_eigenvalue_are_not_missed():
    """In exact arithmetic a Krylov space sees one of each, and what is left holds the others."""
    double = torch.kron(torch.eye(2, dtype=torch.float64), wishart(160, 400))
    turn = torch.linalg.qr(torch.randn(320, 320, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    check(turn @ double @ turn.T, 20)
    check(double, 20)


@pytest.mark.parametrize("hidden", [1, 300])
def test_a_start_that_never_sees_the_largest(hidden):
    """The first unit vector, where the Krylov space begins, has nothing in common with the largest eigenvectors."""
    g = wishart(500, 900)
    g[-hidden:] = g[:, -hidden:] = 0
    g[-hidden:, -hidden:] = 9 * torch.eye(hidden, dtype=torch.float64)
    found = check(g, 40)
    assert found.values[0] == pytest.approx(9)


def test_first_vector_is_an_eigenvector():
    g = wishart(400, 700)
    g[0] = g[:, 0] = 0
    check(g, 16)


def test_rank_below_count(columns):
    """Past the rank every eigenvalue is rounding, and nothing is gained by looking."""
    u = torch.randn(400, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    check(u @ u.T, 20)
    assert columns == [400]


def test_zero():
    found = leading_pairs(torch.zeros(300, 300), 4)
    assert found.upper == 0
    assert torch.equal(found.values, torch.zeros(4))
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(4))


def test_only_the_upper_triangle_is_read():
    g = wishart(350, 700)
    poisoned = g.clone()
    poisoned[torch.tril_indices(350, 350, -1).unbind()] = torch.nan
    assert torch.equal(leading_pairs(poisoned, 8).vectors, leading_pairs(g, 8).vectors)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 330), st.integers(0, 9), st.floats(0, 3), st.sampled_from([torch.float32, torch.float64]))
def test_any_spectrum(n, seed, decay, dtype):
    draw = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0]
    g = (turn * torch.arange(1, n + 1, dtype=torch.float64) ** -decay) @ turn.T
    check((g + g.T) / 2, 1 + seed * (n - 1) // 12, dtype)
