"""A matrix formed by rows gives the same low-rank part, the same certificate, and never lies in memory whole."""

from dataclasses import dataclass

import pytest
import torch
from test_truncated import generator, hard_case, heavy_tail, true_excess

from liborth_cli.linalg.rows import ThinProduct, along, gram_of, whole
from liborth_cli.linalg.truncated import energy, leading_subspace


@dataclass
class Formed:
    """A matrix that hands out its rows in one buffer, poisoned between two blocks."""

    matrix: torch.Tensor
    step: int

    @property
    def shape(self):
        return self.matrix.shape

    @property
    def dtype(self):
        return self.matrix.dtype

    def pairs(self):
        return None

    def blocks(self):
        buffer = torch.empty(self.step, self.matrix.shape[1], dtype=self.dtype)
        for start in range(0, len(self.matrix), self.step):
            block = self.matrix[start : start + self.step]
            buffer[: len(block)] = block
            yield buffer[: len(block)]
            buffer.fill_(float("nan"))


@pytest.mark.parametrize("step", [1, 7, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_those_of_the_whole(step, dtype):
    u = heavy_tail(300, 40).to(dtype)
    rows, q = Formed(u, step), torch.linalg.qr(torch.randn(40, 5, dtype=dtype))[0]
    torch.testing.assert_close(gram_of(rows, torch.float64), u.double().T @ u.double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(along(rows, q), u @ q)
    assert torch.equal(whole(rows), u)


@pytest.mark.parametrize("make", [hard_case, heavy_tail])
@pytest.mark.parametrize("tolerance", [1e-4, 0.0])
def test_the_certificate_is_true_by_rows(make, tolerance):
    u = make(700, 96)
    found = leading_subspace(Formed(u, 128), 24, energy(u), generator(), tolerance)
    assert found.excess <= 1e-4
    assert true_excess(u, 24, found) <= found.excess + 1e-6
    assert torch.linalg.matrix_rank(found.thin(tall=True)[0 : u.numel()].view(u.shape)) == 24


def test_a_thin_product_is_looked_at_anywhere():
    thin = ThinProduct(torch.randn(50, 3), torch.randn(11, 3))
    full = (thin.left @ thin.right.T).reshape(-1)
    for first, last in [(0, 550), (0, 1), (5, 40), (11, 22), (10, 12), (549, 550)]:
        torch.testing.assert_close(thin[first:last], full[first:last])
