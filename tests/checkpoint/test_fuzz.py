"""A thousand damaged files for every reader of a checkpoint: each is read, or refused in one line."""

import copy
import itertools
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny import save, weights

from liborth_cli.checkpoint import sidecars
from liborth_cli.checkpoint.adapter import open_model
from liborth_cli.checkpoint.config import check_bounds, warning
from liborth_cli.checkpoint.delta import Memory, metadata
from liborth_cli.checkpoint.pair import Policy, match
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.views import Reattached
from liborth_cli.errors import LiborthError

FILES = 1000
VALUES = [
    None, True, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 1.5, 1e308, float("nan"), "", "F32", "U8", "F4", "x" * 500, "\ud800",
    "\0", "../x", "a\x1b[31m", [], {}, [0], [4, 0], [[0, 4]], ["0", "4"], {"a": 1}, [1] * 70, "model.safetensors",
]  # fmt: skip
KEYS = ["__metadata__", "", "xor/embed.weight", "rows/embed.weight", "frame/x", "whole/x", "router/0", "sidecar/../x", "\ud800"]


def mutate(value, dice, depth=0):
    """Change a JSON document somewhere, in structure, type or value."""
    if depth and dice.random() < 0.12:
        return copy.deepcopy(dice.choice(VALUES))
    if isinstance(value, dict):
        changed = {}
        for key, inner in value.items():
            roll = dice.random()
            if roll > 0.04:
                changed[dice.choice([*KEYS, f"{key}x"]) if roll < 0.08 else key] = mutate(inner, dice, depth + 1)
        return changed
    if isinstance(value, list):
        changed = [mutate(inner, dice, depth + 1) for inner in value]
        return changed[:-1] if dice.random() < 0.1 else [*changed, *changed[:1]] if dice.random() < 0.1 else changed
    return value + dice.choice([-1, 1, 4, 2**32, -(2**40)]) if type(value) is int and dice.random() < 0.3 else value


def scramble(raw, dice):
    """Change bytes anywhere: overwritten, taken out, put in, cut off."""
    raw = bytearray(raw)
    for _ in range(dice.choice([1, 1, 2, 5])):
        at, roll = dice.randrange(len(raw) + 1), dice.random()
        if roll < 0.5:
            raw[at : at + 1] = bytes([dice.randrange(256)])
        elif roll < 0.7:
            del raw[at : at + dice.randrange(1, 9)]
        elif roll < 0.9:
            raw[at:at] = dice.choice([bytes([dice.randrange(256)]), b'"', b"\\ud800", b"[" * 2000, raw[max(at - 20, 0) : at]])
        else:
            del raw[at:]
    return bytes(raw)


def damaged(raw, dice, header=False):
    """Return a damaged version of a JSON file, or of a safetensors file."""
    if dice.random() < 0.4:
        return scramble(raw, dice)
    start = 8 if header else 0
    stop = 8 + int.from_bytes(raw[:8], "little") if header else len(raw)
    text = json.dumps(mutate(json.loads(raw[start:stop]), dice)).encode()
    return (len(text).to_bytes(8, "little") if header else b"") + text + raw[stop:]


def refused_or_done(action):
    try:
        action()
    except LiborthError as error:
        text = str(error)
        assert len(text) < 700, text  # three names of 80 letters, and the paths of this test
        assert "\n" not in text
        return 0
    return 1


def read_all(checkpoint):
    for name in checkpoint.tensors:
        checkpoint.read(name)
    check_bounds(checkpoint)


def campaign(folder, file, action, header=False):
    """Damage one file of a good checkpoint again and again; it must be read, or refused, and now and then each of the two."""
    raw = (folder / file).read_bytes()
    dice = random.Random(file)
    done = 0
    for _ in range(FILES):
        (folder / file).write_bytes(damaged(raw, dice, header))
        done += refused_or_done(action)
    (folder / file).write_bytes(raw)
    assert refused_or_done(action) == 1
    return done


def opened(folder, use=read_all):
    def action():
        with Checkpoint.open(folder) as checkpoint:
            use(checkpoint)

    return action


def test_headers(tmp_path):
    save(tmp_path, weights())
    assert campaign(tmp_path, "model.safetensors", opened(tmp_path), header=True) > 0


