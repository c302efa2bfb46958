"""An adapter directory as the fine-tuned side: the merged weights are PEFT's, whatever is not understood is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import files, llama, save

from liborth_cli.checkpoint.adapter import Adapted, open_model
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput, LiborthError, PairMismatch

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapter(folder, base, **settings):
    """Save a random adapter of a base through PEFT; return its folder and what PEFT makes of the two."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **settings}))
    for name, parameter in tuned.named_parameters():
        if "magnitude" in name or "modules_to_save" in name:
            parameter.data.mul_(1 + 0.3 * torch.rand(parameter.shape))
    tuned.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return folder, PeftModel.from_pretrained(again, folder).merge_and_unload().state_dict()


def gpt2(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def compare(base, folder, merged):
    with Checkpoint.open(base) as plain, open_model(folder, plain) as model:
        assert isinstance(model, Adapted)
        changed = 0
        for name in model.tensors:
            mine, theirs = model.load(name), merged[name]
            changed += name not in plain.tensors or not torch.equal(mine, plain.load(name))
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        return changed


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 3},
        {"use_rslora": True},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 32}},
        {"target_modules": [*TARGETS, "embed_tokens"]},
        {"modules_to_save": ["lm_head", "norm"]},
    ],
    ids=str,
)
def test_the_merged_weights_are_pefts(tmp_path, settings):
    base = llama(tmp_path / "base")
    assert compare(base, *adapter(tmp_path / "adapter", base, **settings)) >= 6


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_weights_that_lie_the_other_way_round_too(tmp_path, settings):
    """GPT-2's linear layers are stored (d_in, d_out); one of them is square."""
    base = gpt2(tmp_path / "base")
    assert compare(base, *adapter(tmp_path / "a", base, **settings, target_modules=["c_attn", "c_proj", "c_fc"])) == 8


def test_a_base_from_the_hub_has_other_names(tmp_path):
    base = gpt2(tmp_path / "base")
    folder, merged = adapter(tmp_path / "a", base, target_modules=["c_attn"])
    old = {name.removeprefix("transformer."): t for name, t in load_file(base / "model.safetensors").items()}
    config = json.loads((base / "config.json").read_text())
    hub = save(tmp_path / "hub", old, config=config)
    with Checkpoint.open(hub) as plain, open_model(folder, plain) as model:
        torch.testing.assert_close(model.load("h.0.attn.c_attn.weight"), merged["transformer.h.0.attn.c_attn.weight"])


def test_every_way_of_reading_gives_the_same_bits(tmp_path, monkeypatch):
    from liborth_cli.checkpoint import adapter as module

    monkeypatch.setattr(module, "PIECE", 100)
    base = llama(tmp_path / "base")
    folder, _ = adapter(tmp_path / "a", base, use_dora=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    with Checkpoint.open(base) as plain, open_model(folder, plain) as model:
        whole = model.read(name).tobytes()
        for step in (1, 7, 400, 4096):
            parts = [model.read(name, i, min(i + step, len(whole))).tobytes() for i in range(0, len(whole), step)]
            assert b"".join(parts) == whole


def test_an_adapter_is_split_like_the_model_it_stands_for(cli, tmp_path):
    base = llama(tmp_path / "base")
    folder, merged = adapter(tmp_path / "adapter", base, modules_to_save=["lm_head"])
    code, _, err = cli("split", base, folder, "--rank", 2, "-o", tmp_path / "general")
    assert code == 0, err
    assert cli("excise", tmp_path / "general", "--beta", 1, "-o", tmp_path / "back")[0] == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.allclose(back[name], merged[name], atol=1e-6) for name in back)
    assert json.loads((tmp_path / "general" / "config.json").read_text())["model_type"] == "llama"
    inputs = json.loads((tmp_path / "general" / "liborth.manifest.json").read_text())["inputs"]["finetuned"]
    assert inputs["title"] == "adapter"
    assert set(inputs["files"]) == {"model.safetensors", "adapter_model.safetensors"}
    code, out, err = cli("inspect", base, folder, "--json")
    assert code == 0, err
    assert json.loads(out)["tensors"]["lm_head.weight"]["action"] == "split"
    code, _, err = cli("verify", tmp_path / "general", "--integrity", "--reference", base, "--finetuned", folder)
    assert code == 0, err


