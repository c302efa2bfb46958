"""Products with bfloat16 weights are bfloat16; nothing else is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from liborth_cli.stream.tap import activation_dtype, arithmetic

HALF, CPU = torch.bfloat16, torch.device("cpu")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("how", ["linear", "bias", "addmm", "matmul", "operator", "stack"])
def test_a_product_is_rounded_as_bfloat16_rounds_it_and_handed_on_as_float32(how):
    x, w, b = numbers(5, 7), numbers(3, 7, seed=1).to(HALF), numbers(3, seed=2).to(HALF)
    half = x.to(HALF)
    with arithmetic(HALF, CPU):
        found = {
            "linear": lambda: F.linear(x, w),
            "bias": lambda: F.linear(x, w, bias=b),
            "addmm": lambda: torch.addmm(b, x, w.T),
            "matmul": lambda: torch.matmul(x, w.T),
            "operator": lambda: x @ w.T,
            "stack": lambda: torch.bmm(x[None], w.T[None])[0],
        }[how]()
    expected = F.linear(half, w, b if how in ("bias", "addmm") else None)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())


def test_what_lies_between_products_is_float32():
    x, w, b = numbers(5, 7), numbers(7, seed=1).to(HALF), numbers(7, seed=2).to(HALF)
    table, ids = numbers(11, 7, seed=3).to(HALF), torch.tensor([1, 4, 10])
    with arithmetic(HALF, CPU):
        norm, looked_up, product = F.layer_norm(x, (7,), w, b), F.embedding(ids, table), x @ x.T
    assert torch.equal(norm, F.layer_norm(x, (7,), w.float(), b.float()))
    assert torch.equal(looked_up, table[ids].float())
    assert torch.equal(product, x @ x.T), "attention's products hold no weights"


def test_gradients_flow_in_float32_between_products():
    x, w = numbers(5, 7).requires_grad_(), numbers(7, 7, seed=1).to(HALF)
    with arithmetic(HALF, CPU):
        (x + F.linear(x, w)).square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert not torch.equal(x.grad, x.grad.to(HALF).float()), "more digits than bfloat16 has"


def test_other_models_are_left_alone():
    assert activation_dtype(HALF) == activation_dtype(torch.float32) == torch.float32
    assert activation_dtype(torch.float64) == torch.float64
    with arithmetic(torch.float32, CPU):
        assert F.linear(numbers(2, 3).to(HALF), numbers(4, 3).to(HALF)).dtype == HALF
