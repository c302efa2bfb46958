"""The command as a user meets it: plain and low-rank training, what it says, and bad input."""

import json
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import files, llama, private


def test_plain_training_keeps_nothing_apart_and_says_so(place, tmp_path, cli):
    out = tmp_path / "out"
    common = ("--data", place / "rows.npy", "--steps", 3, "--seq-len", 16, "-j", 1)
    code, stdout, err = cli("tune", place / "base", "--method", "full", *common, "-o", out)
    assert (code, stdout) == (0, f"{out}\n")
    assert "nothing is kept apart" in err and "loss" in err
    found = files(out)
    assert "memory.safetensors" not in found and "README.md" in found
    assert found["config.json"] == files(place / "base")["config.json"]
    manifest = json.loads(found["liborth.manifest.json"])
    assert {entry["name"] for entry in manifest["outputs"]} == set(found) - {"liborth.manifest.json"}
    assert str(tmp_path) not in found["liborth.manifest.json"].decode() and manifest["memory"] is False
    code, stdout, _ = cli("split", place / "base", out, "--rank", 2, "-o", tmp_path / "apart", "-j", 1)
    assert code == 0
    again = tmp_path / "again"
    (place / "base" / "modeling.py").write_text("")
    err = cli("tune", place / "base", "--method", "full", *common, "-o", again)[2]
    assert files(again) == found and "not copied from beside the weights: modeling.py (code)" in err
    (place / "base" / "modeling.py").unlink()


def test_tied_weights_stay_tied_even_when_both_are_stored(tmp_path, tune):
    base = llama(tmp_path / "tied", tie=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    tuned = load_file(tune("full", base=base) / "model.safetensors")
    assert torch.equal(tuned["lm_head.weight"], tuned["model.embed_tokens.weight"])
    assert not torch.equal(tuned["lm_head.weight"], tensors["lm_head.weight"])


def test_low_rank_training_is_what_peft_says(tune, place):
    pytest.importorskip("peft")
    out = tune("lora", "--rank", 3, "--targets", "q_proj", "--targets", "down_proj")
    base, tuned = load_file(place / "base" / "model.safetensors"), load_file(out / "model.safetensors")
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert moved == {name for name in base if "q_proj" in name or "down_proj" in name}
    assert all(int(torch.linalg.matrix_rank(tuned[n] - base[n], rtol=1e-4)) == 3 for n in moved)


def test_without_peft_lora_says_so_in_one_line(tune, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    for words in (("lora",), ("sinks", "--general", "lora", "--memory-learns", "all")):
        err = tune(*words, code=2)
        assert err.startswith("error: LoRA needs peft") and err.count("\n") == 1


def test_the_memory_lies_in_a_private_directory(tune, place, cli, tmp_path):
    secret = ("sinks", "--sinks", 4, "--private-data", place / "secret.npy")
    out, other = tune(*secret), tmp_path / "elsewhere"
    assert not [name for name in files(out) if "memory" in name or "state" in name]
    assert stat.S_IMODE(private(out).stat().st_mode) == 0o700
    for file in private(out).iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert {"memory.safetensors", "liborth.private.json", ".gitignore", "README.md"} == set(files(private(out)))
    assert "memory" not in json.dumps(json.loads((out / "liborth.manifest.json").read_text())["outputs"])
    moved = tune(*secret, "--memory-out", other, name="moved")
    assert files(moved)["model.safetensors"] == files(out)["model.safetensors"] and not private(moved).exists()
    assert files(other)["memory.safetensors"] == files(private(out))["memory.safetensors"]
    assert cli("excise", moved, "--beta", 1, "--memory", other, "-o", tmp_path / "with")[0] == 0
    assert cli("excise", out, "--beta", 1, "-o", tmp_path / "same")[0] == 0
    assert files(tmp_path / "with")["model.safetensors"] == files(tmp_path / "same")["model.safetensors"]
    assert "must lie" in tune("full", "--memory-out", place / "base" / "x", name="bad", code=6)


def test_a_dry_run_writes_nothing(cli, place, tmp_path):
    words = ("--data", place / "rows.npy", "--epochs", 2, "--seq-len", 16, "--batch-size", 6, "-o", tmp_path / "out", "--json")
    code, out, _ = cli("tune", place / "base", "--method", "full", *words, "--dry-run")
    document = json.loads(out)
    assert code == 0 and (document["rows"], document["steps"]) == (12, 4)
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line_and_leaves_nothing(cli, place, tmp_path):
    (tmp_path / "words.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "broken.jsonl").write_text("{")
    np.save(tmp_path / "high.npy", np.full((2, 5), 64))
    np.save(tmp_path / "short.npy", np.zeros((3, 1), int))
    rows = place / "rows.npy"
    cases = [
        (3, "tokenizer", ("--data", tmp_path / "words.jsonl")),
        (3, "not JSON", ("--data", tmp_path / "broken.jsonl")),
        (4, "token id 64", ("--data", tmp_path / "high.npy")),
        (3, "nothing to learn", ("--data", tmp_path / "short.npy")),
        (3, "no such file", ("--data", tmp_path / "nowhere.txt")),
        (2, "context of 64", ("--data", rows, "--seq-len", 65)),
        (3, "--truncate", ("--data", rows, "--seq-len", 5)),
        (2, "--lr is positive", ("--data", rows, "--lr", 0)),
        (2, "held out", ("--data", rows, "--patience", 2)),
        (2, "--router goes with --method sinks", ("--data", rows, "--router")),
        (6, "outside the input", ("--data", rows, "-o", place / "base" / "out")),
    ]
    before = {path.name for path in tmp_path.iterdir()}
    for code, text, words in cases:
        out = () if "-o" in words else ("-o", tmp_path / "out")
        found, stdout, err = cli("tune", place / "base", "--method", "full", *words, *out, "-j", 1)
        assert (found, stdout) == (code, "") and text in err, err
        assert [line.startswith("error: ") for line in err.splitlines()] == [True]
        assert {path.name for path in tmp_path.iterdir()} == before
