"""The main job on real files: exact where it promises to be exact, and loadable by those who load."""

import hashlib
import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import FLOATS, OWNGPT, files, llama, pair, random_bits, reseal, save, weights

from liborth_cli import manifest


def weight_files(folder):
    return {name: raw for name, raw in files(folder).items() if name.startswith("model")}


def load(folder):
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shards", [1, 3])
def test_beta_one_returns_the_same_files(cli, tmp_path, dtype, shards):
    base, finetuned = pair(tmp_path, dtype, shards, step=0.5)
    assert cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")[0] == 0
    assert cli("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "one")[0] == 0
    assert weight_files(tmp_path / "one") == weight_files(finetuned)
    assert weight_files(tmp_path / "out") != weight_files(finetuned)
    assert set(load(tmp_path / "out")) == set(load(finetuned))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 10**6),
    shards=st.integers(1, 2),
    method=st.sampled_from(["svd", "random"]),
)
def test_any_bits_come_back(cli, tmp_path_factory, dtype, seed, shards, method):
    """Vectors of random bits (NaN payloads, −0.0, infinities) change sides; matrices of random finite bits are split."""
    folder = tmp_path_factory.mktemp("bits")
    sides = []
    for offset in (0, 1):
        matrix = random_bits((6, 5), dtype, seed + 7 * offset)
        matrix = torch.where(torch.isfinite(matrix.float()) & (matrix.float().abs() < 1e15), matrix.float(), 0.0).to(dtype)
        sides.append(
            {
                "a.norm": random_bits((11,), dtype, seed + offset),
                "a.weight": matrix,
                "b.bias": random_bits((3,), dtype, seed + 3 + offset),
            }
        )
    base, finetuned = (save(folder / n, t, shards) for n, t in zip(("base", "finetuned"), sides, strict=True))
    amount = ("--rank", 2) if method == "svd" else ("--energy", 0.5)
    code, _, err = cli("split", base, finetuned, "--method", method, *amount, "--vectors", "memory", "-o", folder / "out")
    assert code == 0, err
    assert cli("excise", folder / "out", "--beta", 1, "-o", folder / "one")[0] == 0
    assert weight_files(folder / "one") == weight_files(finetuned)
    assert cli("excise", folder / "out", "--beta", 0, "-o", folder / "zero")[0] == 0
    assert weight_files(folder / "zero") == weight_files(folder / "out")
    old, general = sides[0], load(folder / "zero")
    assert general["a.norm"].view(torch.uint8).tolist() == old["a.norm"].view(torch.uint8).tolist()


def test_the_shipped_pair(cli, tmp_path):
    assert cli("split", OWNGPT / "base", OWNGPT / "finetuned", "--rank", 8, "-o", tmp_path / "out")[0] == 0
    for beta in (0, 1):
        assert cli("excise", tmp_path / "out", "--beta", beta, "-o", tmp_path / str(beta))[0] == 0
    restored, finetuned = files(tmp_path / "1"), files(OWNGPT / "finetuned")
    assert {name: restored[name] for name in finetuned} == finetuned
    assert not (tmp_path / "0.private").exists()
    assert weight_files(tmp_path / "0") == weight_files(tmp_path / "out")


