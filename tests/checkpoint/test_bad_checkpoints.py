"""Every damaged or hostile checkpoint is refused with one line, exit code 3, and nothing written."""

import json
import os
import struct

import pytest
import torch
from tiny import files, pair, save, weights

from liborth_cli.checkpoint.pair import Policy, match
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput


def _bomb(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 26_000_000) + b" " * 26_000_000)


def _claims_too_much(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def _truncated(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)


def _duplicate(folder):
    entry = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = b"{" + entry + b"," + entry + b"}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0")


def _pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _disguised_pickle(folder):
    torch.save({}, folder / "model.safetensors")


def _adapter(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def _empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def _none(folder):
    (folder / "model.safetensors").unlink()


def _without_index(count):
    def damage(folder):
        save(folder, weights(), shards=2)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").unlink()
        for file in sorted(folder.glob("model-*"))[count:]:
            file.unlink()

    return damage


def _moved(*places):
    """The weights lie under other names, or in other directories; what is not weights lies there too."""

    def damage(folder):
        raw = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").unlink()
        for place in places:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_bytes(raw)

    return damage


def _index(change):
    def damage(folder):
        save(folder, weights(), shards=2)
        (folder / "model.safetensors").unlink()
        file = folder / "model.safetensors.index.json"
        text = change(json.loads(file.read_text()), folder)
        file.write_text(text if isinstance(text, str) else json.dumps(text))

    return damage


def _point(name):
    def change(index, folder):
        index["weight_map"][next(iter(index["weight_map"]))] = name
        return index

    return _index(change)


def _missing_shard(index, folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    return index


def _extra_shard(index, folder):
    (folder / "model-00003-of-00003.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    return index


def _forgets(index, folder):
    del index["weight_map"]["embed.weight"]
    return index


def _invents(index, folder):
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    return index


def _twice(index, folder):
    return '{"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"}}'


def _folder(folder):
    _none(folder)
    (folder / "model.safetensors").mkdir()


def _both(folder):
    save(folder, weights(), shards=2)
    save(folder, weights())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_bomb, "26,000,000 bytes; 25,000,000 are allowed"),
        (_claims_too_much, "not a safetensors file"),
        (_truncated, "10 bytes are missing"),
        (_duplicate, "'a' twice"),
        (_pickle, "is a pickle, which can run code"),
        (_disguised_pickle, "is a pickle"),
        (_adapter, "this is an adapter; name its base"),
        (_moved("adapter_config.json", "adapter_model.bin"), "an adapter in a pickle, which can run code when loaded; merge"),
        (_without_index(2), "2 of 2 files of a checkpoint are here, and model.safetensors.index.json"),
        (_without_index(1), "1 of 2 files of a checkpoint are here"),
        (_moved("checkpoint-500/model.safetensors"), "name the one checkpoint, "),
        (_moved("checkpoint-90/model.safetensors", "checkpoint-500/model.safetensors"), "the last of 2 checkpoints, "),
        (_moved("consolidated.safetensors", "params.json"), "its maker's own program"),
        (_moved("model.fp16.safetensors"), "but model.fp16.safetensors; if that is the whole model, name it"),
        (_moved("m.gguf"), "gguf_file='m.gguf'"),
        (_empty, "not a safetensors file"),
        (_none, "is this a checkpoint?"),
        (_folder, "model.safetensors: is a directory, and should be a file"),
        (_index(_missing_shard), "this shard and it is missing"),
        (_index(_extra_shard), "this shard is not in the index"),
        (_index(_forgets), "does not name tensor 'embed.weight'"),
        (_index(_invents), "'ghost' is in model-00001-of-00002.safetensors, which does not hold it"),
        (_index(_twice), "names 'a' twice"),
        (_index(lambda index, folder: "nonsense"), "not a safetensors index"),
        (_index(lambda index, folder: {"weight_map": {}}), "not a safetensors index"),
        (_point("../../etc/passwd"), "only plain"),
        (_point("/etc/passwd.safetensors"), "only plain"),
        (_point("../base/model.safetensors"), "only plain"),
        (_both, "remove the one that is not meant"),
    ],
)
@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_refused(cli, tmp_path, damage, says, side):
    pair(tmp_path)
    damage(tmp_path / side)
    before = files(tmp_path)
    code, out, err = cli("split", tmp_path / "base", tmp_path / "finetuned", "--rank", 4, "-o", tmp_path / "out")
    assert code == 3, err
    assert says in err
    assert [line.startswith("error: ") for line in err.splitlines()].count(True) == 1
    assert err.splitlines()[-1].startswith("error: ")
    assert out == ""
    assert files(tmp_path) == before


