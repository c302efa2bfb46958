"""`inspect` as a user meets it: what a path is, where its memory lies, and what a spectrum says."""

import json

import pytest
import torch
from tiny import pair, save, weights

from liborth_cli.inspect import Spectrum


def test_it_says_what_a_path_is(cli, tmp_path):
    base, finetuned = pair(tmp_path, shards=2)
    cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")
    memory = next(tmp_path.rglob("memory-00001-of-00002.safetensors"))
    cases = {
        (base,): ["checkpoint: 7 tensors", "layers.*.up.weight"],
        (base, "-v"): ["layers.0.up.weight", "layers.1.up.weight"],
        (base, finetuned): ["pair: 7 tensors fit", "norm or bias"],
        (tmp_path / "out",): ["made by liborth", "what was kept and removed", "embed.weight"],
        (memory,): ["memory delta", "PRIVATE", "model-00001-of-00002"],
        (tmp_path / "out" / "liborth.manifest.json",): ["rank 4"],
        (base, finetuned, "--profile"): ["spectra of the update", "effective rank"],
        (base, "--profile"): ["spectra of the weights"],
    }
    for words, expected in cases.items():
        code, out, err = cli("inspect", *words)
        assert (code, err) == (0, ""), words
        for text in expected:
            assert text in out, (words, text)
        code, out, _ = cli("inspect", *words, "--json")
        assert json.loads(out)["schema_version"] == 1
    code, out, err = cli("inspect", tmp_path / "nowhere")
    assert (code, out, err.count("\n")) == (3, "", 1)


def test_it_finds_the_memory_of_an_output_and_calls_it_private(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")
    memory = next(tmp_path.rglob("memory.safetensors")).parent
    found = json.loads(cli("inspect", tmp_path / "out", "--json")[1])["memory"]
    assert found["place"] == str(memory) and found["bytes"] > 0
    assert found["beside_the_model"] is (memory == tmp_path / "out")
    _, out, _ = cli("inspect", tmp_path / "out")
    assert "private" in out and str(memory) in out
    code, out, _ = cli("inspect", memory / "memory.safetensors")
    assert code == 0 and "PRIVATE" in out


def test_a_save_without_weights_is_not_called_sound(cli, tmp_path):
    save(tmp_path / "hollow", {"a.weight": torch.zeros(0), "b.weight": torch.ones(4, 4)})
    _, out, _ = cli("inspect", tmp_path / "hollow")
    assert "1 TENSORS ARE EMPTY (first: a.weight)" in out


def test_profile_is_the_spectrum(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    _, out, _ = cli("inspect", base, finetuned, "--profile", "--json")
    found = json.loads(out)["profile"]["layers.0.up.weight"]
    sigma = torch.linalg.svdvals((0.1 * weights(seed=1)["layers.0.up.weight"]).double())
    assert found["norm"] == pytest.approx(sigma.norm().item(), rel=1e-5)
    assert found["top"] == pytest.approx(sigma[0].item(), rel=1e-5)
    assert found["stable_rank"] == pytest.approx((sigma.norm() / sigma[0]).item() ** 2, rel=1e-5)
    assert found["rank_90"] == int((sigma.square().cumsum(0) < 0.9 * sigma.square().sum()).sum()) + 1


def test_a_spectrum_of_nothing_and_of_nan():
    assert Spectrum.of(torch.zeros(3, 4)).rank_99 == 0
    assert Spectrum.of(torch.full((3, 4), float("nan"))).norm != Spectrum.of(torch.zeros(3, 4)).norm


def test_two_checkpoints_are_compared_whatever_their_layout(cli, tmp_path):
    old = weights(torch.bfloat16)
    new = {f"model.{name}": tensor.clone() for name, tensor in old.items()}
    bits = new["model.layers.0.up.weight"].view(torch.int16)
    bits[0, 0] += 3 if bits[0, 0] >= 0 else -3  # three numbers further
    new["model.layers.0.norm.weight"] = old["layers.0.norm.weight"] * 2
    new["model.conv.weight"] = old["conv.weight"].float()
    new["model.embed.weight"] = torch.zeros(41, 16, dtype=torch.bfloat16)
    del new["model.layers.1.up.weight"]
    new["added.weight"] = torch.ones(2, 2)
    save(tmp_path / "a", old, shards=3)
    save(tmp_path / "b", new)
    code, out, err = cli("inspect", "--diff", tmp_path / "a", tmp_path / "b", "--json")
    found = json.loads(out)
    assert (code, err, found["same"]) == (5, "", False)
    told = found["tensors"]
    assert {name: one["fate"] for name, one in told.items()} == {
        "embed.weight": "another shape", "layers.0.up.weight": "changed", "layers.0.down.weight": "same",
        "layers.0.norm.weight": "changed", "layers.0.experts.gate_up": "same", "conv.weight": "changed",
        "layers.1.up.weight": "only in the first", "added.weight": "only in the second",
    }  # fmt: skip
    assert (told["layers.0.up.weight"]["ulp"], told["layers.0.up.weight"]["elements"]) == (3, 1)
    assert told["layers.0.norm.weight"]["relative"] == pytest.approx(1.0) and told["layers.0.norm.weight"]["ulp"] == 128
    assert told["conv.weight"]["relative"] == 0.0 and "ulp" not in told["conv.weight"]
    assert told["conv.weight"]["dtypes"] == ["BF16", "F32"] and told["conv.weight"]["other"] == "model.conv.weight"
    code, out, _ = cli("inspect", "--diff", tmp_path / "a", tmp_path / "b")
    assert code == 5 and "8 tensors: 2 same, 3 changed, 1 another shape" in out and "layers.0.down.weight" not in out


def test_the_same_weights_in_other_files_are_the_same(cli, tmp_path):
    old, _ = pair(tmp_path, torch.float16)
    save(tmp_path / "again", weights(torch.float16, 0), shards=2)
    code, out, _ = cli("inspect", "--diff", old, tmp_path / "again")
    assert code == 0 and out == "7 tensors: the same, bit for bit\n"
    assert cli("inspect", "--diff", old)[0] == 2 and cli("inspect", "--diff", old, old, "--profile")[0] == 2
    nan = {"w.weight": torch.full((3, 4), float("nan"))}
    save(tmp_path / "x", nan)
    save(tmp_path / "y", {"w.weight": -nan["w.weight"]})
    assert cli("inspect", "--diff", tmp_path / "x", tmp_path / "x")[0] == 0
    code, out, _ = cli("inspect", "--diff", tmp_path / "x", tmp_path / "y", "--json")
    assert code == 5 and "relative" not in json.loads(out)["tensors"]["w.weight"]
