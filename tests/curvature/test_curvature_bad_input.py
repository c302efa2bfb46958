"""Every way an estimate can be refused: one line, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from curvature_cases import make_model, make_tokens
from run_curvature import cli
from safetensors.torch import load_file, save_file
from tiny import OWNGPT, reseal

DEMO = OWNGPT


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    return make_model("llama", folder / "model"), make_tokens(folder), folder


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Run the command and check that it is refused as it should be."""

    def run(code, said, *words):
        before = sorted(tmp_path.rglob("*"))
        got = cli(monkeypatch, capsys, "curvature", *words, "-o", tmp_path / "out")
        assert got.code == code, got.err
        told = (" records read, ", "the two configurations differ")
        lines = [line for line in got.err.strip().split("\n") if not any(words in line for words in told)]
        assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], got.err
        assert got.out == "" and sorted(tmp_path.rglob("*")) == before

    return run


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", "", "nothing to learn from"),
        ("latin.txt", b"caf\xe9 " * 9, "not UTF-8"),
        ("broken.jsonl", '{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("other.jsonl", '{"body": "a"}', "a record needs text"),
        ("number.jsonl", '{"text": 3}', "text is a number, not a text"),
        ("chat.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "no chat template"),
        ("roles.jsonl", '{"messages": ["hello"]}', "not an object with role and content"),
        ("empty.jsonl", "\n\n", "nothing to learn from"),
        ("table.csv", "a,b\n1,2\n", "a record needs text"),
        ("data.docx", "x", "unknown kind"),
        ("broken.parquet", "PAR1", "parquet"),
        ("objects.npy", b"\x93NUMPY garbage", "not a .npy file"),
        ("broken.safetensors", b"\x01\x00\x00\x00\x00\x00\x00\x00{", "header"),
        ("long.jsonl", json.dumps({"prompt": "a" * 20, "completion": "b" * 60}), "--truncate"),
    ],
)
def test_bad_data(name, content, said, shelf, refused, tmp_path):
    code = 3
    if name == "broken.parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            code = 2
    refused(code, said, DEMO / "finetuned", "--data", write(tmp_path / name, content))


def test_no_data_at_all(shelf, refused, tmp_path):
    model, data, _ = shelf
    refused(2, "--data is missing", model)
    refused(3, "no such file", model, "--data", tmp_path / "nowhere.txt")
    refused(3, "no tokenizer", model, "--data", write(tmp_path / "some.txt", "text"))
    refused(2, "positive number", model, "--data", f"{data}=0")


def test_token_rows_of_the_wrong_kind(shelf, refused, tmp_path):
    model, _, _ = shelf
    np.save(tmp_path / "float.npy", np.zeros((2, 3)))
    refused(3, "must be integers", model, "--data", tmp_path / "float.npy")
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object))
    refused(3, "never loaded", model, "--data", tmp_path / "object.npy")
    np.save(tmp_path / "long.npy", np.zeros((1, 66), dtype=int))
    refused(3, "66 tokens", model, "--data", tmp_path / "long.npy")


def test_sequences_longer_than_the_context(shelf, refused):
    model, data, _ = shelf
    refused(2, "context of 64", model, "--data", data, "--seq-len", 65)


def test_a_tokenizer_of_another_model(shelf, refused, tmp_path):
    model, _, _ = shelf
    np.save(tmp_path / "big.npy", np.full((2, 5), 67))
    refused(4, "another model's", model, "--data", tmp_path / "big.npy")
    stranger = make_model("llama", tmp_path / "stranger", vocab_size=40)
    for file in DEMO.glob("finetuned/tokenizer*"):
        shutil.copy(file, stranger)
    refused(4, "does not belong to this model", stranger, "--data", write(tmp_path / "t.txt", "The zebra, xylophone!"))


