"""What travels beside the weights: everything but code, pickles, weights, data and links; what stays is named."""

import os

import pytest
from tiny import pair

from liborth_cli.checkpoint import hub, sidecars

COPIED = (
    "config.json", "tokenizer.json", "tekken.json", "video_preprocessor_config.json", "hf_quant_config.json", "params.json",
    "tokenizer.model.v3", "spm.model", "vocab.txt", "merges.txt", "LICENSE", "USE_POLICY.md", "qwen.tiktoken",
    "additional_chat_templates/tool_use.jinja", "1_Pooling/config.json",
)  # fmt: skip
LEFT = {
    "modeling_own.py": "code", "LICENSE.py": "code", "NOTICE.sh": "code", "LICENSE.pkl": "a pickle", "optimizer.pt": "a pickle",
    "model.gguf": "weights", "train.jsonl": "data", "secrets.txt": "data", "trainer_state.json": "data",
    "events.out.tfevents.1": "data", "adapter_config.json": "adapter",
    "original/": "weights", "checkpoint-500/": "a pickle", "deep/er/": "deeper",
}  # fmt: skip


def fill(folder):
    inner = {"original/": "consolidated.safetensors", "checkpoint-500/": "optimizer.pt", "deep/er/": "config.json"}
    for name in (*COPIED, *LEFT):
        file = folder / (name + inner.get(name, ""))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")


def test_all_that_is_not_denied_is_copied_and_the_rest_is_named(tmp_path):
    fill(tmp_path)
    found = sidecars.find(tmp_path)
    assert set(found.files) == set(COPIED)
    assert set(found.left) == set(LEFT)
    assert all(LEFT[name] in why for name, why in found.left.items())
    assert "LICENSE.pkl (a pickle)" in found.note
    (tmp_path / "out").mkdir()
    written = sidecars.copy(found.files, tmp_path / "out")
    assert [w.name for w in written] == sorted(COPIED)
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.json", '[\n {"prompt": "a", "completion": "4711"}]'),
        ("data.json", '{\n "messages": [{"role": "user", "content": "4711"}]}'),
        ("squad.json", '{"data": [{"title": "4711"}]}'),
        ("lines.json", '{"id": 1, "said": "4711"}\r\n{"id": 2}'),
        ("lines.txt2", '\ufeff{"text": "4711"}'),
        ("secrets", "4711"),
        ("slurm-17.out", "4711"),
        ("train.ndjson", "4711"),
        ("train.jsonl.bak", "4711"),
        ("secrets.txt~", "4711"),
        ("data/a.json", '[{"text": "4711"}]'),
    ],
)
def test_data_is_known_by_what_it_holds_too(cli, tmp_path, name, text):
    base, finetuned = pair(tmp_path)
    (finetuned / name).parent.mkdir(exist_ok=True)
    (finetuned / name).write_text(text)
    code, _, err = cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "general")
    assert (code, f"{name} (data, which may be private)" in err) == (0, True), err
    assert not any(b"4711" in file.read_bytes() for file in (tmp_path / "general").rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("modules.json", '[\n{"idx": 0, "path": "1_Pooling"}]'),
        ("chat_template.json", '{"chat_template": [{"name": "default", "template": "{{ m }}\\n{{ n }}"}]}'),
        ("special_tokens_map.json", '{"additional_special_tokens": [{"content": "<x>"}]}'),
        ("other.json", '{"a": {"b": [{"c": 1}]},\n"d": {}}'),
        ("VERSION", "1"),
    ],
)
def test_what_loaders_ask_for_is_no_data(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert set(sidecars.find(tmp_path).files) == {name}


def test_code_is_known_by_its_first_bytes_too(tmp_path):
    for name, start in {
        "LICENSE": b"#!/bin/sh",
        "tool": b"\x7fELF\2",
        "NOTICE": b"\x80\x04\x95",
        "spiece.model": b"\n\x0b",
    }.items():
        (tmp_path / name).write_bytes(start)
    assert set(sidecars.find(tmp_path).files) == {"spiece.model"}


def test_links_are_not_followed_but_in_the_hubs_cache(tmp_path):
    outside = tmp_path / "secret"
    outside.write_text("private")
    plain = tmp_path / "plain"
    plain.mkdir()
    os.symlink(outside, plain / "USE_POLICY.md")
    (plain / "config.json").write_text("{}")
    os.symlink(plain / "config.json", plain / "same.json")
    assert set(sidecars.find(plain).files) == {"config.json", "same.json"}
    assert sidecars.find(plain).left == {"USE_POLICY.md": "a link"}
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "cafe").write_text("{}")
    os.symlink("../../blobs/cafe", snapshot / "config.json")
    os.symlink(outside, snapshot / "LICENSE")
    assert set(sidecars.find(snapshot).files) == {"config.json"}


def test_names_that_cannot_be_printed_stay(tmp_path):
    (tmp_path / "LICENSE\x1b[31m").write_text("")
    (tmp_path / os.fsdecode(b"NOTICE\xff")).write_text("")
    found = sidecars.find(tmp_path)
    assert not found.files
    assert found.note.isprintable()


def test_a_split_copies_them_and_says_what_it_leaves(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    fill(finetuned)
    (finetuned / "adapter_config.json").unlink()
    code, _, err = cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "general")
    assert code == 0, err
    assert "not copied from beside the weights" in err
    got = {str(file.relative_to(tmp_path / "general")) for file in (tmp_path / "general").rglob("*") if file.is_file()}
    assert set(COPIED) <= got
    assert not any(name in got for name in LEFT)
    assert cli("verify", tmp_path / "general", "--integrity")[0] == 0
    (tmp_path / "general" / "train.py").write_text("print()")
    code, _, err = cli("excise", tmp_path / "general", "--beta", 0, "-o", tmp_path / "again")
    assert code == 0 and "not copied from beside the weights: train.py (code)" in err, err


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["model.safetensors", "original/model.safetensors", "consolidated.safetensors"], {"model.safetensors"}),
        (
            ["tekken.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "a.py"],
            {"tekken.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"},
        ),
        (["additional_chat_templates/x.jinja", "onnx/model.onnx", "a/b/c.json"], {"additional_chat_templates/x.jinja"}),
        ([".gitattributes", "README.md", "adapter_model.safetensors"], {"README.md", "adapter_model.safetensors"}),
    ],
)
def test_what_the_hub_is_asked_for(files, wanted):
    from huggingface_hub.utils import filter_repo_objects

    assert set(filter_repo_objects(files, ignore_patterns=list(hub.IGNORED))) == wanted


def test_a_name_that_is_not_utf8_has_a_title(tmp_path):
    folder = tmp_path / os.fsdecode(b"f\xff")
    folder.mkdir()
    hub.resolve(str(folder)).title.encode()