def test_no_such_path(cli, tmp_path):
    code, _, err = cli("split", tmp_path / "nowhere", tmp_path, "--rank", 4)
    assert (code, err.count("error: ")) == (3, 1)
    assert "no such file" in err


def test_a_shard_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    """A writer that appends, replaces or rewrites a shard in the middle of a run must not go unnoticed."""
    from liborth_cli import split
    from liborth_cli.checkpoint.hub import Source
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.console import Console
    from liborth_cli.errors import BadInput
    from liborth_cli.machine import configure
    from liborth_cli.methods import Amount
    from liborth_cli.split import write

    base, finetuned = pair(tmp_path, shards=2)
    victim = finetuned / "model-00001-of-00002.safetensors"
    original = write.write_shard

    def write_then_touch(*given, **named):
        shard = original(*given, **named)
        victim.write_bytes(victim.read_bytes())
        return shard

    monkeypatch.setattr(write, "write_shard", write_then_touch)
    with Checkpoint.open(base) as old, Checkpoint.open(finetuned) as new:
        plan = split.Splitter(old, new, split.SplitOptions("svd", Amount("rank", 4)))
        with pytest.raises(BadInput, match="changed while it was read"):
            target = write.Destination(tmp_path / "out", (Source(base), Source(finetuned)))
            split.write_split(plan, target, configure("cpu", 1), Console(quiet=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "finetuned"]


def test_a_shard_that_shrinks_is_an_error_not_a_crash(tmp_path):
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.errors import BadInput

    with Checkpoint.open(save(tmp_path / "m", weights())) as checkpoint:
        os.truncate(tmp_path / "m" / "model.safetensors", 2000)
        with pytest.raises(BadInput, match="became shorter"):
            checkpoint.read("embed.weight")
            checkpoint.read("conv.weight")


def test_numbers_beyond_arithmetic_are_refused_by_name(cli, tmp_path):
    """Finite, and their squares are not: what a header that points at other bytes makes of weights."""
    base, finetuned = pair(tmp_path)
    tensors = weights(seed=1)
    tensors["layers.0.experts.gate_up"] *= 1e32
    save(finetuned, tensors)
    code, _, err = cli("split", base, finetuned, "--rank", 2, "-o", tmp_path / "out")
    assert code in (0, 3), err
    assert code == 0 or "layers.0.experts.gate_up" in err
    assert "unexpected" not in err


def test_a_folder_of_the_hubs_cache_is_told_from_what_lies_in_it(tmp_path):
    revision = save(tmp_path / "models--org--name" / "snapshots" / "abc", weights())
    with pytest.raises(BadInput, match=f"a folder of the hub's cache.*name {revision}, or the model as org/name"):
        Checkpoint.open(tmp_path / "models--org--name")


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    "kind", ["lora_A.default.weight", "lora_A.weight", "lora_embedding_B.default", "lora_magnitude_vector.default.weight"]
)
def test_a_lora_that_was_not_merged_is_named(tmp_path, kind, kept):
    plain = weights()
    name = next(name for name, tensor in plain.items() if tensor.ndim == 2)
    split = {key: tensor for key, tensor in plain.items() if key != name}
    stem = name.removesuffix(".weight")
    split |= {name if kept else f"{stem}.base_layer.weight": plain[name], f"{stem}.{kind}": plain[name][:1].clone()}
    with (
        Checkpoint.open(save(tmp_path / "base", plain)) as base,
        Checkpoint.open(save(tmp_path / "tuned", split)) as tuned,
        pytest.raises(BadInput, match="', a LoRA that was not merged; merge it first"),
    ):
        match(base, tuned, Policy())