@pytest.mark.parametrize("weights", ["stream", "resident"])
def test_a_block_that_is_not_finite_is_named(weights, shelf, refused, tmp_path):
    _, data, _ = shelf
    broken = make_model("llama", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused(3, "block 1 is not finite", broken, "--data", data, "--weights", weights)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = 0.0
    tensors["lm_head.weight"][0, 0] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused(3, "the loss of", broken, "--data", data, "--weights", weights)


def test_no_room_for_scratch(shelf, refused, tmp_path, monkeypatch):
    import errno

    model, data, _ = shelf

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    refused(3, "no such directory", model, "--data", data, "--scratch", tmp_path / "nowhere", "--weights", "stream")
    monkeypatch.setattr("liborth_cli.stream.store.os.posix_fallocate", full)
    refused(7, "--scratch", model, "--data", data, "--scratch", tmp_path, "--weights", "stream")


def test_no_room_in_memory(shelf, refused):
    model, data, _ = shelf
    refused(7, "raise it", model, "--data", data, "--memory", "1MB")


def test_a_point_outside_the_pair(shelf, refused, tmp_path):
    model, data, _ = shelf
    refused(2, "runs from 0", model, "--data", data, "--at", 1.5, "--reference", model)
    refused(2, "runs from 0", model, "--data", data, "--at", "nan", "--reference", model)
    refused(2, "needs --reference", model, "--data", data, "--at", 0.5)
    other = make_model("llama", tmp_path / "narrow", intermediate_size=40)
    refused(4, "do not fit", model, "--data", data, "--at", 0.5, "--reference", other)


def test_models_that_are_not_understood(shelf, refused, tmp_path):
    model, data, _ = shelf
    for number, (change, code, said) in enumerate(
        (
            ({"model_type": "mystery", "architectures": []}, 3, "'mystery'"),
            ({"intermediate_size": 40}, 3, "do not belong together"),
            ({"num_hidden_layers": 4}, 3, "no tensor for 'model.layers.3"),
            ({"quantization_config": {"quant_method": "gptq"}}, 3, "quantised"),
            ({"auto_map": {"AutoModelForCausalLM": "evil.py"}, "model_type": "mystery"}, 3, "'mystery'"),
        )
    ):
        wrong = tmp_path / f"wrong{number}"
        shutil.copytree(model, wrong)
        config = json.loads((wrong / "config.json").read_text()) | change
        (wrong / "config.json").write_text(json.dumps(config))
        refused(code, said, wrong, "--data", data)
    (wrong / "config.json").unlink()
    refused(3, "no config.json", wrong, "--data", data)


def test_a_model_that_reads_in_both_directions(shelf, refused, tmp_path):
    import transformers

    _, data, _ = shelf
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=67,
        architectures=["BertLMHeadModel"],
    )
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    refused(3, "causal", tmp_path / "bert", "--data", data)


def test_a_model_that_does_something_between_its_blocks(shelf, refused, monkeypatch):
    import torch
    from transformers.models.llama import modeling_llama

    model, data, _ = shelf
    plain = modeling_llama.LlamaModel.forward

    def strange(self, *args, **kwargs):
        layer = self.layers[1]
        original = layer.forward
        layer.forward = lambda hidden, *a, **k: original(hidden * torch.ones(()), *a, **k)
        try:
            return plain(self, *args, **kwargs)
        finally:
            layer.forward = original

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", strange)
    refused(3, "between its blocks", model, "--data", data, "--weights", "stream")


def test_options_that_fit_nothing(shelf, refused):
    model, data, _ = shelf
    refused(2, "matches no matrix", model, "--data", data, "--tensors", "nothing")
    refused(2, "not a regular expression", model, "--data", data, "--tensors", "(")
    refused(2, "--exact-vocabulary 67", model, "--data", data, "--fisher", "exact", "--exact-vocabulary", 50)
    refused(2, "whole model in memory", model, "--data", data, "--fisher", "exact", "--weights", "stream")
    refused(2, "one MODEL", model, model, "--data", data)
    refused(2, "two factor sets", "--merge", model)


def test_things_that_are_no_factor_sets(shelf, refused, tmp_path, monkeypatch, capsys):
    model, data, _ = shelf
    refused(3, "liborth.manifest.json", "--merge", model, model)
    got = cli(monkeypatch, capsys, "curvature", model, "--data", data, "-o", tmp_path / "f")
    assert got.code == 0, got.err
    (tmp_path / "f" / "factors.block-00001.safetensors").unlink()
    refused(3, "missing", "--merge", tmp_path / "f", tmp_path / "f")
    for change, said in (({"kind": "split"}, "not of `liborth curvature`"), ({"schema_version": 99}, "upgrade")):
        reseal(tmp_path / "f", lambda m, change=change: m.update(change))
        refused(3, said, "--merge", tmp_path / "f", tmp_path / "f")


def test_an_output_that_exists(shelf, refused, tmp_path):
    model, data, _ = shelf
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "mine", "precious")
    refused(6, "exists", model, "--data", data)
    refused(6, "--force replaces only", model, "--data", data, "--force")
