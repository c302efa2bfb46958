"""config.json: what differs in meaning is found and nothing else; nothing larger than the weights is ever built from it."""

import copy
import json

import pytest
import torch
from tiny import llama, save, weights

from liborth_cli.checkpoint.config import check_bounds, differences, warning
from liborth_cli.checkpoint.pair import has_own_head
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput

HUB = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
    "num_hidden_layers": 2, "intermediate_size": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 100,
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16", "max_position_embeddings": 131072, "transformers_version": "4.40.0",
}  # fmt: skip


def _differ(tmp_path, old, new):
    for name, config in (("old", old), ("new", new)):
        save(tmp_path / name, weights(), config=config)
    with Checkpoint.open(tmp_path / "old") as a, Checkpoint.open(tmp_path / "new") as b:
        return {d.key: (d.reference, d.finetuned) for d in differences(a, b)}, warning(a, b)


def _as_saved(config):
    from transformers import CONFIG_MAPPING

    return json.loads(CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config)).to_json_string(use_diff=False))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2", "mixtral", "phi", "gpt_neox"])
def test_another_spelling_of_the_same_is_no_difference(tmp_path, kind):
    """A hub config of a few keys against all that a later Transformers writes, defaults and derived keys included."""
    short = HUB if kind == "llama" else {"model_type": kind}
    assert _differ(tmp_path, short, _as_saved(short)) == ({}, None)


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"rms_norm_eps": 1e-6}, {"rms_norm_eps"}),
        ({"rope_theta": 1e6}, {"rope_parameters.rope_theta"}),
        ({"rope_scaling": {**HUB["rope_scaling"], "factor": 16.0}}, {"rope_parameters.factor"}),
        ({"hidden_act": "gelu"}, {"hidden_act"}),
        ({"max_position_embeddings": 4096}, {"max_position_embeddings"}),
        (
            {"transformers_version": "5.0", "use_cache": False, "bos_token_id": 7, "attention_dropout": 0.1, "vocab_size": 7},
            set(),
        ),
    ],
    ids=str,
)
def test_what_differs_in_meaning_is_named(tmp_path, change, keys):
    found, said = _differ(tmp_path, HUB, _as_saved({**HUB, **change}))
    assert set(found) == keys
    assert bool(said) == bool(keys)
    assert all(key in said for key in keys)


def test_a_family_that_nobody_knows_is_compared_as_written(tmp_path):
    found, _ = _differ(tmp_path, {"model_type": "own", "a": {"b": 1}, "off": False}, {"model_type": "own", "a": {"b": 2}})
    assert found == {"a.b": (1, 2)}


def test_split_and_inspect_say_it(cli, tmp_path):
    base, tuned = llama(tmp_path / "base"), llama(tmp_path / "tuned", seed=1)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert "differ in rms_norm_eps" in cli("split", base, tuned, "--rank", 2, "--dry-run")[2]
    assert "differ in rms_norm_eps" in json.loads(cli("inspect", base, tuned, "--json")[1])["notes"][0]


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**6}, {"num_hidden_layers": -1}, {"num_hidden_layers": "2"}, {"hidden_size": 0},
        {"hidden_size": 10**9}, {"hidden_size": 32.0}, {"num_attention_heads": 0}, {"num_attention_heads": True},
        {"vocab_size": 10**12}, {"intermediate_size": [48, "48"]}, {"max_position_embeddings": 10**12},
        {"text_config": {"num_hidden_layers": 10**6}}, {"num_local_experts": 10**8},
    ],
    ids=str,
)  # fmt: skip
def test_no_more_is_built_than_the_weights_can_be(cli, tmp_path, change):
    folder = llama(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    code, _, err = cli("curvature", folder, "--data", tmp_path / "d.jsonl", "-o", tmp_path / "out")
    assert code == 3
    assert "config.json says" in err
    assert len(err) < 300


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b'{"a":1,"a":2}', b"[" * 10**6, b'{"a":"\\ud800"}', b"\xff", b'{"a": 1}' * 2]
)
def test_what_is_no_object_is_refused(tmp_path, raw):
    save(tmp_path, weights())
    (tmp_path / "config.json").write_bytes(raw)
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(BadInput, match=r"config\.json"):
        check_bounds(checkpoint)


@pytest.mark.parametrize("own", [True, False])
def test_a_head_that_differs_from_the_embedding_is_run_as_it_is_stored(tmp_path, own):
    """config.json ties the two; Transformers 5 ties only what is equal, and so do we: the losses agree."""
    from transformers import AutoModelForCausalLM

    from liborth_cli.stream.build import build

    folder = llama(tmp_path / "m", tie=True)
    with Checkpoint.open(folder) as checkpoint:
        tensors = {name: checkpoint.load(name).clone() for name in checkpoint.tensors}
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = torch.randn(embedding.shape) if own else embedding.clone()
    save(folder, tensors, config=json.loads((folder / "config.json").read_text()))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with Checkpoint.open(folder) as checkpoint:
        assert has_own_head(checkpoint) is own
        model = build(checkpoint, torch.float32)
    assert (model.lm_head.weight is not model.model.embed_tokens.weight) is own
    assert (loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()) is own
