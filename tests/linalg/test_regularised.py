"""Products with rows g ⊗ a that are never formed, and least squares solved by them, against everything written out."""

import pytest
import torch
from elsewhere import GPU, Elsewhere

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
    assert torch.allclose(b.blocks(1).flatten(), b.diagonal())


@pytest.mark.parametrize("strength", [0.02, 1.0, 50.0])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_it_is_the_minimiser_and_the_gap_is_proven(strength, shape):
    """Primal and dual written out: their difference is the certificate, and it bounds the distance to the minimum."""
    rows_, y = sides(90, *shape), torch.randn(90, generator=torch.Generator().manual_seed(2))
    b = rows(rows_)
    found = solve(rows_, y, strength, 1e-3)
    delta, y = found.part.flatten(), y.double()
    error = y - b @ delta
    primal = float(delta @ delta + strength * error @ error)
    alpha = dual(b @ b.T, y, strength)
    least = float(y @ torch.linalg.solve(b @ b.T + torch.eye(90, dtype=b.dtype) / strength, y))
    assert float(2 * alpha @ y - (b.T @ alpha).square().sum() - alpha @ alpha / strength) == pytest.approx(least, rel=1e-9)
    assert -1e-9 <= primal / least - 1 <= found.gap + 1e-12
    assert 0 < found.gap <= 1e-3
    assert 1 <= found.steps < 90


def test_steps_follow_neither_the_size_of_tokens_nor_what_they_share(monkeypatch):
    """Tokens of sizes a hundred to one with a direction in common: the diagonal knows the sizes, leading directions that."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(600, d, generator=draw, dtype=torch.float64) for d in (40, 50))
    size = 10 ** (-2 * torch.rand(600, 1, generator=draw, dtype=torch.float64))
    term = KhatriRao(size * (left + 2 * left[:1]), right + 2 * right[:1])
    y = term.along(torch.ones(40, 50))
    system = rows(term) @ rows(term).T + 100 * torch.eye(600, dtype=torch.float64)
    alpha, residual, direction, plain = torch.zeros_like(y), y, y, 0
    while regularised._gap(alpha, residual, y, 0.01) > 1e-3:
        felt, plain = system @ direction, plain + 1
        length = float(residual @ residual) / float(direction @ felt)
        alpha, after = alpha + length * direction, residual - length * felt
        direction, residual = after + direction * float(after @ after) / float(residual @ residual), after
    steps = solve(term, y, 0.01, 1e-3).steps
    monkeypatch.setattr(regularised, "SHARED", 2)
    sizes = solve(term, y, 0.01, 1e-3).steps
    assert steps < 0.6 * sizes < 0.4 * plain


def test_parts_that_are_alike_take_fewer_steps():
    """The same tokens at three points of the path, a little turned: their kernel within a position is solved exactly."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(400, d, generator=draw, dtype=torch.float64) for d in (40, 50))
    left *= 10 ** (-2 * torch.rand(400, 1, generator=draw, dtype=torch.float64))
    turned = [left + 0.3 * left.roll(shift, 1) for shift in (1, 2, 3)]
    term = KhatriRao(torch.cat(turned), right.repeat(3, 1))
    kernel = (rows(term) @ rows(term).T).view(3, 400, 3, 400)
    assert torch.allclose(term.blocks(3), torch.einsum("injn->nij", kernel))
    y = term.along(torch.ones(40, 50))
    one, three = (solve(term, y, 1.0, 1e-4, parts) for parts in (1, 3))
    assert three.gap <= 1e-4 and one.gap <= 1e-4
    assert three.steps <= 0.7 * one.steps
    assert (three.part - one.part).norm() < 0.02 * one.part.norm()


