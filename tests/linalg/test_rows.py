"""Matrices formed by rows and covariances of few samples: the same numbers, and what need not be read is not."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_truncated import generator, hard_case, heavy_tail, true_excess

from liborth_cli.linalg.rows import ThinProduct, along, gram_of, in_blocks, spanning_factor, whole
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


def samples(count, size, seed=0, spread=1.0):
    """Draw vectors whose lengths fall over `spread` orders of magnitude."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.logspace(0, -spread, count, dtype=torch.float64)
    return torch.randn(count, size, generator=draw, dtype=torch.float64) * lengths[:, None]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(0, 99), st.floats(0, 2), st.sampled_from([torch.float32, torch.float64]))
def test_few_samples_are_found_and_nothing_is_lost(count, seed, spread, dtype):
    x = samples(count, 200, seed, spread)
    f = (x.T @ x / count).to(dtype)
    w = spanning_factor(f)
    assert w is not None
    assert w.dtype == torch.float64
    assert w.shape[1] <= count, "float32 rounding is not taken for directions"
    assert (w @ w.T - f.double()).norm() <= 1e-5 * f.double().norm()
    assert (f.double() - w @ w.T).trace() <= 1e-6 * f.trace()


def test_what_is_not_short_is_left_to_others():
    x = samples(400, 200)
    assert spanning_factor(x.T @ x) is None
    assert spanning_factor(torch.eye(2)) is None
    broken = torch.eye(30)
    broken[3, 3] = torch.nan
    assert spanning_factor(broken) is None


def test_a_diagonal_has_as_many_directions_as_it_has_entries():
    frequencies = torch.zeros(50)
    frequencies[[3, 20, 41]] = torch.tensor([0.5, 0.2, 0.3])
    w = spanning_factor(frequencies)
    assert w is not None
    assert w.shape == (50, 3)
    assert torch.allclose(w @ w.T, torch.diag(frequencies).double())
    assert spanning_factor(torch.ones(50)) is None


def test_nothing_has_no_directions():
    w = spanning_factor(torch.zeros(30, 30))
    assert w is not None
    assert w.shape == (30, 0)


@pytest.mark.parametrize("size", [300, 100])
def test_other_rows_are_never_read(size):
    """Rows of F that are no pivots may hold anything: a file of F need not be read whole."""
    x = samples(3, size)
    f = x.T @ x
    w = spanning_factor(f)
    assert w is not None
    read = {int((f.diagonal() - (w[:, :j] ** 2).sum(1)).argmax()) for j in range(3)}
    poisoned = torch.full_like(f, torch.nan)
    poisoned[list(read)] = f[list(read)]
    poisoned.diagonal().copy_(f.diagonal())
    assert torch.equal(spanning_factor(poisoned), w)  # type: ignore[arg-type]


@pytest.mark.parametrize(("samples", "width"), [(1, 40), (50, 300), (90, 300), (64, 256)])
def test_many_pivots_at_a_time_span_a_covariance_of_few_samples(samples, width):
    """What a GPU does; the samples are of very different sizes, and some are twice there."""
    rows = torch.randn(samples, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, samples)[:, None]
    rows = torch.cat([rows, rows[: samples // 2]])
    f = rows.T @ rows
    found = in_blocks(f, width // 3)
    assert found is not None
    assert found.shape[1] <= width // 3
    assert float((f.double() - found @ found.T).diagonal().clamp(min=0).sum()) <= 2e-6 * float(f.diagonal().sum())
    assert in_blocks(f + torch.eye(width), width // 3) is None
