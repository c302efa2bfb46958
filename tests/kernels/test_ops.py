"""Each op against float64, over odd shapes, strides and dtypes."""

import importlib

import liborth_kernels.gram as gram_module
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from liborth_kernels import fortran, interpolate_numpy
from liborth_kernels.gram import gram
from liborth_kernels.interpolate import interpolate
from liborth_kernels.rebuild import rebuild
from liborth_kernels.rounding import round_to
from liborth_kernels.update import update
from tiny import FLOATS, random_bits

from liborth_cli.linalg.truncated import energy

SHAPES = [(1, 1), (3, 5), (5, 3), (257, 129), (300, 1), (700, 33)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, None), (torch.float32, torch.float64), (torch.float64, None)])
def test_gram(shape, dtype, wide):
    u = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    short = u if shape[0] <= shape[1] else u.T
    exact = short.double() @ short.double().T
    found = gram(u, wide)
    assert found.dtype == (wide or dtype)
    assert torch.equal(found, found.T)
    assert torch.allclose(found.double(), exact, rtol=1e-4, atol=1e-3 if found.dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("shape", [(50, 9), (9, 50)])
def test_gram_over_several_blocks(shape, monkeypatch):
    monkeypatch.setattr(gram_module, "BLOCK", 7)
    u = torch.randn(shape)
    short = u.double() if shape[0] <= shape[1] else u.double().T
    assert torch.allclose(gram(u, torch.float64), short @ short.T, atol=1e-12)


def test_half_a_gram_has_the_upper_triangle():
    u = torch.randn(70, 300, generator=torch.Generator().manual_seed(0))
    half = gram(u, both=False)
    assert torch.equal(half.triu(), gram(u).triu())
    assert not half.tril(-1).any()


def test_scipy_can_still_be_imported_whole():
    """Its BLAS and LAPACK pointers were loaded without the package around them."""
    import scipy.linalg

    assert [importlib.import_module(f"scipy.linalg.{name}") for name in ("cython_blas", "cython_lapack")] == [*fortran.MODULES]
    assert scipy.linalg.eigvalsh([[2.0, 0.0], [0.0, 1.0]]).tolist() == [1.0, 2.0]


def test_nothing_is_written_to_the_inputs():
    for dtype in (torch.float32, torch.float64):
        u = torch.randn(9, 5, dtype=dtype)
        before = u.clone()
        energy(u), gram(u), round_to(u, dtype), rebuild(u, u, 0.5, dtype), interpolate(u, u, 0.5, u, 0.5)
        assert torch.equal(u, before)


@pytest.mark.parametrize("dtype", FLOATS)
def test_update_is_formed_wide(dtype):
    a, b = (torch.randn(1000, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1))
    out = torch.full((1000,), float("nan"), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(update(a, b, out), a.to(out.dtype) - b.to(out.dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_rebuild_rounds_once(dtype):
    reference = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    skill = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    wide = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
    assert torch.equal(rebuild(reference, skill, 0.5, dtype), (reference.to(wide) + 0.5 * skill.to(wide)).to(dtype))


@pytest.mark.parametrize("dtype", [d for d in FLOATS if d != torch.float64])
def test_rounding_saturates(dtype):
    limit = torch.finfo(dtype).max
    huge = torch.tensor([1e300, -1e300], dtype=torch.float64)
    assert round_to(huge, dtype).double().tolist() == [limit, -limit]


@pytest.mark.parametrize("dtype", FLOATS)
def test_interpolate_meets_its_ends(dtype):
    """β = 0 and β = 1 by arithmetic give the same values as the copies that excise makes: no jump at the ends."""
    g, f = (torch.randn(4000, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1))
    assert torch.equal(interpolate(g, f, 0.0).double(), g.double())
    ends = interpolate(g, f, 1.0).double()
    assert torch.equal(ends, f.double()) if dtype != torch.float64 else torch.allclose(ends, f, rtol=1e-15)


def test_interpolate_alpha_moves_the_skill():
    r, g, f = torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([10.0])
    assert interpolate(g, f, 0.0, r, 0.5).item() == 2.0
    assert interpolate(g, f, 1.0, r, 0.0).item() == 8.0


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F32", torch.float32), ("F64", torch.float64)])
@given(seed=st.integers(0, 10**6), beta=st.floats(-3, 3))
def test_numpy_twin_gives_the_bits_of_the_torch_op(name, dtype, seed, beta):
    g, f = random_bits((512,), dtype, seed), random_bits((512,), dtype, seed + 1)
    finite = (g.abs().double() < 1e30) & (f.abs().double() < 1e30)
    g, f = torch.where(finite, g, 0).to(dtype), torch.where(finite, f, 0).to(dtype)
    raw = [t.view(torch.uint8).numpy() for t in (g, f)]
    expected = interpolate(g, f, beta).view(torch.uint8).numpy()
    assert np.array_equal(interpolate_numpy.interpolate(*raw, beta, name), expected)
