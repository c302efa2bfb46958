"""The command as a user meets it: real model, real text, inspect, points on the path, dry runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from curvature_cases import make_model, make_tokens, relative
from run_curvature import cli, estimate
from tiny import OWNGPT

from liborth_cli.console import SILENT
from liborth_cli.curvature.estimate import CurvatureRequest
from liborth_cli.curvature.estimate import estimate as estimate_of
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.plan import CurvatureOptions, Resources
from liborth_cli.machine import configure
from liborth_cli.ranks import World

DEMO = OWNGPT


def test_the_demo_pair_from_text_to_table(tmp_path, monkeypatch, capsys):
    words = [DEMO / "finetuned", "--data", DEMO / "finance_qa.txt", "--tokens", 2000, "-o", tmp_path / "f", "--eigen", "--json"]
    got = cli(monkeypatch, capsys, "curvature", *words)
    assert got.code == 0, got.err
    document = json.loads(got.out)
    assert document["output"] == str(tmp_path / "f")
    assert document["manifest"]["totals"]["tokens"] == 2000
    assert 0.5 < document["manifest"]["totals"]["loss"] < 2.5
    assert "2,000 tokens in" in got.err and "tokens/s" in got.err
    for said in ("an embedding; A is the diagonal", "only the diagonal of G", "table of positions", "norm or bias"):
        assert said in got.err
    table = cli(monkeypatch, capsys, "inspect", tmp_path / "f", "-v")
    assert table.code == 0 and "particip." in table.out and "transformer.h.0.attn.c_attn.weight" in table.out
    facts = json.loads(cli(monkeypatch, capsys, "inspect", tmp_path / "f", "--json").out)
    with FactorSet.open(tmp_path / "f") as factors:
        layer = factors.layer("transformer.h.1.mlp.c_fc.weight")
        assert layer.transposed and layer.input_covariance.shape == (64, 64) and layer.gradient_covariance.shape == (256, 256)
        assert facts["layers"][layer.name]["G"]["trace"] == pytest.approx(float(layer.gradient_covariance.trace()), rel=1e-5)
    manifest = (tmp_path / "f" / "liborth.manifest.json").read_text()
    assert str(tmp_path) not in manifest and str(DEMO) not in manifest
    assert not list(tmp_path.glob("*partial*"))


def test_the_middle_of_a_path_is_a_model_written_there(tmp_path, monkeypatch, capsys):
    """Factors at t are those of the checkpoint that holds W_r + t(W_f − W_r), which never exists on disk."""
    from safetensors.torch import load_file, save_file

    old, new, middle = (make_model("llama", tmp_path / name, seed=s) for name, s in (("r", 0), ("f", 1), ("m", 0)))
    data = make_tokens(tmp_path)
    a, b = (load_file(folder / "model.safetensors") for folder in (old, new))
    save_file({k: a[k] + 0.5 * (b[k] - a[k]) for k in a}, middle / "model.safetensors", metadata={"format": "pt"})
    for weights in ("stream", "resident"):
        with (
            estimate(new, data, tmp_path / f"p{weights}", at=0.5, reference=old, weights=weights) as path,
            estimate(middle, data, tmp_path / f"m{weights}", weights=weights) as model,
        ):
            assert path.point == 0.5 and path.model_sha256 != model.model_sha256
            assert set(path.manifest.inputs) == {"model", "reference"}
            for name in path.names:
                for kind in ("input_covariance", "gradient_covariance"):
                    assert relative(getattr(path.layer(name), kind), getattr(model.layer(name), kind)) < 1e-6


def test_both_ends_of_the_path_are_the_checkpoints_themselves(tmp_path):
    old, new = (make_model("llama", tmp_path / name, seed=s) for name, s in (("r", 0), ("f", 1)))
    data = make_tokens(tmp_path)
    for at, own in ((0.0, old), (1.0, new)):
        with (
            estimate(new, data, tmp_path / f"p{at}", at=at, reference=old) as path,
            estimate(own, data, tmp_path / f"m{at}") as model,
        ):
            for name in path.names:
                assert torch.equal(path.layer(name).gradient_covariance, model.layer(name).gradient_covariance)


@pytest.mark.parametrize("weights", ["stream", "resident"])
def test_at_the_reference_the_reference_runs_under_its_own_configuration(tmp_path, weights):
    old, new = make_model("llama", tmp_path / "r", seed=0), make_model("llama", tmp_path / "f", seed=1, rms_norm_eps=0.5)
    data = make_tokens(tmp_path)
    with (
        estimate(new, data, tmp_path / "at0", at=0.0, reference=old, weights=weights) as there,
        estimate(old, data, tmp_path / "alone", weights=weights) as alone,
        estimate(new, data, tmp_path / "at1", weights=weights) as other,
    ):
        assert set(there.manifest.inputs) == {"model", "reference"}
        for name in alone.names:
            for side in ("input_covariance", "gradient_covariance"):
                assert torch.equal(getattr(there.layer(name), side), getattr(alone.layer(name), side)), name
        assert not torch.equal(there.layer(name).gradient_covariance, other.layer(name).gradient_covariance)


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(tmp_path, monkeypatch, capsys):
    model, data = make_model("llama", tmp_path / "model"), make_tokens(tmp_path)
    before = sorted(tmp_path.iterdir())
    got = cli(monkeypatch, capsys, "curvature", model, "--data", data, "-o", tmp_path / "f", "--dry-run", "--json")
    assert got.code == 0 and json.loads(got.out)["matrices"] == 23
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("words", [("--parallel", "layers"), ("--gather",), ("--parallel", "data", "--gather"), ()])
def test_what_is_for_several_ranks_is_said_to_change_nothing_in_one_process(tmp_path, monkeypatch, capsys, words):
    model, data = make_model("llama", tmp_path / "model"), make_tokens(tmp_path)
    got = cli(monkeypatch, capsys, "curvature", model, "--data", data, "-o", tmp_path / "f", "--dry-run", *words)
    assert got.code == 0 and ("changes nothing in one process" in got.err) == bool(words), got.err


@pytest.mark.parametrize(("parallel", "waiting"), [("data", [4, 2, 1]), ("layers", [4, 3, 2])])
def test_a_plan_counts_the_block_inputs_that_wait_on_each_rank(tmp_path, monkeypatch, parallel, waiting):
    """Of three blocks and the head: each rank has a share of the rows, or of the blocks."""
    monkeypatch.setattr("liborth_cli.curvature.planned.process_bytes", lambda: 0)
    model, data, found = make_model("llama", tmp_path / "model"), make_tokens(tmp_path, rows=24), []
    for size in (1, 2, 4):
        ranks = replace(configure("cpu", 1), world=World(size=size, hosts=("here",) * size), parallel=parallel)
        need = [_needs(model, data, tmp_path / "f", ranks, scratch) for scratch in (None, tmp_path)]
        found.append(need[0] - need[1])
    assert [round(4 * one / found[0]) for one in found] == waiting


def _needs(model, data, out, run, scratch):
    resources = Resources(1 << 40, scratch, "stream")
    request = CurvatureRequest(str(model), (str(data),), out, CurvatureOptions(), resources, dry_run=True)
    outline = estimate_of(request, run, SILENT)
    return outline.memory_bytes - outline.plan.needed


def test_tensors_choose_what_gets_factors_and_the_owner_of_a_shared_input(tmp_path):
    model, data = make_model("llama", tmp_path / "model"), make_tokens(tmp_path)
    with (
        estimate(model, data, tmp_path / "all") as every,
        estimate(model, data, tmp_path / "some", tensors=("k_proj", "v_proj")) as some,
    ):
        assert some.names == [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(3) for p in "kv"]
        for name in some.names:
            assert torch.equal(some.layer(name).input_covariance, every.layer(name).input_covariance)
        from liborth_cli.errors import BadInput

        with pytest.raises(BadInput, match="not chosen by --tensors"):
            some.layer("model.layers.0.self_attn.q_proj.weight")


def test_experts_count_the_tokens_routed_to_them(tmp_path):
    model, data = make_model("mixtral", tmp_path / "model"), make_tokens(tmp_path)
    with estimate(model, data, tmp_path / "f") as factors:
        for block in range(3):
            each = [factors.layer(f"model.layers.{block}.block_sparse_moe.experts.{e}.w1.weight") for e in range(4)]
            assert sum(layer.tokens for layer in each) == 2 * factors.tokens
            assert all(layer.shares_input_with == (layer.name, layer.name.replace("w1", "w3")) for layer in each)


def test_tied_embeddings_have_one_set_of_factors_for_each_use(tmp_path):
    model, data = make_model("llama_tied", tmp_path / "model"), make_tokens(tmp_path)
    with estimate(model, data, tmp_path / "f") as factors:
        head, table = factors.layer("lm_head.weight"), factors.layer("model.embed_tokens.weight")
        assert head.tensor == table.tensor == "model.embed_tokens.weight"
        assert not head.transposed and head.gradient_covariance.shape == (67,) and head.input_covariance.shape == (32, 32)
        assert table.transposed and table.gradient_covariance.shape == (32, 32) and table.input_covariance.shape == (67,)


def test_sharded_bfloat16_checkpoints(tmp_path):
    import transformers

    single = make_model("qwen2", tmp_path / "one")
    model = transformers.AutoModelForCausalLM.from_pretrained(single, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    data = make_tokens(tmp_path)
    with (
        estimate(tmp_path / "bf16", data, tmp_path / "a", weights="stream") as one,
        estimate(tmp_path / "sharded", data, tmp_path / "b", weights="stream") as two,
    ):
        for name in one.names:
            assert torch.equal(one.layer(name).gradient_covariance, two.layer(name).gradient_covariance)


def test_sigterm_leaves_something_to_resume(cli, tmp_path):
    """A real process, a real signal, and --resume afterwards gives the bytes of an undisturbed run."""
    model, data = make_model("llama", tmp_path / "model"), make_tokens(tmp_path, rows=60)
    words = ["curvature", model, "--data", data, "--weights", "stream", "--group-tokens", "200", "-j", "1"]
    command, environment = [sys.executable, "-m", "liborth_cli", *words], {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "-o", tmp_path / "f"], env=environment, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "f.liborth-partial" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.read_text().count("\n") > 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "--resume" in err, err
    assert not (tmp_path / "f").exists() and journal.exists()
    code, _, err = cli(*words, "-o", tmp_path / "f", "--resume")
    assert code == 0 and "done before" in err, err
    assert cli(*words, "-o", tmp_path / "whole")[0] == 0
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "f" / file.name).read_bytes(), file.name
