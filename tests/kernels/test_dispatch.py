"""Who computes an op: the rules of `choose`, and the option that reaches it."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from liborth_kernels import dispatch
from liborth_kernels.covariance import add_covariance
from tiny import pair

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def restore():
    yield
    dispatch.use("torch", CPU)


def test_torch_and_auto_on_the_cpu_take_no_kernel():
    for asked, device in (("torch", CPU), ("torch", GPU), ("auto", CPU)):
        assert set(dispatch.choose(asked, device).ops.values()) == {"torch"}


def test_auto_takes_only_what_was_measured_to_be_faster(monkeypatch):
    assert set(dispatch.choose("auto", GPU).ops.values()) == {"torch"}, "nothing is proven yet (docs/kernels.md)"
    monkeypatch.setattr(dispatch, "PROVEN", {"add_covariance": "a measurement"})
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.7.1"))
    taken = dispatch.choose("auto", GPU).ops
    assert [op for op, who in taken.items() if who == "triton"] == ["add_covariance"]


def test_auto_falls_back_and_says_so(monkeypatch):
    monkeypatch.setattr(dispatch, "PROVEN", {"add_covariance": "a measurement"})
    monkeypatch.setitem(sys.modules, "triton", None)
    choice = dispatch.choose("auto", GPU)
    assert set(choice.ops.values()) == {"torch"}
    assert "not installed" in choice.note


def test_an_explicit_choice_runs_or_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.7.1"))
    assert set(dispatch.choose("triton", GPU).ops.values()) == {"triton"}
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(dispatch.KernelsUnavailable, match="not installed"):
        dispatch.choose("triton", GPU)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.2.0"))
    with pytest.raises(dispatch.KernelsUnavailable, match="or later, not 3"):
        dispatch.choose("triton", GPU)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.7.1"))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(dispatch.KernelsUnavailable, match="NVIDIA GPU"):
        dispatch.choose("triton", CPU)
    with pytest.raises(ValueError, match="auto, triton or torch"):
        dispatch.choose("cuda", GPU)


def test_a_gpu_without_full_float32_products_leaves_the_certified_ops_to_torch(monkeypatch):
    """What Triton 3.7 compiles "ieee" to for sm_100: test_compile.py."""
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.7.1"))
    monkeypatch.setattr(dispatch, "_capability", lambda _: 10)
    choice = dispatch.choose("triton", GPU)
    assert {op for op, who in choice.ops.items() if who == "torch"} == {"update_gram", "update_sketch"}
    assert "update_gram and update_sketch" in choice.note


def test_every_op_has_a_kernel_that_is_reached_and_a_precision_where_it_multiplies():
    assert set(dispatch.PRECISION) <= set(dispatch.OPS)
    assert set(dispatch.PRECISION.values()) <= {"ieee", "tf32x3", "bf16x3"}
    assert set(dispatch.PROVEN) <= set(dispatch.OPS)
    assert dispatch.PRECISION["update_gram"] == "ieee", "a certificate rests on it"


def test_float64_is_torchs(monkeypatch):
    pytest.importorskip("triton")
    from liborth_kernels import syrk_triton

    dispatch.use("triton", CPU)
    monkeypatch.setattr(syrk_triton, "syrk", lambda *_: pytest.fail("float64 went to a kernel"))
    total, rows = torch.zeros(3, 3, dtype=torch.float64), torch.ones(2, 3)
    add_covariance(total, rows)
    assert total[0, 1] == 2


def test_explicit_triton_without_a_gpu_is_a_usage_error(cli, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    base, finetuned = pair(tmp_path)
    code, _, err = cli("split", base, finetuned, "--rank", 2, "--kernels", "triton", "--device", "cpu", "-o", tmp_path / "out")
    assert code == 2
    assert err.count("\n") == 1
    assert "--kernels triton" in err
    assert not (tmp_path / "out").exists()


def test_split_in_the_interpreter_is_recorded_and_comes_back(cli, tmp_path):
    """Also from two threads, which the interpreter alone would not survive; with the bits that torch gives."""
    pytest.importorskip("triton")
    base, finetuned = pair(tmp_path, torch.bfloat16)
    for kernels in ("triton", "torch"):
        code, _, err = cli("split", base, finetuned, "--rank", 3, "--kernels", kernels, "-j", 2, "-o", tmp_path / kernels)
        assert code == 0, err
        manifest = json.loads((tmp_path / kernels / "liborth.manifest.json").read_text())
        assert set(manifest["machine"]["kernels"].values()) == {kernels}
    for name in ("model.safetensors", "memory.safetensors"):
        assert (tmp_path / "triton" / name).read_bytes() == (tmp_path / "torch" / name).read_bytes()
    assert cli("excise", tmp_path / "triton", "--beta", 1, "-o", tmp_path / "back")[0] == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (finetuned / "model.safetensors").read_bytes()
