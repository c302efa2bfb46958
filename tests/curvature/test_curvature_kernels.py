"""The inner loops against their references in float64: odd shapes, strides, one thread and several."""

from __future__ import annotations

import pytest
import torch
from liborth_kernels.covariance import add_covariance, covariance_reference, symmetric
from liborth_kernels.moments import add_second_moments, second_moments_reference


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (5, 3), (3, 300), (0, 4), (64, 513)])
def test_covariance(threads, dtype, n, d):
    rows = torch.randn(n, d, dtype=dtype)
    total = torch.randn(d, d, dtype=dtype)
    total = total + total.T
    wanted = covariance_reference(total.double(), rows.double(), 1.7)
    place = total.data_ptr()
    add_covariance(total, rows, 1.7)
    assert total.data_ptr() == place
    assert torch.allclose(symmetric(total).double(), wanted, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-12)


def test_covariance_takes_strided_rows_and_narrow_dtypes(threads):
    base = torch.randn(40, 30)
    for rows in (base[:, ::2], base.T[:15, :], base[:, :15].bfloat16(), base[3:9, 10:25]):
        total = torch.zeros(rows.shape[1], rows.shape[1])
        add_covariance(total, rows)
        assert torch.allclose(symmetric(total), rows.float().T @ rows.float(), atol=1e-4)


def test_covariance_of_one_block_of_a_stack(threads):
    stack, rows = torch.zeros(3, 8, 8), torch.randn(20, 8)
    add_covariance(stack[1], rows)
    assert torch.allclose(symmetric(stack[1]), rows.T @ rows, atol=1e-4)
    assert not stack[0].any() and not stack[2].any()


def test_second_moments():
    g, a = torch.randn(17, 5, dtype=torch.float64), torch.randn(17, 7, dtype=torch.float64)
    total = torch.zeros(5, 7, dtype=torch.float64)
    add_second_moments(total, g, a, 0.5)
    add_second_moments(total, g, a, 0.5)
    assert torch.allclose(total, second_moments_reference(g, a))
