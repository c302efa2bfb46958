"""Symmetric factors are stored as triangles: half the bytes, the same numbers, and sets from before are read."""

import pytest
import torch
from elsewhere import GPU, Elsewhere
from safetensors.torch import load_file, save_file
from tiny import llama

from liborth_cli.cli.main import app
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.triangles import PACKED, pack, unpack, whole_shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (3, 5, 5)])
def test_packing_loses_nothing(shape, dtype):
    whole = torch.randn(shape).to(dtype)
    whole = whole + whole.mT
    packed = pack(whole)
    assert torch.equal(packed, whole[..., torch.ones(shape[-2:], dtype=torch.bool).triu()])
    assert packed.shape == (*shape[:-2], shape[-1] * (shape[-1] + 1) // 2)
    assert whole_shape(tuple(packed.shape)) == shape
    assert torch.equal(unpack(packed), whole)


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (3, 5, 5)])
def test_a_gpu_packs_the_same(shape):
    whole = torch.randn(shape)
    with Elsewhere():
        packed = pack(whole.to(GPU)).cpu()
    assert torch.equal(packed, pack(whole))


@pytest.mark.parametrize("size", [28672, 46341, 128256])
def test_the_size_is_found_again(size):
    assert whole_shape((size * (size + 1) // 2,)) == (size, size)


def test_a_set_is_half_as_large_and_one_from_before_reads_the_same(tmp_path):
    model = llama(tmp_path / "model")
    rows = tmp_path / "rows.npy"
    import numpy as np

    np.save(rows, np.random.default_rng(0).integers(3, 60, (4, 9)))
    out = tmp_path / "set"
    app(["curvature", str(model), "--data", str(rows), "-o", str(out), "-q"], standalone_mode=False)
    with FactorSet.open(out) as found:
        held = {key: found.read(key) for file in found.files for key in found.keys(file)}
        shapes = {key: found.shape(key) for key in held}
    assert {key: tuple(value.shape) for key, value in held.items()} == shapes
    stored = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    square = [key for key, shape in shapes.items() if len(shape) == 2]
    assert square
    assert all(PACKED + key in stored for key in square)
    assert all(torch.equal(held[key], held[key].T) for key in square)
    for file in out.glob("*.safetensors"):
        names = [name.removeprefix(PACKED) for name in load_file(file)]
        save_file({name: held[name].contiguous() for name in names}, file)
    index = out / "factors.safetensors.index.json"
    index.write_text(index.read_text().replace(PACKED, ""))
    with FactorSet.open(out) as before:
        assert all(torch.equal(before.read(key), value) for key, value in held.items())
