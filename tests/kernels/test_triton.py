"""Every Triton kernel in the interpreter, against float64 and against the torch op that specifies it.

What the interpreter cannot show: the arithmetic of tensor cores (it multiplies float32 as float32), and speed. Both are
`make bench-gpu`'s. That the kernels compile for real GPUs is shown in test_compile.py.
"""

from __future__ import annotations

import pytest
import torch
from liborth_kernels import dispatch
from liborth_kernels.covariance import add_covariance, covariance_reference
from liborth_kernels.filter import filter_coefficients
from liborth_kernels.moments import add_second_moments, second_moments_reference
from liborth_kernels.rebuild import BITS, rebuild, rebuild_delta
from liborth_kernels.sketch import add_update_gram, update_gram_reference, update_sketch
from liborth_kernels.tiles import tiles
from tiny import random_bits

pytest.importorskip("triton")
from liborth_kernels import moments_triton, sketch_triton, syrk_triton

SUMMING = (syrk_triton, moments_triton, sketch_triton)
CPU = torch.device("cpu")
NAN = float("nan")
UNIT = 2.0**-24
"""Unit roundoff of float32."""


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Triton for every op, and chunks so short that small cases cross them."""
    assert set(dispatch.use("triton", CPU).ops.values()) == {"triton"}
    for module in SUMMING:
        assert module.CHUNK in (256, 1024)
        monkeypatch.setattr(module, "CHUNK", 128)
    yield
    dispatch.use("torch", CPU)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in other places, with NaN between them."""
    if how == "columns":
        wide = torch.full((x.shape[0], 2 * x.shape[1]), NAN, dtype=x.dtype)
        wide[:, ::2] = x
        return wide[:, ::2]
    if how == "transposed":
        return x.T.contiguous().T
    return x


