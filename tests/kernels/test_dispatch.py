"""Who computes an op: the rules of `choose`, and the option that reaches it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
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
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0"))
    taken = {op for op, who in dispatch.choose("auto", GPU).ops.items() if who == "triton"}
    assert taken == set(dispatch.KERNELS), "what does not beat torch is not kept"
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    for op in taken:
        assert dispatch.KERNELS[op].proven
        assert f"| `{op}` |" in page.partition("## Measured")[2], "the measurement stands in docs/kernels.md"
    monkeypatch.setattr(dispatch, "KERNELS", {"add_covariance": dispatch.Kernel("bf16x3")})
    assert dispatch.choose("auto", GPU).ops == {"add_covariance": "torch"}


def test_auto_falls_back_and_says_so(monkeypatch):
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


def test_products_are_made_in_a_precision_that_is_named():
    assert {kernel.precision for kernel in dispatch.KERNELS.values()} <= {"", "bf16x3"}


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
    for folder, name in (("", "model.safetensors"), (".private", "memory.safetensors")):
        triton, torch_ = (tmp_path / f"{kernels}{folder}" / name for kernels in ("triton", "torch"))
        assert triton.read_bytes() == torch_.read_bytes()
    assert cli("excise", tmp_path / "triton", "--beta", 1, "-o", tmp_path / "back")[0] == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (finetuned / "model.safetensors").read_bytes()


TOY = """
import torch
import triton
import triton.language as tl

from liborth_kernels.dispatch import interpreted, kernel_for, on


@triton.jit
def _double(out, x, size, BLOCK: tl.constexpr):
    here = tl.arange(0, BLOCK)
    tl.store(out + here, tl.load(x + here, mask=here < size) * 2, mask=here < size)


def double(x):
    if not kernel_for("double", x):
        return x * 2
    out = torch.empty_like(x)
    with on(x.device):
        _double[(1,)](out, x, x.numel(), BLOCK=16)
    return out
"""


def test_a_new_kernel_is_its_file_and_one_line(cli, tmp_path, monkeypatch):
    """What docs/contributing.md promises: the command line chooses it, it computes, and the manifest says who did."""
    pytest.importorskip("triton")
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "toy_double.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path / "toy")
    monkeypatch.setitem(dispatch.KERNELS, "double", dispatch.Kernel())
    base, finetuned = pair(tmp_path)
    for kernels in ("triton", "torch"):
        code, _, err = cli("split", base, finetuned, "--rank", 3, "--kernels", kernels, "-o", tmp_path / kernels)
        assert code == 0, err
        manifest = json.loads((tmp_path / kernels / "liborth.manifest.json").read_text())
        assert manifest["machine"]["kernels"]["double"] == kernels
        toy = importlib.import_module("toy_double")
        assert toy.double(torch.arange(5.0)).tolist() == [0, 2, 4, 6, 8]