def test_a_gpu_finds_directions_that_hold_what_the_leading_ones_hold(monkeypatch):
    monkeypatch.setattr(regularised, "SHARED", 32)
    draw = torch.Generator().manual_seed(0)
    falling = torch.arange(1, 97, dtype=torch.float32).rsqrt()
    side, other = torch.randn(400, 96, generator=draw) * falling, torch.randn(400, 30, generator=draw)
    heavy = side * other.norm(dim=1, keepdim=True)
    _, exact = regularised._leading(side, other)
    with Elsewhere():
        values, found = (part.cpu() for part in regularised._leading(side.to(GPU), other.to(GPU)))
    assert found.shape == exact.shape == (96, 16)
    assert torch.allclose(found.T @ found, torch.eye(16), atol=1e-5)
    held, most = (float((heavy @ q).square().sum()) for q in (found, exact))
    assert 0.94 * most < held <= most * (1 + 1e-5)
    assert torch.allclose(values, (heavy @ found).square().sum(0), rtol=1e-4)


def test_more_tokens_are_factorised_where_the_matrix_is_large():
    """Measured at 1536 × 576: 0.3 s against 0.6 s of steps for 1,500 tokens, 1.6 against 1.1 for 3,300."""
    assert is_factorised(1024, (8, 8))
    assert not is_factorised(1025, (8, 8))
    assert is_factorised(1500, (1536, 576))
    assert not is_factorised(3300, (1536, 576))
    assert is_factorised(4096, (4096, 14336))
    assert not is_factorised(4097, (4096, 14336)), "the kernel's memory does not grow with the matrix"


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("strength", [10.0, 1e4])
def test_products_in_less_reach_the_gap_they_state(strength, narrow, monkeypatch):
    """Steps in bfloat16 end in float32 where they get no further; what is stated is that of the tokens as they are."""
    monkeypatch.setattr(khatri_rao, "multiplies_bfloat16", lambda _: narrow)
    term = sides(300, 12, 15, dtype=torch.float32)
    assert (term.narrowed() is term) is not narrow
    y = term.along(torch.ones(12, 15))
    found = solve(term, y, strength, 1e-3)
    b = rows(KhatriRao(term.left.double(), term.right.double()))
    delta, y = found.part.double().flatten(), y.double()
    least = float(y @ torch.linalg.solve(b @ b.T + torch.eye(300, dtype=b.dtype) / strength, y))
    assert found.part.dtype == torch.float32
    assert found.gap <= 1e-3
    assert float(delta @ delta + strength * (y - b @ delta).square().sum()) <= least * (1 + 1.01e-3)


@pytest.mark.parametrize("narrow", [False, True])
def test_tokens_that_come_hundreds_of_times_are_solved_like_others(narrow, monkeypatch):
    """A text that was written down often: rounding of what is shared made steps diverge, to thousands of times the minimum."""
    monkeypatch.setattr(khatri_rao, "multiplies_bfloat16", lambda _: narrow)
    few = sides(5, 24, 32, dtype=torch.float32)
    often = torch.arange(khatri_rao.PIECE + 4) % 5
    term = KhatriRao(few.left[often], few.right[often])
    found = solve(term, term.along(torch.ones(24, 32)), 1e4, 1e-3)
    assert found.gap <= 1e-3
    assert found.steps <= 12


def test_what_is_not_a_number_ends_and_what_is_small_is_solved():
    term = sides(300, 12, 15, dtype=torch.float32)
    y = term.along(torch.ones(12, 15)).double()
    one, small = solve(term, y, 10.0), solve(term, y * 1e-30, 10.0)
    assert small.gap == pytest.approx(one.gap, rel=1e-3)
    assert torch.allclose(small.part * 1e30, one.part, atol=1e-4)
    y[3] = float("inf")
    assert not solve(term, y, 10.0).gap < float("inf")


def test_a_limit_is_kept_and_said_and_nothing_is_solved_at_once():
    term = sides(90, 6, 9)
    found = solve(term, term.along(torch.ones(6, 9)), 1e3, 1e-9, most=3)
    assert (found.steps, found.gap > 1e-9) == (3, True)
    for strength, y in ((1.0, torch.zeros(90)), (0.0, torch.ones(90))):
        nothing = solve(term, y, strength)
        assert (nothing.steps, nothing.gap, float(nothing.part.norm())) == (0, 0.0, 0.0)
