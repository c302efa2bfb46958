"""Inputs and gradients kept token by token: against autograd, over groups, merged, and refused."""

import json
import os

import numpy as np
import pytest
import torch
from curvature_cases import make_model, make_tokens, read_tokens, relative
from run_curvature import cli, estimate

from liborth_cli.curvature.factor_set import FactorSet

KINDS = ("llama", "gpt2", "mixtral")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("per-token")
    return {kind: (make_model(kind, folder / kind), make_tokens(folder, name=f"{kind}-data")) for kind in KINDS}


def weight_gradients(model, data):
    """The gradient of the summed loss over all rows, for every parameter."""
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for row in read_tokens(data):
        ids = row.long()[None]
        logits = net(ids).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{"weights": "stream", "group_tokens": 40}, {"weights": "resident"}])
def test_tokens_pair_up_to_the_weight_gradient(kind, how, shelf, tmp_path):
    """Σ_t g_t a_tᵀ is the gradient of the weight: so every a stands beside its own g. And their squares are A and G."""
    model, data = shelf[kind]
    gradients = weight_gradients(model, data)
    checked = 0
    with (
        estimate(model, data, tmp_path / "sums", fisher="empirical", **how) as sums,
        estimate(model, data, tmp_path / "out", fisher="empirical", per_token=True, **how) as factors,
    ):
        assert factors.names == sums.names
        for name in factors.names:
            record = factors.layers[name]
            assert factors.holds("tokens", name) == (record.kind == "linear")
            if record.kind != "linear":
                continue
            felt, layer, summed = factors.single_tokens(name), factors.layer(name), sums.layer(name)
            assert len(felt.inputs) == record.tokens == felt.weight
            assert relative(layer.input_covariance, summed.input_covariance) < 1e-5
            assert relative(layer.gradient_covariance, summed.gradient_covariance) < 1e-5
            stored = {key.partition("/")[0] for file in factors.files for key in factors.keys(file) if key.endswith(f"/{name}")}
            assert not stored & {"input_covariance", "gradient_covariance"}, "tokens stand in their place"
            if name in gradients:
                wanted = gradients[name].T if record.transposed else gradients[name]
                assert relative(felt.gradients.T @ felt.inputs, wanted) < 1e-4, name
                checked += 1
    assert checked >= 3


def test_tokens_of_a_block_need_not_fit_into_memory(shelf, tmp_path, monkeypatch):
    """A smaller budget means groups, whose tokens are joined on disk: the same tokens, and no file of a group stays."""
    model, data = shelf["llama"]
    monkeypatch.setattr("liborth_cli.curvature.plan.process_bytes", lambda: 0)
    with (
        estimate(model, data, tmp_path / "much", fisher="empirical", per_token=True, memory=1 << 30) as much,
        estimate(model, data, tmp_path / "little", fisher="empirical", per_token=True, memory=700_000) as little,
    ):
        assert not little.manifest.machine.resident
        for name in filter(lambda name: much.holds("tokens", name), much.names):
            one, other = much.single_tokens(name), little.single_tokens(name)
            assert relative(other.gradients.T @ other.inputs, one.gradients.T @ one.inputs) < 1e-4
        tokens = much.most_tokens()
        assert little.most_tokens() == tokens
    assert not list((tmp_path / "little").glob("group-*"))


def test_weights_count_in_the_covariances(shelf, tmp_path):
    """Rows that count twice and rows that count once: the same A and G as sums give."""
    model, data = shelf["llama"]
    other = make_tokens(tmp_path, seed=5, name="other")
    settings = {"fisher": "empirical", "per_head": True}
    with (
        estimate(model, [f"{data}=2", other], tmp_path / "sums", **settings) as sums,
        estimate(model, [f"{data}=2", other], tmp_path / "single", per_token=True, **settings) as single,
    ):
        for name in sums.names:
            one, two = sums.layer(name), single.layer(name)
            assert one.tokens == two.tokens
            assert one.gradient_covariance.shape == two.gradient_covariance.shape
            assert relative(two.input_covariance, one.input_covariance) < 1e-5, name
            assert relative(two.gradient_covariance, one.gradient_covariance) < 1e-5, name


