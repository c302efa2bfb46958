"""fp8 with block scales: read as numbers, divided, rounded under the same scales, and back bit for bit."""

import json
import shutil
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import files, llama

from liborth_cli.checkpoint.blockscaled import BlockScaled, decoded
from liborth_cli.checkpoint.reader import Checkpoint

BLOCK, LARGEST = 16, 448.0
FP8 = torch.float8_e4m3fn


def expand(scales, shape):
    return scales.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]


def quantise(weight):
    """Codes and scales of one matrix, the largest of each block at the largest code."""
    rows, cols = (-(-side // BLOCK) for side in weight.shape)
    padded = torch.zeros(rows * BLOCK, cols * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    scales = padded.view(rows, BLOCK, cols, BLOCK).abs().amax((1, 3)) / LARGEST
    return (weight / expand(scales, weight.shape)).to(FP8), scales


def to_fp8(folder, out):
    """Store the matrices inside the blocks as codes and scales, as DeepSeek-V3 does; return what they mean."""
    shutil.copytree(folder, out)
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.dim() == 2 and ".layers." in name:
            codes, scales = quantise(weight)
            stored |= {name: codes, name.replace(".weight", ".weight_scale_inv"): scales}
            meant[name] = codes.float() * expand(scales, weight.shape)
        else:
            stored[name] = meant[name] = weight
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    how = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    return meant


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pair in float32, the same in fp8, and what the fp8 one means, written in float32."""
    folder = tmp_path_factory.mktemp("fp8")
    base = llama(folder / "base", intermediate_size=40)
    shutil.copytree(base, folder / "finetuned")
    draw = torch.Generator().manual_seed(1)
    tuned = load_file(base / "model.safetensors")
    tuned = {n: w + 0.03 * torch.randn(w.shape, generator=draw) if w.dim() == 2 else w for n, w in tuned.items()}
    save_file(tuned, folder / "finetuned" / "model.safetensors", metadata={"format": "pt"})
    for side in ("base", "finetuned"):
        meant = to_fp8(folder / side, folder / f"{side}-fp8")
        shutil.copytree(folder / side, folder / f"{side}-meant")
        save_file(meant, folder / f"{side}-meant" / "model.safetensors", metadata={"format": "pt"})
    np.save(folder / "rows.npy", np.random.default_rng(0).integers(3, 64, (4, 12)))
    return folder


def test_numbers_are_decoded_and_bytes_are_not(pair):
    meant = load_file(pair / "finetuned-meant" / "model.safetensors")
    with Checkpoint.open(pair / "finetuned-fp8") as stored:
        numbers = decoded(stored)
        assert isinstance(numbers, BlockScaled) and len(numbers.scales) == 14 and "quantization_config" not in numbers.config
        for name, weight in meant.items():
            assert torch.equal(numbers.load(name), weight), name
            assert torch.equal(numbers.load_elements(name, 7, 29), weight.reshape(-1)[7:29]), name
            assert np.array_equal(numbers.read(name), stored.read(name))
            if name in numbers.scales:
                bits = stored.read(name)
                assert np.array_equal(numbers.encode(name, numbers.load(name).view(-1), 0, bits), bits)
    with Checkpoint.open(pair / "finetuned") as plain:
        assert decoded(plain) is plain


def test_without_the_flag_the_layers_pass_through_and_the_flag_is_named(pair, cli, tmp_path):
    code, _, err = cli("split", pair / "base-fp8", pair / "finetuned-fp8", "--rank", 2, "-o", tmp_path / "out")
    assert code == 0 and "14 quantised layers (fp8) pass through whole" in err and "--requantise divides those" in err, err
    got, tuned = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", pair / "finetuned-fp8"))
    assert all(torch.equal(got[n].view(torch.uint8), t.view(torch.uint8)) for n, t in tuned.items() if ".layers." in n)
    code, _, err = cli("split", pair / "base", pair / "finetuned", "--rank", 2, "--requantise", "-o", tmp_path / "no")
    assert code == 2 and "no fp8 layer with block scales" in err, err


@pytest.mark.parametrize("base", ["base-fp8", "base"])
def test_it_is_divided_as_numbers_and_comes_back_bit_for_bit(pair, cli, tmp_path, base):
    words = ("--method", "svd", "--svd", "exact", "--rank", 2)
    code, _, err = cli("split", pair / base, pair / "finetuned-fp8", *words, "--requantise", "-o", tmp_path / "out")
    assert code == 0 and "each by the edit" in err, err
    numbers = pair / base.replace("fp8", "meant")
    assert cli("split", numbers, pair / "finetuned-meant", *words, "-o", tmp_path / "numbers")[0] == 0
    wanted = load_file(tmp_path / "numbers" / "model.safetensors")
    facts = json.loads((tmp_path / "out" / "liborth.manifest.json").read_text())["tensors"]
    with Checkpoint.open(tmp_path / "out") as out, Checkpoint.open(pair / "finetuned-fp8") as old:
        general, tuned = decoded(out), decoded(old)
        for name, scale in general.scales.items():
            assert np.array_equal(general.read(scale), tuned.read(scale))
            got, before, plain = general.load(name), tuned.load(name), wanted[name]
            codes = plain / expand(general.load(scale), got.shape)
            inside = codes.abs() <= LARGEST
            exponent = torch.floor(torch.log2(codes.abs().clamp_min(2.0**-6)))
            step = expand(general.load(scale), got.shape) * 2.0 ** (exponent - 3)
            assert ((got - plain).abs() <= 0.5001 * step + 1e-7)[inside].all(), name
            moved = got != before
            assert int(moved.sum()) == facts[name]["codes_changed"] > 0
            assert ((plain - before).abs()[moved] > 0).all()
            assert facts[name]["edit_norm"] == pytest.approx(float((before - plain).norm()), rel=1e-3)
            assert facts[name]["edit_rounding_norm"] == pytest.approx(float((got - plain).norm()), rel=2e-2)
    assert cli("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "back")[0] == 0
    assert files(tmp_path / "back")["model.safetensors"] == files(pair / "finetuned-fp8")["model.safetensors"]
    assert cli("verify", tmp_path / "out", "--integrity")[0] == 0
    code, _, err = cli(
        "excise", tmp_path / "out", "--alpha", 0.5, "--reference", pair / base, "--beta", 0, "-o", tmp_path / "no"
    )
    assert code == 2 and "rounded fp8 codes" in err, err


def test_half_of_the_memory_lies_half_way(pair, cli, tmp_path):
    words = ("--method", "scale", "--scale", 0.0, "--requantise", "-q")
    assert cli("split", pair / "base-fp8", pair / "finetuned-fp8", *words, "-o", tmp_path / "out")[0] == 0
    assert cli("excise", tmp_path / "out", "--beta", 0.5, "-o", tmp_path / "half")[0] == 0
    with ExitStack() as stack:
        places = (tmp_path / "out", pair / "finetuned-fp8", tmp_path / "half")
        general, tuned, half = (decoded(stack.enter_context(Checkpoint.open(place))) for place in places)
        for name, scale in general.scales.items():
            middle = (general.load(name) + tuned.load(name)) / 2
            assert ((half.load(name) - middle).abs() <= 17 * expand(general.load(scale), middle.shape)).all(), name


def test_what_is_kept_whole_keeps_every_code(pair, cli, tmp_path):
    """A tensor of which nothing is removed has the fine-tuned codes: rounding alone changes none."""
    words = ("--method", "scale", "--scale", 1.0, "--requantise", "-q")
    assert cli("split", pair / "base", pair / "finetuned-fp8", *words, "-o", tmp_path / "out")[0] == 0
    got, tuned = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", pair / "finetuned-fp8"))
    assert all(torch.equal(got[n].view(torch.uint8), t.view(torch.uint8)) for n, t in tuned.items() if t.dtype == FP8)


def test_rounding_is_told_apart_from_learning(pair, cli, tmp_path):
    """Of a pair that differs by rounding alone, the split says so."""
    words = ("--method", "scale", "--scale", 0.5, "--requantise")
    code, _, err = cli("split", pair / "finetuned", pair / "finetuned-fp8", *words, "-o", tmp_path / "out")
    assert code == 0, err
    share = int(err.split("rounding to fp8 alone explains ")[1].split("%")[0])
    assert 60 <= share <= 100, err


def test_curvature_and_verify_read_the_numbers(pair, cli, tmp_path):
    found = {}
    for kind in ("fp8", "meant"):
        words = ("--data", pair / "rows.npy", "-o", tmp_path / kind, "-q")
        code, _, err = cli("curvature", pair / f"finetuned-{kind}", "--reference", pair / f"base-{kind}", "--at", 0.5, *words)
        assert code == 0, err
        found[kind] = json.loads((tmp_path / kind / "liborth.manifest.json").read_text())["totals"]["loss"]
    assert found["fp8"] == pytest.approx(found["meant"], abs=1e-6)
    for kind in ("fp8", "meant"):
        sides = (
            "--reference",
            pair / f"base-{kind}",
            "--finetuned",
            pair / f"finetuned-{kind}",
            "--retain-data",
            pair / "rows.npy",
        )
        words = ("--retain-data", pair / "rows.npy", "--controls", "--no-require", "--out", tmp_path / f"{kind}.json", "-q")
        code, _, err = cli("verify", pair / f"finetuned-{kind}", *sides, *words)
        assert code == 0, err
        results = json.loads((tmp_path / f"{kind}.json").read_text())["results"]
        found[kind] = next(r for r in results if r["check"] == "controls")["metrics"]["retain_loss"]["value"]
    assert found["fp8"] == pytest.approx(found["meant"], abs=1e-6)


def test_transformers_own_loader_reads_the_same_numbers(cli, tmp_path):
    pytest.importorskip("accelerate")  # Transformers wants it for this format
    llama(tmp_path / "plain")
    to_fp8(tmp_path / "plain", tmp_path / "fp8")
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(3, 64, (3, 12)))
    words = ("--loads", "--no-require", "--retain-data", tmp_path / "rows.npy")
    code, out, _ = cli("verify", tmp_path / "fp8", *words)
    assert code == 0 and "Transformers' own loader gives the losses measured here" in out, out