def poisoned(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A running sum whose lower triangle is NaN, and which entries are meant."""
    upper = torch.ones(size, size).triu().bool()
    return torch.where(upper, draw(size, size, seed=9), NAN), upper


def assert_products_close(
    found: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, inner: int, cut: float = 0.0
) -> None:
    """Hold a float32 sum of `inner` products to two-level summation's error, in units of the sum of magnitudes.

    `cut`: what each product may lose because its sides are cut into parts.

    Within a tile BLAS may add in any order (at most 64 terms), then four tiles make a chunk, then the chunks.
    """
    steps = 64 + 4 + inner / 128 + 4
    assert torch.isfinite(found).all()
    assert ((found.double() - exact).abs() <= (steps * UNIT + cut) * magnitude).all()


@pytest.mark.parametrize("dtype", dispatch.NARROW)
@pytest.mark.parametrize(("n", "d", "how"), [(1, 1, ""), (7, 130, "columns"), (70, 33, "transposed"), (140, 17, "")])
def test_covariance(dtype, n, d, how):
    rows = strided(draw(n, d, dtype=dtype), how)
    total, upper = poisoned(d)
    start, x = total.clone(), rows.double()
    add_covariance(total, rows, 1.7)
    exact = covariance_reference(start.double(), x, 1.7)
    magnitude = 1.7 * x.abs().T @ x.abs() + start.abs()
    assert_products_close(total[upper], exact[upper], magnitude[upper], n)
    assert total[~upper].isnan().all(), "only the upper triangle is the kernel's"


def test_covariance_of_nothing_and_of_one_block_of_a_stack():
    stack = torch.zeros(3, 8, 8)
    add_covariance(stack[1], draw(0, 8))
    add_covariance(stack[1], draw(20, 8))
    assert torch.allclose(stack[1], (draw(20, 8).T @ draw(20, 8)).triu(), atol=1e-5)
    assert not stack[0].any()
    assert not stack[2].any()


@pytest.mark.parametrize("dtype", dispatch.NARROW)
@pytest.mark.parametrize(("m", "n", "how"), [(1, 1, ""), (9, 140, "transposed"), (150, 5, "columns")])
def test_update_gram(dtype, m, n, how):
    new, old = strided(draw(m, n, dtype=dtype), how), draw(m, n, seed=1, dtype=dtype)
    total, upper = poisoned(n)
    start, u = total.clone(), new.double() - old.double()
    add_update_gram(total, new, old)
    exact = start.double() + update_gram_reference(new, old)
    assert_products_close(total[upper], exact[upper], (u.abs().T @ u.abs() + start.abs())[upper], m)
    assert total[~upper].isnan().all()


@pytest.mark.parametrize("dtype", dispatch.NARROW)
@pytest.mark.parametrize(("m", "n", "k", "how"), [(1, 1, 1, ""), (65, 100, 19, "columns"), (3, 140, 130, "transposed")])
def test_update_sketch(dtype, m, n, k, how):
    new, old, x = strided(draw(m, n, dtype=dtype), how), draw(m, n, seed=1, dtype=dtype), strided(draw(n, k, seed=2), how)
    u = new.double() - old.double()
    assert_products_close(update_sketch(new, old, x), u @ x.double(), u.abs() @ x.double().abs(), n, 2.0**-16)


def test_sketch_from_the_left_is_the_sketch_of_the_transpose():
    new, old, q = draw(40, 70, dtype=torch.bfloat16), draw(40, 70, seed=1, dtype=torch.bfloat16), draw(40, 6, seed=2)
    exact = q.double().T @ (new.double() - old.double())
    assert torch.allclose(update_sketch(new.T, old.T, q).T.double(), exact, atol=3e-4)


@pytest.mark.parametrize("dtype", dispatch.NARROW)
@pytest.mark.parametrize(("n", "d_out", "d_in", "how"), [(1, 1, 1, ""), (5, 3, 150, "columns"), (140, 7, 5, "transposed")])
def test_second_moments(dtype, n, d_out, d_in, how):
    g, a = strided(draw(n, d_out, dtype=dtype), how), strided(draw(n, d_in, seed=1, dtype=dtype), how)
    total = draw(d_out, d_in, seed=3).abs()
    exact = total.double() + second_moments_reference(g.double(), a.double(), 0.5)
    add_second_moments(total, g, a, 0.5)
    assert_products_close(total, exact, exact, n)


@pytest.mark.parametrize("op", ["gram", "sketch", "moments"])
def test_long_sums_lose_nothing(op, monkeypatch):
    """Equal products, so that rounding has a direction: added tile after tile they lose 2.5e-6, in two levels 3e-7."""
    for module in SUMMING:
        monkeypatch.setattr(module, "CHUNK", 1024)
        # How an entry is summed does not depend on the size of its tile, and small tiles take less time here.
        if module is sketch_triton:
            monkeypatch.setattr(module, "TILE", sketch_triton.Tile(rows=16))
        else:
            monkeypatch.setattr(module, "BLOCK", 16)
    long, value = 8192, 0.21
    rows = torch.full((long, 2), value)
    total = torch.zeros(2, 2)
    if op == "gram":
        add_update_gram(total, rows, torch.zeros_like(rows))
    elif op == "sketch":
        total = update_sketch(rows.T, torch.zeros_like(rows).T, rows)
    else:
        add_second_moments(total, rows.sqrt(), rows.sqrt())
    assert abs(total[0, 1].item() / (long * float(rows[0, 0]) ** 2) - 1) < 1e-6


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (33, 70), (0, 4)])
def test_filter(hard, shape):
    c, rho = draw(*shape).double(), draw(*shape, seed=1).double().square()
    found = filter_coefficients(c.T, rho.T, 0.3, hard).T
    leaves = c * torch.where(0.3 * rho >= 1, 0.0, 1.0) if hard else c / (1 + 0.3 * rho)
    assert torch.allclose(c - found, leaves, rtol=1e-14, atol=1e-15)
    dispatch.use("torch", CPU)
    assert torch.equal(found, filter_coefficients(c, rho, 0.3, hard))


PAIRS = [(r, f) for r in dispatch.NARROW for f in dispatch.NARROW]


@pytest.mark.parametrize(("reference", "finetuned"), PAIRS)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_rebuild_gives_the_bits_of_torch(reference, finetuned, alpha):
    """Every bit pattern that is finite, and sums that overflow."""
    old = random_bits((3000,), reference, 0)
    old = torch.where(old.isfinite(), old, 0).to(reference)
    new = random_bits((3000,), finetuned, 1)
    skill = draw(3000) * torch.logspace(-30, 30, 3000)
    general, delta = rebuild_delta(old, new, skill, alpha)
    kind = BITS[finetuned.itemsize]
    assert torch.equal(general.view(kind), rebuild(old, skill, alpha, finetuned).view(kind))
    assert torch.equal(general.view(kind) ^ delta, new.view(kind)), "XOR gives W_f back, NaN payloads and all"
    assert general.isfinite().all()


def test_rebuild_at_any_alpha_is_within_a_rounding():
    """A GPU fuses multiply and add; the interpreter does not, and may fall on the other side of a tie."""
    old, new, skill = draw(9, 300, dtype=torch.bfloat16), draw(9, 300, seed=1, dtype=torch.bfloat16), draw(9, 300, seed=2)
    general, _ = rebuild_delta(old.T, new.T, skill.T, 0.3)
    exact = old.double() + 0.3 * skill.double()
    assert general.shape == (300, 9)
    assert ((general.T.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-30).all()


def test_rounding_goes_to_even_and_keeps_nan():
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4e38, -3.4e38, NAN, -0.0, 2.0**-133])
    general, _ = rebuild_delta(torch.zeros(7), torch.zeros(7, dtype=torch.bfloat16), ties, 1.0)
    wanted = rebuild(torch.zeros(7), ties, 1.0, torch.bfloat16)
    assert general[:2].tolist() == [1.0, 1 + 2.0**-6]
    assert general[4].isnan()
    keep = torch.arange(7) != 4
    assert torch.equal(general[keep].view(torch.int16), wanted[keep].view(torch.int16))


def test_offsets_beyond_two_billion_elements():
    """Three rows 2³⁰ elements apart, in memory that is reserved and hardly touched."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((3, 40), (2**30, 1))
    far.copy_(draw(3, 40))
    total = torch.zeros(40, 40)
    add_covariance(total, far)
    assert torch.allclose(total, (far.float().T @ far.float()).triu(), atol=1e-4)
    found = update_sketch(far, torch.zeros_like(far), torch.eye(40))
    assert torch.equal(found, far.float())
    add_second_moments(total.zero_(), far, far)
    assert torch.allclose(total, far.float().square().T @ far.float().square(), rtol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 9), (17, 17), (3, 20), (20, 3)])
def test_every_tile_is_listed_once(rows, columns):
    every = {tuple(t) for t in tiles(rows, columns, CPU).tolist()}
    assert every == {(r, c) for r in range(rows) for c in range(columns)}
    assert len(tiles(rows, columns, CPU)) == rows * columns
    if rows == columns:
        upper = tiles(rows, columns, CPU, upper=True).tolist()
        assert len(upper) == rows * (rows + 1) // 2
        assert {tuple(t) for t in upper} == {(r, c) for r in range(rows) for c in range(r, columns)}