def test_halves_merge_to_the_whole(shelf, tmp_path):
    model, data = shelf["llama"]
    rows = read_tokens(data)
    for name, part in (("one", rows[: len(rows) // 2]), ("two", rows[len(rows) // 2 :])):
        padded = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=-1)
        np.save(tmp_path / f"{name}.npy", padded.numpy())
    settings = {"fisher": "empirical", "per_token": True}
    estimate(model, data, tmp_path / "whole", **settings).close()
    for name in ("one", "two"):
        estimate(model, tmp_path / f"{name}.npy", tmp_path / name, **settings).close()
    from liborth_cli.console import Console
    from liborth_cli.curvature.factor_set import FactorSet
    from liborth_cli.curvature.merge import merge
    from liborth_cli.machine import configure

    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "merged", False, configure("cpu", 1), Console(quiet=True))
    with FactorSet.open(tmp_path / "merged") as merged, FactorSet.open(tmp_path / "whole") as whole:
        for name in whole.names:
            if whole.holds("tokens", name):
                one, two = merged.single_tokens(name), whole.single_tokens(name)
                assert relative(one.gradients.T @ one.inputs, two.gradients.T @ two.inputs) < 1e-5


def test_a_set_without_its_weights_is_damaged(shelf, tmp_path):
    from safetensors.torch import load_file, save_file

    from liborth_cli.curvature.factor_set import FactorSet
    from liborth_cli.errors import BadInput

    model, data = shelf["llama"]
    estimate(model, data, tmp_path / "out", fisher="empirical", per_token=True).close()
    file = tmp_path / "out" / "factors.block-00000.safetensors"
    save_file({key: value for key, value in load_file(file).items() if not key.startswith("token_weights/")}, file)
    index = tmp_path / "out" / "factors.safetensors.index.json"
    known = json.loads(index.read_text())
    gone = {k: v for k, v in known["weight_map"].items() if not (k.startswith("token_weights/") and v == file.name)}
    index.write_text(json.dumps({**known, "weight_map": gone}))
    with pytest.raises(BadInput, match="in the manifest and in no file; the set is damaged"):
        FactorSet.open(tmp_path / "out")


def test_all_labels_and_bases_are_refused(shelf, tmp_path, monkeypatch, capsys):
    model, data = shelf["llama"]
    words = ("curvature", model, "--data", data, "--per-token", "-o", tmp_path / "out")
    done = cli(monkeypatch, capsys, *words, "--fisher", "exact")
    assert done.code == 2
    assert "--fisher exact has one for every label" in done.err
    done = cli(monkeypatch, capsys, *words, "--eigen", "--tokens", 8)
    assert (done.code, "leave out --eigen" in done.err) == (2, True)
    assert not (tmp_path / "out").exists()
    done = cli(monkeypatch, capsys, *words, "--tokens", 8, "--json")
    assert done.code == 0
    assert json.loads(done.out)["manifest"]["parameters"]["per_token"] is True


def hashes_of_rows(data):
    """Every digest of a file and its rows that a manifest might hold."""
    from liborth_cli.stream.texts import DataFile, data_hash, read_rows

    file = DataFile.parse(str(data))
    rows = read_rows([file], None, 1 << 20, 1 << 20)
    return [file.sha256(), data_hash(rows), *(data_hash([row]) for row in rows)]


@pytest.mark.parametrize("made", [{"per_token": True}, {"at": 0.5, "reference": True}, {"secret": True}], ids=str)
def test_a_set_that_tells_of_rows_is_private_and_holds_no_hash_of_them(made, shelf, tmp_path, monkeypatch, capsys):
    model, data = shelf["llama"]
    words = (
        ["--per-token"] if "per_token" in made else ["--private"] if "secret" in made else ["--at", "0.5", "--reference", model]
    )
    old = os.umask(0)
    try:
        got = cli(monkeypatch, capsys, "curvature", model, "--data", data, *words, "-o", tmp_path / "set")
        plain = cli(monkeypatch, capsys, "curvature", model, "--data", data, "-o", tmp_path / "plain")
    finally:
        os.umask(old)
    assert got.code == plain.code == 0 and "is PRIVATE" in got.err and "is PRIVATE" not in plain.err
    for folder in ("set", "plain"):
        assert oct((tmp_path / folder).stat().st_mode & 0o777) == "0o700"
        assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / folder).iterdir()} == {"0o600"}
    text = "".join(file.read_text() for file in (tmp_path / "set").iterdir() if file.suffix != ".safetensors")
    assert not any(digest in text for digest in hashes_of_rows(data))
    assert json.loads((tmp_path / "set" / "liborth.manifest.json").read_text())["private"] is True
    assert "PRIVATE" in (tmp_path / "set" / "README.md").read_text()
    with FactorSet.open(tmp_path / "set") as one, FactorSet.open(tmp_path / "plain") as other:
        assert one.data == [] and len(other.data) == 1
        assert one.shares_data(other) and other.shares_data(one) and one.same_data(other)  # by the key beside them


def test_private_sets_of_the_same_rows_know_each_other(shelf, tmp_path, monkeypatch, capsys):
    model, data = shelf["llama"]
    for name in ("a", "b"):
        estimate(model, data, tmp_path / name, per_token=True, seed=int(name == "b")).close()
    got = cli(monkeypatch, capsys, "curvature", "--merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out")
    assert (got.code, got.err.count("\n")) == (4, 1) and "the same data" in got.err
    assert (tmp_path / "liborth.private.key").stat().st_mode & 0o777 == 0o600