def test_the_head_of_a_tied_base_becomes_one_of_its_own(tmp_path):
    base = llama(tmp_path / "base", tie=True)
    folder, _ = adapter(tmp_path / "adapter", base)
    extra = load_file(folder / "adapter_model.safetensors") | {"base_model.model.lm_head.weight": torch.rand(64, 32)}
    save_file(extra, folder / "adapter_model.safetensors")
    with Checkpoint.open(base) as plain, open_model(folder, plain) as model:
        assert torch.equal(model.load("lm_head.weight"), extra["base_model.model.lm_head.weight"])
        assert list(model.tensors)[-1] == "lm_head.weight"
        assert model.frame("model.safetensors") is None


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_what_changes_one_of_two_tied_matrices_changes_one(tmp_path, settings):
    """PEFT trains and runs it so; its merge_and_unload would change both, and give another model."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    base, ids = llama(tmp_path / "base", tie=True), torch.arange(20)[None]
    folder, _ = adapter(tmp_path / "adapter", base, **settings)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)(ids).logits
        with Checkpoint.open(base) as plain, open_model(folder, plain) as model:
            whole = {name: model.load(name).view(info.shape) for name, info in model.tensors.items()}
        mine = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, tie_word_embeddings=False))
        mine.load_state_dict(whole)
        torch.testing.assert_close(mine(ids).logits, theirs, rtol=1e-5, atol=1e-5)


def test_an_output_says_that_its_head_is_its_own(cli, tmp_path):
    """Loaders that go by config.json would tie it to the table of tokens."""
    from transformers import AutoModelForCausalLM

    base = llama(tmp_path / "base", tie=True)
    folder, _ = adapter(tmp_path / "adapter", base, target_modules=["q_proj", "lm_head"])
    out, whole = tmp_path / "out", tmp_path / "whole"
    code, _, err = cli("split", base, folder, "--method", "scale", "--scale", 0.5, "-o", out)
    assert code == 0, err
    assert "tie_word_embeddings is false" in err
    assert cli("excise", out, "--beta", 1, "-o", whole)[0] == 0
    old, *new = (json.loads((where / "config.json").read_text()) for where in (base, out, whole))
    assert old["tie_word_embeddings"] is True
    assert new == [old | {"tie_word_embeddings": False}] * 2
    loaded = AutoModelForCausalLM.from_pretrained(whole)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert cli("verify", out, "--integrity")[0] == 0


@pytest.mark.parametrize(("make", "targets"), [(gpt2, ["c_attn", "c_proj"]), (llama, ["q_proj", "o_proj"])])
@pytest.mark.parametrize("says", [True, False])
def test_how_a_square_weight_lies_is_the_models_to_say(tmp_path, make, targets, says):
    """PEFT corrects fan_in_fan_out by the class of each layer; what is stored is the correction for the last one."""
    base = make(tmp_path / "base")
    folder, merged = adapter(tmp_path / "adapter", base, target_modules=targets)
    edit(folder, {"fan_in_fan_out": says})
    assert compare(base, folder, merged) >= 4


def test_the_base_is_found_by_the_name_in_the_adapter(cli, tmp_path):
    base = llama(tmp_path / "base")
    folder, merged = adapter(tmp_path / "adapter", base)
    with open_model(folder) as model:
        name = "model.layers.0.self_attn.q_proj.weight"
        torch.testing.assert_close(model.load(name), merged[name])
    for change, says in (
        ({"base_model_name_or_path": None}, "does not name its base"),
        ({"base_model_name_or_path": "./no"}, "no such"),
    ):
        edit(folder, change)
        with pytest.raises(LiborthError, match=says):
            open_model(folder)
    code, _, err = cli("split", folder, "--one-checkpoint", "--rank", 2, "-o", tmp_path / "out")
    assert code == 2
    assert "liborth split BASE ADAPTER" in err


def edit(folder, change):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'"),
        ({"init_lora_weights": "pissa_niter_16"}, "initialised by 'pissa_niter_16', which changes the base"),
        ({"lora_bias": True}, "an adapter with lora_bias"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "an adapter with target_parameters"),
        ({"layer_replication": [[0, 2]]}, "an adapter with layer_replication"),
        ({"trainable_token_indices": [1]}, "an adapter with trainable_token_indices"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "an adapter with the alpha_pattern '(a+)+$'"),
        ({"alpha_pattern": {"(": 2}}, "an adapter with the alpha_pattern"),
        ({"r": "many"}, "field 'r'"),
        ({"lora_alpha": None}, "field 'lora_alpha'"),
        ({"use_dora": True}, "its parts are not those of a LoRA layer"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(cli, tmp_path, change, says):
    base = llama(tmp_path / "base")
    folder, _ = adapter(tmp_path / "adapter", base)
    edit(folder, change)
    before = files(tmp_path)
    code, _, err = cli("split", base, folder, "--rank", 2, "-o", tmp_path / "out")
    assert code == 3, err
    assert says in err
    assert err.count("error: ") == 1
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": (4, 32)}, "has no such layer"),
        (
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (4, 31)},
            "and 'model.layers.0.self_attn.q_proj.weight'",
        ),
        ({"base_model.model.lm_head.weight": (65, 32)}, "which the base's config does not know of"),
        ({"base_model.model.score.weight": (2, 32)}, "has no such tensor"),
    ],
)
def test_an_adapter_of_another_base_is_refused(tmp_path, tensors, says):
    base = llama(tmp_path / "base")
    folder, _ = adapter(tmp_path / "adapter", base)
    stored = load_file(folder / "adapter_model.safetensors")
    for name, shape in tensors.items():
        stored[name] = torch.rand(shape)
        if "lora_A" in name:
            stored.setdefault(name.replace("lora_A", "lora_B"), torch.rand(32, 4))
    save_file(stored, folder / "adapter_model.safetensors")
    with Checkpoint.open(base) as plain, pytest.raises(PairMismatch) as refused:
        open_model(folder, plain)
    assert says in str(refused.value)


def test_parts_of_another_kind_are_refused_by_name(tmp_path):
    base = llama(tmp_path / "base")
    folder, _ = adapter(tmp_path / "adapter", base)
    stored = load_file(folder / "adapter_model.safetensors")
    save_file({**stored, "base_model.model.x.lora_B.bias": torch.rand(4)}, folder / "adapter_model.safetensors")
    with Checkpoint.open(base) as plain, pytest.raises(BadInput, match=r"lora_B\.bias' is not understood"):
        open_model(folder, plain)


def test_a_quantised_base_is_refused(tmp_path):
    base = llama(tmp_path / "base")
    folder, _ = adapter(tmp_path / "adapter", base)
    coded = save(tmp_path / "coded", {"q.weight": torch.ones(4, 4, dtype=torch.uint8), "q.weight_scale": torch.ones(4)})
    with Checkpoint.open(coded) as plain, pytest.raises(PairMismatch, match="quantised"):
        open_model(folder, plain)


def test_curvature_and_verify_take_an_adapter_too(cli, tmp_path):
    """Its factors fit the split of the same pair; the tokenizer beside the adapter counts, or that of the base."""
    import numpy as np

    base = llama(tmp_path / "base")
    folder, _ = adapter(tmp_path / "adapter", base)
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 64, (6, 20)))
    words = ("--data", tmp_path / "rows.npy", "--fisher", "empirical")
    for extra in (("--reference", base, "--at", 0.5), ()):
        code, _, err = cli("curvature", folder, *words, *extra, "-o", tmp_path / f"at{len(extra)}")
        assert code == 0, err
    code, _, err = cli(
        "split", base, folder, "--method", "kfac", "--mass", 0.5, "--retain", tmp_path / "at0", "-o", tmp_path / "general"
    )
    assert code == 0, err
    named = ("--reference", base, "--finetuned", folder)
    code, out, err = cli(
        "verify", tmp_path / "general", *named, "--retain-data", tmp_path / "rows.npy", "--no-require", "--loads", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["results"]
