"""Products with a kernel that is never formed, and shifted systems solved by them, against everything written out."""

import pytest
import torch

from liborth_cli.linalg import khatri_rao
from liborth_cli.linalg.khatri_rao import KhatriRao, kernel_product
from liborth_cli.linalg.shifted import solve_shifted


def sides(tokens, m, n, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return KhatriRao(*(torch.randn(tokens, d, generator=draw, dtype=torch.float64).to(dtype) for d in (m, n)))


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
@pytest.mark.parametrize("piece", [4, 4096])
def test_rows_are_kronecker_products(shape, piece, monkeypatch):
    monkeypatch.setattr(khatri_rao, "PIECE", piece)
    b = sides(11, *shape)
    rows = torch.stack([torch.outer(g, a).flatten() for g, a in zip(b.left, b.right, strict=True)])
    x, v = torch.randn(shape, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    assert torch.allclose(b.along(x), rows @ x.flatten())
    assert torch.allclose(b.combine(v), (rows.T @ v).reshape(shape))
    assert torch.allclose(b.kernel(), rows @ rows.T)
    assert torch.allclose(b.diagonal(), (rows @ rows.T).diagonal())
    other = sides(11, 3, 2, seed=1)
    assert torch.allclose(kernel_product([b, other], v), (b.kernel() + other.kernel()) @ v)


@pytest.mark.parametrize("count", [30, 90], ids=["fewer tokens than weights", "more"])
def test_every_shift_is_solved_and_the_gap_is_the_gap(count):
    """For three shifts: primal minus dual, written out, is the certificate; and it bounds the distance to the minimum."""
    b, u = sides(count, 6, 9), torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    kernel, y, smallest = b.kernel(), b.along(u), 0.5
    found = solve_shifted(lambda v: kernel_product([b], v), y, smallest, 1e-3)
    assert 2 < len(found.nodes) < 40
    assert found.gap(smallest) <= 1e-3
    for shift in (smallest, 5.0, 500.0):
        alpha = found.solution(shift)
        x = u - b.combine(alpha)
        primal = (x - u).square().sum() + b.along(x).square().sum() / shift
        dual = 2 * alpha @ y - alpha @ kernel @ alpha - shift * alpha @ alpha
        assert float((primal - dual) / dual) == pytest.approx(found.gap(shift), rel=1e-6, abs=1e-12)
        exact = y @ torch.linalg.solve(kernel + shift * torch.eye(count, dtype=kernel.dtype), y)
        assert -1e-12 <= float(primal / exact) - 1 <= found.gap(shift) + 1e-9


def test_it_ends_where_the_space_ends():
    """A kernel of rank two is finished after two steps, whatever was asked; nothing to solve is solved at once."""
    b = sides(40, 1, 2)
    y = b.along(torch.ones(1, 2))
    found = solve_shifted(lambda v: kernel_product([b], v), y, 1e-9, 0.0)
    assert (len(found.nodes), found.gap(1e-9)) == (2, 0.0)
    assert torch.allclose(kernel_product([b], found.solution(0.1)) + 0.1 * found.solution(0.1), y)
    nothing = solve_shifted(lambda v: v, torch.zeros(4, dtype=torch.float64), 1.0, 1e-3)
    assert torch.equal(nothing.solution(1.0), torch.zeros(4, dtype=torch.float64))
    assert nothing.gap(1.0) == 0.0


def test_products_in_float32_will_do():
    b = sides(200, 12, 15, dtype=torch.float32)
    y = b.along(torch.ones(12, 15)).double()
    found = solve_shifted(lambda v: kernel_product([b], v), y, 0.1, 1e-4)
    kernel = KhatriRao(b.left.double(), b.right.double()).kernel()
    r = y - kernel @ found.solution(0.1) - 0.1 * found.solution(0.1)
    assert float(r @ r) / 0.1 / float(y @ found.solution(0.1)) <= 1.1e-4


def test_a_limit_is_kept_and_said():
    b = sides(90, 6, 9)
    y = b.along(torch.ones(6, 9))
    found = solve_shifted(lambda v: kernel_product([b], v), y, 1e-3, 1e-6, most=3)
    assert len(found.nodes) == 3
    assert found.gap(1e-3) > 1e-6
