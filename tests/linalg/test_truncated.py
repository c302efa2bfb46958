"""The certificate is true: against full SVD the excess is never above what was promised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from liborth_kernels.gram import gram

from liborth_cli.linalg import truncated
from liborth_cli.linalg.eigen import eigenvalues, is_positive_definite, leading_eigh
from liborth_cli.linalg.krylov import block_krylov
from liborth_cli.linalg.tridiagonal import leading_pairs
from liborth_cli.linalg.truncated import TAIL_FLOOR, energy, leading_subspace


def hard_case(m, n, seed=0, noise=2e-4):
    """Rank 16 with singular values from 1 to 0.063, over a flat bulk of noise."""
    g = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(m, 16, generator=g))[0]
    right = torch.linalg.qr(torch.randn(n, 16, generator=g))[0]
    return (left * torch.logspace(0, -1.2, 16)) @ right.T + noise * torch.randn(m, n, generator=g)


def heavy_tail(m, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    left = torch.linalg.qr(torch.randn(m, k, generator=g))[0]
    right = torch.linalg.qr(torch.randn(n, k, generator=g))[0]
    return (left / torch.arange(1, k + 1) ** 0.7) @ right.T


def low_rank(m, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, 3, generator=g) @ torch.randn(3, n, generator=g)


def true_excess(u, rank, found):
    squares = torch.linalg.svdvals(u.double()).square()
    tail = max(squares[rank:].sum().item(), TAIL_FLOOR * squares.sum().item())
    q = found.vectors.double()
    u = u.double() if u.shape[0] <= u.shape[1] else u.double().T
    left = (u - q @ (q.T @ u)).square().sum().item()
    return (left - squares[rank:].sum().item()) / tail


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("make", [hard_case, heavy_tail, low_rank])
@pytest.mark.parametrize("shape", [(96, 96), (64, 300), (300, 64), (257, 131), (512, 512), (1024, 1024)])
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_excess_is_within_the_promise(make, shape, rank):
    u = make(*shape)
    found = leading_subspace(u, rank, energy(u), generator())
    assert found.excess <= 1e-4
    assert true_excess(u, rank, found) <= found.excess + 1e-6
    rebuilt = found.rebuild(torch.empty_like(u))
    kept = energy(u) - energy(u - rebuilt)
    assert kept == pytest.approx(found.captured, rel=1e-5)


@pytest.mark.parametrize("make", [hard_case, heavy_tail])
@pytest.mark.parametrize("shape", [(96, 96), (64, 300), (257, 131), (400, 640)])
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_the_rounding_allowance_covers_the_rounding(make, shape, rank):
    """The padded float32 bound is never below the true sum, whatever the seed, stopped early or not."""
    for seed in range(12 if min(shape) < 256 else 4):
        u = make(*shape, seed)
        found = leading_pairs(gram(u, both=False), rank)
        truth = eigenvalues(gram(u, torch.float64))[:rank].sum().item()
        assert truncated._padded(found.upper, found.values, torch.float32) > truth


@pytest.mark.parametrize("shape", [(1536, 1536), (1500, 2600)])
def test_krylov_certificate_is_true(shape, monkeypatch):
    """The route for large matrices, on sizes a test can check."""
    monkeypatch.setattr(truncated, "KRYLOV_FROM", 1024)
    u = hard_case(*shape)
    found = leading_subspace(u, 64, energy(u), generator())
    assert found.route == "krylov32"
    assert true_excess(u, 64, found) <= found.excess <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008)])
def test_krylov_certificate_at_real_size(shape):
    u = hard_case(*shape)
    found = leading_subspace(u, 64, energy(u), generator())
    squares = eigenvalues(torch.from_numpy((u.double() @ u.double().T).numpy()))
    excess = (squares[:64].sum().item() - found.captured) / squares[64:].sum().item()
    assert found.route == "krylov32"
    assert excess <= found.excess <= 1e-4


def test_a_failed_certificate_falls_back(monkeypatch):
    """With too few Krylov blocks nothing can be proven, and another route has to answer."""
    monkeypatch.setattr(truncated, "KRYLOV_FROM", 512)
    monkeypatch.setattr(truncated, "KRYLOV_DEPTH", 2)
    u = hard_case(700, 700)
    assert truncated._krylov32(u, 20, energy(u), generator()).excess > 1e-4
    found = leading_subspace(u, 20, energy(u), generator())
    assert found.route == "gram32"
    assert true_excess(u, 20, found) <= 1e-4


def test_a_steep_spectrum_needs_float64():
    """A tail far below float32's resolution of the whole cannot be certified in float32."""
    u = low_rank(200, 200) + 1e-3 * hard_case(200, 200, 1)
    found = leading_subspace(u, 3, energy(u), generator())
    assert found.route == "gram64"
    assert true_excess(u, 3, found) <= found.excess + 1e-6 <= 1e-4


def test_tolerance_zero_is_the_full_svd():
    u = hard_case(60, 80)
    found = leading_subspace(u, 10, energy(u), generator(), tolerance=0.0)
    assert found.route == "svd"
    assert true_excess(u, 10, found) == pytest.approx(0, abs=1e-5)


def test_same_seed_same_bits(monkeypatch):
    monkeypatch.setattr(truncated, "KRYLOV_FROM", 512)
    u = hard_case(600, 600)
    first, second = (leading_subspace(u, 16, energy(u), generator()) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]))
def test_any_shape(m, n, seed, dtype):
    u = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    rank = 1 + seed % min(m, n)
    found = leading_subspace(u, rank, energy(u), generator())
    assert true_excess(u, rank, found) <= max(found.excess, 1e-4) + 1e-5
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(rank, dtype=dtype), atol=1e-4)


def test_ritz_pairs_satisfy_their_equation():
    g = hard_case(200, 200, noise=0.01)
    g = g @ g.T
    pairs = block_krylov(g, 10, 20, 5, generator())
    assert torch.allclose(g @ pairs.vectors - pairs.vectors * pairs.values.float(), pairs.residuals, atol=1e-5)
    assert torch.allclose(pairs.vectors.T @ pairs.vectors, torch.eye(10), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 7, 30])
def test_eigen_against_torch(dtype, count):
    x = torch.randn(30, 30, generator=torch.Generator().manual_seed(3), dtype=dtype)
    g = x @ x.T
    values, vectors = torch.linalg.eigh(g)
    found, q = leading_eigh(g.clone(), count)
    assert torch.allclose(found, values.flip(0)[:count], rtol=1e-4, atol=1e-4)
    assert torch.allclose((q.T @ vectors.flip(1)[:, :count]).abs().diagonal(), torch.ones(count, dtype=dtype), atol=1e-3)
    assert torch.allclose(eigenvalues(g.clone()), values.flip(0), rtol=1e-3, atol=1e-3)
    assert is_positive_definite(g + torch.eye(30, dtype=dtype))
    assert not is_positive_definite(g - 10 * torch.eye(30, dtype=dtype))