def test_indexes(tmp_path):
    save(tmp_path, weights(), shards=2)
    assert campaign(tmp_path, "model.safetensors.index.json", opened(tmp_path)) > 0


def test_configurations(tmp_path):
    config = {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": 40,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "quantization_config": {"quant_method": "gptq"},
    }  # fmt: skip
    other = save(tmp_path / "other", weights(seed=1), config=config)
    folder, turns = save(tmp_path / "m", weights(), config=config), itertools.count()

    def action():
        with Checkpoint.open(folder) as one, Checkpoint.open(other) as two:
            check_bounds(one)
            match(one, two, Policy())
            if next(turns) % 20 == 0:  # Transformers' own classes take a while
                warning(one, two)

    assert campaign(folder, "config.json", action) > 0


@pytest.mark.parametrize("side", ["old", "new"])
def test_pairs(tmp_path, side):
    save(tmp_path / "old", weights())
    save(tmp_path / "new", weights(seed=1))

    def action():
        with Checkpoint.open(tmp_path / "old") as old, Checkpoint.open(tmp_path / "new") as new:
            match(old, new, Policy(added="memory", vectors="memory"))

    assert campaign(tmp_path / side, "model.safetensors", action, header=True) > 0


def test_memories(tmp_path):
    save(tmp_path, weights())
    entries = {f"xor/{name}": torch.zeros(t.shape, dtype=torch.int32) for name, t in weights().items()}
    entries |= {"rows/layers.0.up.weight": torch.ones(2, 16), "sidecar/config.json": torch.zeros(2, dtype=torch.uint8)}
    del entries["xor/layers.0.up.weight"]
    save_file(entries, tmp_path / "memory.safetensors", metadata=metadata("model.safetensors"))

    def action():
        with Checkpoint.open(tmp_path) as general, Checkpoint.open(tmp_path, stem="memory") as file:
            memory = Memory(file)
            memory.check_fits(general)
            memory.withheld()
            if not memory.grown:
                read_all(Reattached(general, memory))

    campaign(tmp_path, "memory.safetensors", action, header=True)


def an_adapter(folder):
    base = save(folder / "base", {"model.a.weight": torch.randn(8, 4), "model.norm.weight": torch.randn(4)})
    parts = {"lora_A": (2, 4), "lora_B": (8, 2)}
    (folder / "adapter").mkdir()
    tensors = {f"base_model.model.model.a.{part}.weight": torch.randn(shape) for part, shape in parts.items()}
    save_file(
        {**tensors, "base_model.model.model.norm.weight": torch.randn(4)}, folder / "adapter" / "adapter_model.safetensors"
    )
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"a": 3}, "use_rslora": False,
        "modules_to_save": ["norm"], "init_lora_weights": True, "rank_pattern": {}, "target_modules": ["a"],
        "base_model_name_or_path": str(base),
    }  # fmt: skip
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))

    def action():
        with Checkpoint.open(base) as plain, open_model(folder / "adapter", plain) as model:
            read_all(model)

    return action


def test_adapters(tmp_path):
    action = an_adapter(tmp_path)
    assert campaign(tmp_path / "adapter", "adapter_model.safetensors", action, header=True) > 0


def test_configurations_of_adapters(tmp_path):
    action = an_adapter(tmp_path)
    assert campaign(tmp_path / "adapter", "adapter_config.json", action) > 0


def test_names_beside_the_weights(tmp_path):
    """Any name a file can have is copied, or left with a printable reason."""
    dice = random.Random(0)
    for _ in range(FILES // 20):
        folder = tmp_path / "m"
        folder.mkdir()
        for _ in range(20):
            length = dice.randrange(1, 30)
            name = bytes(dice.choice(b"abc.\x1b\n\xff\xc3\xa9 py-jsontxt") for _ in range(length)).strip(b".") or b"x"
            with open(bytes(folder) + b"/" + name, "wb") as file:
                file.write(bytes(dice.randrange(256) for _ in range(4)))
        found = sidecars.find(folder)
        assert found.note is None or found.note.isprintable()
        assert all(name.isprintable() and kind is None for name, kind in ((n, sidecars.kind_of(n)) for n in found.files))
        shutil.rmtree(folder)