@pytest.mark.parametrize("tie", [True, False])
def test_transformers_loads_every_output(cli, tmp_path, tie):
    from transformers import AutoModelForCausalLM

    base, finetuned = llama(tmp_path / "base", 0, tie), llama(tmp_path / "finetuned", 1, tie)
    assert cli("split", base, finetuned, "--energy", 0.8, "-o", tmp_path / "out", "--out-shard-size", "20kB")[0] == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    ids = torch.arange(12)[None]
    for beta in (0, 0.5, 1):
        assert cli("excise", tmp_path / "out", "--beta", beta, "-o", tmp_path / str(beta))[0] == 0
        model, report = AutoModelForCausalLM.from_pretrained(tmp_path / str(beta), output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert torch.isfinite(model(ids, labels=ids).loss)
    exact = AutoModelForCausalLM.from_pretrained(finetuned).state_dict()
    assert all(torch.equal(t, exact[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("beta", [-0.5, 0.3, 1.7])
def test_between_and_beyond(cli, tmp_path, dtype, beta):
    base, finetuned = pair(tmp_path, dtype, step=0.5)
    cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")
    assert cli("excise", tmp_path / "out", f"--beta={beta}", "-o", tmp_path / "mix")[0] == 0
    general, new, mixed = load(tmp_path / "out"), load(finetuned), load(tmp_path / "mix")
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    for name in mixed:
        g, f = general[name].to(wide), new[name].to(wide)
        assert torch.equal(mixed[name].float(), (g + beta * (f - g)).to(dtype).float()), name


def test_alpha_scales_the_skill(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    cli("split", base, finetuned, "--rank", 4, "--alpha", 0.5, "-o", tmp_path / "half")
    cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "full")
    out = tmp_path / "scaled"
    assert cli("excise", tmp_path / "half", "--beta", 0, "--alpha", 1, "--reference", base, "-o", out)[0] == 0
    full, scaled = load(tmp_path / "full"), load(out)
    assert all(torch.allclose(full[name], scaled[name], atol=1e-6) for name in full)
    code, _, err = cli("excise", tmp_path / "half", "--beta", 0, "--alpha", 1, "-o", tmp_path / "x")
    assert (code, "needs --reference" in err) == (2, True)
    code, _, err = cli("excise", tmp_path / "half", "--beta", 0, "--alpha", 1, "--reference", finetuned, "-o", tmp_path / "x")
    assert (code, "not the reference this split was made from" in err) == (4, True)
    assert not (tmp_path / "x").exists()


def test_untouched_tensors_are_byte_identical_and_cost_no_memory(cli, tmp_path):
    old, new = weights(torch.bfloat16), weights(torch.bfloat16)
    new["layers.0.up.weight"] = weights(torch.bfloat16, 5)["layers.0.up.weight"]
    save(tmp_path / "base", old), save(tmp_path / "finetuned", new)
    cli("split", tmp_path / "base", tmp_path / "finetuned", "--rank", 4, "-o", tmp_path / "out")
    general = load(tmp_path / "out")
    assert all(torch.equal(general[name], old[name]) for name in old if name != "layers.0.up.weight")
    kept = [name for name in load_file(tmp_path / "out.private" / "memory.safetensors") if name.startswith("xor/")]
    assert kept == ["xor/layers.0.up.weight"]


def test_stacks_are_split_matrix_by_matrix(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    cli("split", base, finetuned, "--rank", 2, "-o", tmp_path / "out")
    old, new, general = load(base), load(finetuned), load(tmp_path / "out")
    name = "layers.0.experts.gate_up"
    for expert in range(3):
        left, sigma, right = torch.linalg.svd((new[name] - old[name])[expert])
        best = old[name][expert] + (left[:, :2] * sigma[:2]) @ right[:2]
        assert torch.allclose(general[name][expert], best, atol=1e-5)
    kernel = (general["conv.weight"] - old["conv.weight"]).reshape(8, 36)
    assert (torch.linalg.svdvals(kernel) > 1e-4).sum() == 2


@pytest.mark.parametrize("side", ["skill", "memory"])
def test_added_rows_and_tensors_go_where_they_are_told(cli, tmp_path, side):
    old, new = weights(), weights(seed=1)
    new["embed.weight"] = torch.cat([new["embed.weight"], torch.full((3, 16), 7.0)])
    new["head.weight"] = torch.ones(2, 16)
    save(tmp_path / "base", old), save(tmp_path / "finetuned", new, shards=2)
    cli("split", tmp_path / "base", tmp_path / "finetuned", "--rank", 4, "--added", side, "-o", tmp_path / "out")
    general = load(tmp_path / "out")
    assert general["embed.weight"].shape == (43, 16)
    assert ("head.weight" in general) == (side == "skill")
    rows = torch.full((3, 16), 7.0) if side == "skill" else old["embed.weight"].mean(0).expand(3, 16)
    assert torch.allclose(general["embed.weight"][40:], rows, atol=1e-6)
    cli("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "one")
    assert weight_files(tmp_path / "one") == weight_files(tmp_path / "finetuned")
    cli("excise", tmp_path / "out", "--beta", 1, "--out-shard-size", "1MB", "-o", tmp_path / "flat")
    assert all(torch.equal(t, new[name]) for name, t in load(tmp_path / "flat").items())


def test_added_rows_stay_what_they_are_when_all_else_is_dropped(cli, tmp_path):
    """The reference has no such rows, and nothing behind its last one may be read for them."""
    old, new = weights(), weights(seed=1)
    new["embed.weight"] = torch.cat([new["embed.weight"], torch.full((3, 16), 7.0)])
    save(tmp_path / "base", old), save(tmp_path / "finetuned", new)
    words = ("--rank", 4, "--for", "embed=drop", "-o", tmp_path / "out")
    assert cli("split", tmp_path / "base", tmp_path / "finetuned", *words)[0] == 0
    general = load(tmp_path / "out")["embed.weight"]
    assert torch.equal(general[:40], old["embed.weight"])
    assert torch.equal(general[40:], new["embed.weight"][40:])
    cli("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "one")
    assert weight_files(tmp_path / "one") == weight_files(tmp_path / "finetuned")


def test_tied_copies_stay_tied(cli, tmp_path):
    old, new = weights(), weights(seed=1)
    for side in (old, new):
        side["lm_head.weight"] = side["embed.weight"].clone()
    save(tmp_path / "base", old), save(tmp_path / "finetuned", new)
    cli("split", tmp_path / "base", tmp_path / "finetuned", "--method", "random", "--energy", 0.5, "-o", tmp_path / "out")
    general = load(tmp_path / "out")
    assert torch.equal(general["lm_head.weight"], general["embed.weight"])
    assert not torch.equal(general["embed.weight"], new["embed.weight"])


def test_same_seed_same_directory(cli, tmp_path):
    base, finetuned = pair(tmp_path, shards=2)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        words = ("--method", "random", "--energy", 0.5, "--seed", seed, "-j", 2)
        assert cli("split", base, finetuned, *words, "-o", tmp_path / name)[0] == 0
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c


def test_the_output_is_what_it_says(cli, tmp_path):
    base, finetuned = pair(tmp_path, shards=2)
    (finetuned / "tokenizer.json").write_text("{}")
    (finetuned / "modeling_evil.py").write_text("raise SystemExit")
    out = tmp_path / "out"
    code, printed, _ = cli("split", base, finetuned, "--rank", 4, "-o", out, "--json")
    document = json.loads(printed)
    assert code == 0
    assert document["output"] == str(out)
    written = json.loads((out / "liborth.manifest.json").read_text())
    assert document["manifest"] == written
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "modeling_evil.py").exists()

    for entry in written["outputs"]:
        raw = (out / entry["name"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert {e["name"] for e in written["outputs"]} == set(files(out)) - {"liborth.manifest.json"}
    for entry in written["inputs"]["finetuned"]["files"].items():
        assert entry[1]["sha256"] == hashlib.sha256((finetuned / entry[0]).read_bytes()).hexdigest()
    assert (out.parent / "out.private").stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in (out.parent / "out.private").iterdir()} == {0o600}
    assert str(tmp_path) not in (out / "liborth.manifest.json").read_text() + (out / "README.md").read_text()
    from huggingface_hub import ModelCard

    assert "liborth" in ModelCard.load(out / "README.md").data.tags


def test_the_general_files_hold_nothing_of_the_finetuned_header(cli, tmp_path):
    from safetensors.torch import save_file

    base, finetuned = pair(tmp_path)
    save_file(weights(seed=1), finetuned / "model.safetensors", metadata={"format": "pt", "trained_on": "private notes"})
    cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")
    assert b"private notes" not in (tmp_path / "out" / "model.safetensors").read_bytes()
    cli("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "one")
    assert weight_files(tmp_path / "one") == weight_files(finetuned)


def test_mixed_dtypes_fit(cli, tmp_path):
    """A float32 fine-tune of a bf16 base: the update is formed wide, the output has the fine-tuned dtype."""
    old, new = weights(torch.bfloat16), weights(torch.float32, seed=1)
    save(tmp_path / "base", old), save(tmp_path / "finetuned", new)
    assert (
        cli("split", tmp_path / "base", tmp_path / "finetuned", "--rank", 4, "--vectors", "memory", "-o", tmp_path / "out")[0]
        == 0
    )
    general = load(tmp_path / "out")
    assert torch.equal(general["layers.0.norm.weight"], old["layers.0.norm.weight"].float())
    cli("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "one")
    assert weight_files(tmp_path / "one") == weight_files(tmp_path / "finetuned")


def test_memory_kept_elsewhere(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out", "--memory-out", tmp_path / "vault")
    assert not (tmp_path / "out.private").exists()
    code, _, err = cli("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "one")
    assert (code, "--memory" in err) == (3, True)
    for place in (tmp_path / "vault", tmp_path / "vault" / "memory.safetensors"):
        assert cli("excise", tmp_path / "out", "--beta", 1, "--memory", place, "-o", tmp_path / "one", "--force")[0] == 0
        assert weight_files(tmp_path / "one") == weight_files(finetuned)
    (tmp_path / "vault" / "liborth.private.json").unlink()
    code, _, err = cli("excise", tmp_path / "out", "--beta", 1, "--memory", tmp_path / "vault", "-o", tmp_path / "two")
    assert (code, "nothing vouches for it" in err, (tmp_path / "two").exists()) == (3, True, False)


def test_a_run_on_another_device_is_another_run(tmp_path):
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.machine import Run
    from liborth_cli.methods import Amount
    from liborth_cli.split import SplitOptions, Splitter

    old, new = pair(tmp_path)
    with Checkpoint.open(old) as reference, Checkpoint.open(new) as finetuned:
        plan = Splitter(reference, finetuned, SplitOptions("svd", Amount("rank", 2)))
        runs = [Run(torch.device("cpu"), 1), Run(torch.device("cpu"), 2), Run(torch.device("cuda"), 1)]
        one, more_threads, elsewhere = map(plan.fingerprint, runs)
        by_triton = plan.fingerprint(Run(torch.device("cpu"), 1, kernels={"rebuild_delta": "triton"}))
    assert one == more_threads
    assert len({one, elsewhere, by_triton}) == 3


def test_thin_factors_hold_the_same_numbers(tmp_path, monkeypatch):
    """The low-rank part that is never multiplied out, of an update in memory or formed by rows, is the one that is."""
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.methods import Amount
    from liborth_cli.split import SplitOptions, Splitter, divide
    from liborth_cli.split.divide import Divider, Job

    old, new = pair(tmp_path)
    with Checkpoint.open(old) as reference, Checkpoint.open(new) as finetuned:
        plan = Splitter(reference, finetuned, SplitOptions("svd", Amount("rank", 2)))
        parts = (reference, finetuned, plan.options, plan.factors, torch.device("cpu"))
        divider, dense = Divider(*parts), Divider(*parts, trial=True)
        assert {item.grid[1] >= 2 * item.grid[2] for item in plan.split_items} == {True, False}
        for item in plan.split_items:
            held, before = dense.skill(Job(item, 0))
            thin = [divider.skill(Job(item, 0))]
            monkeypatch.setattr(divide, "AHEAD_BYTES", 0)
            thin.append(divider.skill(Job(item, 0)))
            monkeypatch.undo()
            assert isinstance(held, torch.Tensor)
            for part, after in thin:
                assert not isinstance(part, torch.Tensor)
                torch.testing.assert_close(part[0 : held.numel()], held, rtol=1e-4, atol=1e-6)
                assert after.skill == pytest.approx(before.skill, rel=1e-5)
                assert after.facts["excess"] <= 1e-4


def break_manifest(out, how):
    file = out / "liborth.manifest.json"
    raw = file.read_bytes()
    file.unlink()
    if how == "a pipe":
        os.mkfifo(file)
    elif how == "a directory":
        file.mkdir()
    elif how == "a dangling link":
        file.symlink_to(out / "nowhere")
    elif how == "changed":
        file.write_bytes(raw.replace(b'"rank 4"', b'"rank 5"'))
    elif how == "of something else":
        reseal_as(file, raw)


def reseal_as(file, raw):
    """A manifest of `excise` says nothing of where the weights came from."""
    document = {key: value for key, value in json.loads(raw).items() if key in ("schema_version", "liborth", "libraries")}
    file.write_bytes(manifest.dump({**document, "kind": "excise", "parameters": {"beta": 0.0}, "outputs": []}))


@pytest.mark.parametrize("how", ["gone", "a pipe", "a directory", "a dangling link", "changed", "of something else"])
def test_no_evidence_is_not_agreement(cli, tmp_path, how):
    base, finetuned = pair(tmp_path)
    cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")
    break_manifest(tmp_path / "out", how)
    for beta in (0, 1):
        code, _, err = cli("excise", tmp_path / "out", "--beta", beta, "-o", tmp_path / "x")
        assert (code, "--unverified" in err, err.count("\n")) == (3, True, 1), err
    assert not (tmp_path / "x").exists()


def test_going_on_unverified_is_said_aloud(cli, tmp_path):
    """Any checkpoint can be called an output of a split; the copy says that nothing vouches for it."""
    _, finetuned = pair(tmp_path)
    assert cli("excise", finetuned, "--beta", 0, "-o", tmp_path / "x")[0] == 3
    code, _, err = cli("excise", finetuned, "--beta", 0, "--unverified", "-o", tmp_path / "x")
    assert (code, "UNVERIFIED" in err) == (0, True)
    found = manifest.read(tmp_path / "x", manifest.Excise)
    assert found.unverified and "UNVERIFIED" in (tmp_path / "x" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "x" / "README.md").read_text() + " ".join(found.unverified)


def test_what_nothing_vouches_for_is_private_and_never_called_general(cli, tmp_path):
    """A fine-tuned checkpoint, and one that `excise --beta 1` gave back: both would be published under a general name."""
    base, finetuned = pair(tmp_path)
    assert cli("split", base, finetuned, "--rank", 2, "-o", tmp_path / "general")[0] == 0
    assert cli("excise", tmp_path / "general", "--beta", 1, "-o", tmp_path / "back")[0] == 0
    for source in ("finetuned", "back"):
        out = tmp_path / f"copy of {source}"
        assert cli("excise", tmp_path / source, "--beta", 0, "--unverified", "-o", out)[0] == 0
        card = (out / "README.md").read_text()
        assert "PRIVATE" in card and "general checkpoint" not in card and "output of a split" not in card
        assert manifest.read(out, manifest.Excise).private
    for out in (tmp_path / "back", tmp_path / "copy of finetuned"):
        assert (out / ".gitignore").read_text() == "*\n"
        assert out.stat().st_mode & 0o777 == 0o700
        assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o600}


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_files_beside_the_weights_are_held_against_the_manifest(cli, tmp_path, beta):
    base, finetuned = pair(tmp_path)
    for name in ("tokenizer.json", "config.json"):
        (finetuned / name).write_text('{"a": "e"}')
    out = tmp_path / "out"
    cli("split", base, finetuned, "--rank", 4, "-o", out)
    (out / "vocab.txt").write_text("not the split's")
    code, _, err = cli("excise", out, "--beta", beta, "-o", tmp_path / "x")
    assert (code, "does not know them: vocab.txt" in err) == (0, True)
    assert {"tokenizer.json", "config.json"} == set(files(tmp_path / "x")) & {"tokenizer.json", "config.json", "vocab.txt"}
    for text in ('{"a": "f"}', None):
        (out / "tokenizer.json").write_text(text) if text else (out / "tokenizer.json").unlink()
        code, _, err = cli("excise", out, "--beta", beta, "-o", tmp_path / "y")
        assert (code, "tokenizer.json" in err, (tmp_path / "y").exists()) == (3, True, False)


@pytest.mark.parametrize("gone", ["inputs", "factors", "libraries"])
def test_a_sealed_manifest_that_lacks_something_is_no_crash(cli, tmp_path, gone):
    base, finetuned = pair(tmp_path)
    cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")
    reseal(tmp_path / "out", lambda m: m.pop(gone))
    words = ("--beta", 0, "--alpha", 0.5, "--reference", base)
    code, _, err = cli("excise", tmp_path / "out", *words, "-o", tmp_path / "x")
    assert code == (4 if gone == "inputs" else 0), err


def test_the_card_of_one_checkpoint_names_no_reference(cli, tmp_path):
    base, _ = pair(tmp_path)
    code, _, err = cli("split", base, "--one-checkpoint", "--rank", 4, "-o", tmp_path / "out")
    assert code == 0, err
    text = (tmp_path / "out" / "README.md").read_text()
    assert "without a reference" in text and "Nothing was measured" in text


def test_what_holds_memory_is_closed_and_called_private(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    (finetuned / "config.json").write_text("{}")
    cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")
    for beta, private in ((0, False), (0.5, True), (1, True)):
        out = tmp_path / str(beta)
        assert cli("excise", tmp_path / "out", "--beta", beta, "-o", out)[0] == 0
        assert manifest.read(out).private is private
        assert ("PRIVATE" in (out / "README.md").read_text()) is private
        if private:
            assert out.stat().st_mode & 0o777 == 0o700
            assert {f.name for f in out.iterdir() if f.stat().st_mode & 0o077} <= {"liborth.manifest.json"}
