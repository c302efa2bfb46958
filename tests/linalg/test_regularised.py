"""Products with rows g ⊗ a that are never formed, and least squares solved by them, against everything written out."""

import pytest
import torch

from liborth_cli.linalg import khatri_rao, regularised
from liborth_cli.linalg.khatri_rao import KhatriRao
from liborth_cli.linalg.regularised import dual, is_factorised, solve


def sides(tokens, m, n, seed=0, dtype=torch.float64):
    """Tokens of very different size."""
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(tokens, d, generator=draw, dtype=torch.float64) for d in (m, n))
    return KhatriRao((left * torch.rand(tokens, 1, generator=draw) ** 3).to(dtype), right.to(dtype))


def rows(b):
    return torch.einsum("tm,tn->tmn", b.left, b.right).flatten(1)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
@pytest.mark.parametrize("piece", [4, 4096])
def test_rows_are_kronecker_products(shape, piece, monkeypatch):
    monkeypatch.setattr(khatri_rao, "PIECE", piece)
    b = sides(11, *shape)
    x, v = torch.randn(shape, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    assert torch.allclose(b.along(x), rows(b) @ x.flatten())
    assert torch.allclose(b.combine(v), (rows(b).T @ v).reshape(shape))
    assert torch.allclose(b.kernel(), rows(b) @ rows(b).T)
    assert torch.allclose(b.diagonal(), (rows(b) @ rows(b).T).diagonal())


@pytest.mark.parametrize("strength", [0.02, 1.0, 50.0])
@pytest.mark.parametrize("heavy", [0, 20, 1000])
def test_it_is_the_minimiser_over_two_matrices_and_the_gap_is_proven(strength, heavy, monkeypatch):
    """Primal and dual written out: their difference is the certificate, and it bounds the distance to the minimum."""
    monkeypatch.setattr(regularised, "EXACT_UP_TO", heavy)
    monkeypatch.setattr(regularised, "HEAVIEST", 90)
    terms, y = [sides(90, 6, 9), sides(90, 4, 5, seed=1)], torch.randn(90, generator=torch.Generator().manual_seed(2))
    b = torch.cat([rows(term) for term in terms], 1)
    found = solve(terms, y, strength, 1e-3)
    delta = torch.cat([part.flatten() for part in found.parts])
    y = y.double()
    error = y - b @ delta
    primal = float(delta @ delta + strength * error @ error)
    lower = float(2 * strength * error @ y - (strength * b.T @ error).square().sum() - strength * error @ error)
    least = float(y @ torch.linalg.solve(b @ b.T + torch.eye(90, dtype=b.dtype) / strength, y))
    assert (primal - lower) / lower == pytest.approx(found.gap, rel=1e-5, abs=1e-12)
    assert -1e-9 <= primal / least - 1 <= found.gap + 1e-12
    alpha = dual(b @ b.T, y, strength)
    assert float(2 * alpha @ y - (b.T @ alpha).square().sum() - alpha @ alpha / strength) == pytest.approx(least, rel=1e-9)
    assert found.gap <= 1e-3
    assert found.steps == 1 if heavy == 1000 else 1 <= found.steps < 90


def test_heavy_tokens_solved_exactly_save_steps(monkeypatch):
    monkeypatch.setattr(regularised, "HEAVIEST", 1 << 20)
    term = sides(600, 20, 25)
    y = term.along(torch.ones(20, 25))
    steps = []
    for heavy in (1, 150):
        monkeypatch.setattr(regularised, "EXACT_UP_TO", heavy)
        steps.append(solve([term], y, 1.0, 1e-4).steps)
    assert steps[1] < 0.6 * steps[0]


def test_more_tokens_are_factorised_where_the_matrix_is_large():
    """Measured at 3,300 tokens: 1.8 s against 2.8 s of products at 1536 × 576, 1.3 against 1.1 at 576 × 576."""
    assert is_factorised(1024, (8, 8))
    assert not is_factorised(1025, (8, 8))
    assert is_factorised(3300, (1536, 576))
    assert not is_factorised(3300, (576, 576))
    assert is_factorised(4096, (4096, 14336))
    assert not is_factorised(4097, (4096, 14336)), "the kernel's memory does not grow with the matrix"


def test_products_in_float32_reach_the_gap_they_state(monkeypatch):
    monkeypatch.setattr(regularised, "EXACT_UP_TO", 20)
    term = sides(300, 12, 15, dtype=torch.float32)
    y = term.along(torch.ones(12, 15))
    found = solve([term], y, 10.0, 1e-4)
    b = rows(KhatriRao(term.left.double(), term.right.double()))
    delta, y = found.parts[0].double().flatten(), y.double()
    least = float(y @ torch.linalg.solve(b @ b.T + torch.eye(300, dtype=b.dtype) / 10, y))
    assert float(delta @ delta + 10 * (y - b @ delta).square().sum()) <= least * (1 + 1.01e-4)


def test_a_limit_is_kept_and_said_and_nothing_is_solved_at_once(monkeypatch):
    monkeypatch.setattr(regularised, "EXACT_UP_TO", 1)
    term = sides(90, 6, 9)
    found = solve([term], term.along(torch.ones(6, 9)), 1e3, 1e-9, most=3)
    assert (found.steps, found.gap > 1e-9) == (3, True)
    for strength, y in ((1.0, torch.zeros(90)), (0.0, torch.ones(90))):
        nothing = solve([term], y, strength)
        assert (nothing.steps, nothing.gap, float(nothing.parts[0].norm())) == (0, 0.0, 0.0)
