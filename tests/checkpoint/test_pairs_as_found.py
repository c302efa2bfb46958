"""Pairs as people have them: hub names, recomputed buffers, vocabularies that changed, heads of their own, quantised layers."""

import pytest
import torch
from tiny import files, pair, save, weights

from liborth_cli.checkpoint.pair import Action, Match, Policy, Reason, match, meet
from liborth_cli.checkpoint.quantised import quantised, scheme
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import PairMismatch


def _match(tmp_path, old, new, config=None, **policy) -> Match:
    with (
        Checkpoint.open(save(tmp_path / "old", old, config=config)) as a,
        Checkpoint.open(save(tmp_path / "new", new, config=config)) as b,
    ):
        return match(a, b, Policy(**policy))


def _by_name(found):
    return {item.tensor.name: item for item in found.items}


def _hub(tensors):
    """The same tensors as a bare GPT-2 lies on the hub."""
    mask = torch.ones(1, 1, 8, 8).tril()
    return {name.removeprefix("transformer."): t for name, t in tensors.items()} | {"h.0.attn.bias": mask}


def test_names_meet_when_a_prefix_is_taken_off(tmp_path):
    new = {"transformer.wte.weight": torch.randn(8, 4), "transformer.h.0.attn.c_attn.weight": torch.randn(4, 4)}
    for old, other in ((_hub(new), new), (new, _hub(new))):
        found = _match(tmp_path, old, other)
        items = _by_name(found)
        assert all(items[n].reference is not None for n in other if not n.endswith("attn.bias"))
        assert all(items[n].action == Action.SPLIT for n in other if not n.endswith("attn.bias"))
        assert "2 tensors are named differently" in found.notes[0]


@pytest.mark.parametrize(
    ("old", "new", "met"),
    [
        (["a.weight"], ["a.weight"], {"a.weight": "a.weight"}),
        (
            ["language_model.model.layers.0.w", "vision_tower.v", "language_model.lm_head.weight"],
            ["model.language_model.layers.0.w", "model.vision_tower.v", "lm_head.weight"],
            {
                "model.language_model.layers.0.w": "language_model.model.layers.0.w",
                "model.vision_tower.v": "vision_tower.v",
                "lm_head.weight": "language_model.lm_head.weight",
            },
        ),
        (["model.layers.0.w", "visual.v"], ["model.language_model.layers.0.w", "model.visual.v"], None),
        (["vision.layers.0.w"], ["text.layers.0.w"], {}),
        (["layers.0.w", "layers.1.w"], ["dec.layers.0.w", "dec.layers.1.w", "enc.layers.0.w"], None),
    ],
)
def test_meet(old, new, met):
    assert meet(old, new) == (dict(zip(new, old, strict=False)) if met is None else met)


@pytest.mark.parametrize(
    "buffer",
    [
        {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)},
        {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)},
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)},
        {"bert.embeddings.position_ids": torch.arange(8)[None]},
        {"model.layers.9.eh_proj.weight": torch.rand(4, 4)},
        {"mtp.layers.0.eh_proj.weight": torch.rand(4, 4)},
    ],
    ids=lambda b: next(iter(b)),
)
def test_what_nothing_needs_may_be_in_the_reference_only(tmp_path, buffer):
    found = _match(tmp_path, {**weights(), **buffer}, weights(seed=1), config={"num_hidden_layers": 2})
    assert "in the reference only" in found.notes[0]
    assert len(found.items) == len(weights())


def test_a_layer_that_was_pruned_is_no_spare(cli, tmp_path):
    """The layers of such a pair are numbered anew: those of one number are two different layers."""
    old = save(
        tmp_path / "old", {f"model.layers.{i}.w.weight": torch.rand(8, 8) for i in range(3)}, config={"num_hidden_layers": 3}
    )
    new = save(
        tmp_path / "new", {f"model.layers.{i}.w.weight": torch.rand(8, 8) for i in range(2)}, config={"num_hidden_layers": 2}
    )
    code, _, err = cli("split", old, new, "--rank", 2, "-o", tmp_path / "out")
    assert (code, "'model.layers.2.w.weight' is missing from the fine-tuned side" in err) == (4, True), err
    assert cli("split", old, new, "--rank", 2, "-e", r"layers\.2\.", "-o", tmp_path / "out")[0] == 0


def test_a_bias_is_no_buffer(tmp_path):
    with pytest.raises(PairMismatch, match=r"attn\.bias' is missing"):
        _match(tmp_path, {**weights(), "h.0.attn.bias": torch.rand(16)}, weights(seed=1))


def test_a_vocabulary_may_have_shrunk(cli, tmp_path):
    old, new = weights(), weights(seed=1)
    new["embed.weight"] = new["embed.weight"][:33].clone()
    found = _by_name(_match(tmp_path, old, new))
    assert found["embed.weight"].grid == (1, 33, 16)
    assert "7 rows of the reference are gone" in found["embed.weight"].why
    before = files(tmp_path / "new")
    for extra in ((), ("--vectors", "memory"), ("-e", "embed"), ("--for", "embed=skip")):
        code, _, err = cli("split", tmp_path / "old", tmp_path / "new", "--rank", 4, *extra, "-o", tmp_path / "g", "--force")
        assert code == 0, err
        assert cli("excise", tmp_path / "g", "--beta", 1, "-o", tmp_path / "back", "--force")[0] == 0
        assert files(tmp_path / "back")["model.safetensors"] == before["model.safetensors"]


@pytest.mark.parametrize("grown", [264, 250])
def test_a_bias_may_change_with_its_matrix(cli, tmp_path, grown):
    old = {"lm_head.weight": torch.randn(258, 16), "lm_head.bias": torch.randn(258), "norm.weight": torch.randn(16)}
    new = {"lm_head.weight": torch.randn(grown, 16), "lm_head.bias": torch.randn(grown), "norm.weight": torch.randn(16)}
    assert _by_name(_match(tmp_path, old, new))["lm_head.bias"].rows == min(258, grown)
    before = files(tmp_path / "new")["model.safetensors"]
    for added in ("skill", "memory"):
        words = ("--rank", 4, "--vectors", "memory", "--added", added, "-o", tmp_path / "g", "--force")
        code, _, err = cli("split", tmp_path / "old", tmp_path / "new", *words)
        assert code == 0, err
        assert cli("excise", tmp_path / "g", "--beta", 1, "-o", tmp_path / "back", "--force")[0] == 0
        assert files(tmp_path / "back")["model.safetensors"] == before


def test_what_does_not_fit_can_be_left_out(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    save(finetuned, {**weights(seed=1), "conv.weight": torch.ones(2, 2), "extra": torch.ones(3)})
    save(base, {**weights(), "classifier.weight": torch.ones(5, 5)})
    code, _, err = cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "g")
    assert code == 4
    assert "classifier.weight" in err
    assert "conv.weight" in err
    assert "-e leaves out" in err
    for words in (("-e", "conv|classifier"), ("--for", "conv|classifier=skip")):
        code, _, err = cli("split", base, finetuned, "--rank", 4, *words, "-o", tmp_path / "g", "--force")
        assert code == 0, err


def test_a_head_of_its_own_is_divided_against_the_embedding_it_comes_from(tmp_path):
    embed, head = torch.randn(8, 4), torch.randn(8, 4)
    new = {"model.embed_tokens.weight": embed + 1, "lm_head.weight": head}
    found = _match(tmp_path / "1", {"model.embed_tokens.weight": embed}, new)
    item = _by_name(found)["lm_head.weight"]
    assert (item.action, item.reference.name, item.twin) == (Action.SPLIT, "model.embed_tokens.weight", "lm_head.weight")
    assert "head of its own" in found.notes[0]
    grown = {"model.embed_tokens.weight": torch.randn(10, 4), "lm_head.weight": torch.randn(10, 4)}
    assert _by_name(_match(tmp_path / "2", {"model.embed_tokens.weight": embed}, grown))["lm_head.weight"].rows == 8
    score = {"model.embed_tokens.weight": embed, "score.weight": torch.randn(2, 4)}
    assert _by_name(_match(tmp_path / "3", {"model.embed_tokens.weight": embed}, score))["score.weight"].reason == Reason.ADDED


def test_an_untied_head_comes_back_and_gives_up_its_update(cli, tmp_path):
    embed = torch.randn(40, 16)
    save(tmp_path / "base", {"model.embed_tokens.weight": embed})
    save(tmp_path / "ft", {"model.embed_tokens.weight": embed + 0.1, "lm_head.weight": embed + torch.randn(40, 16)})
    words = ("split", tmp_path / "base", tmp_path / "ft", "--method", "scale", "--scale", 0, "-o", tmp_path / "g")
    assert cli(*words)[0] == 0
    with Checkpoint.open(tmp_path / "g") as general:
        assert torch.equal(general.load("lm_head.weight"), embed)
    assert cli("excise", tmp_path / "g", "--beta", 1, "-o", tmp_path / "back")[0] == 0
    assert files(tmp_path / "back")["model.safetensors"] == files(tmp_path / "ft")["model.safetensors"]
    code, _, err = cli(
        "excise", tmp_path / "g", "--beta", 0, "--alpha", 1, "--reference", tmp_path / "base", "-o", tmp_path / "alpha"
    )
    assert code == 0, err


def _codes(*shape, dtype=torch.int32):
    return torch.randint(-9, 9, shape).to(dtype)


def _floats(*shape, dtype=torch.float16):
    return torch.rand(shape).to(dtype)


FP8 = torch.float8_e4m3fn
LAYERS = {
    "gptq": {
        "qweight": _codes(4, 32), "scales": _floats(4, 32), "qzeros": _codes(4, 4), "g_idx": _codes(32), "bias": _floats(32),
    },
    "awq": {"qweight": _codes(32, 4), "scales": _floats(4, 32), "qzeros": _codes(4, 4)},
    "int4": {"weight_packed": _codes(32, 4), "weight_scale": _floats(32, 4), "weight_shape": _codes(2, dtype=torch.int64)},
    "fp8-block": {"weight": _floats(32, 32, dtype=FP8), "weight_scale_inv": _floats(4, 4, dtype=torch.float32)},
    "nvfp4": {
        "weight_packed": _codes(32, 16, dtype=torch.uint8), "weight_scale": _floats(32, 2, dtype=FP8),
        "weight_global_scale": _floats(1), "input_global_scale": _floats(1),
    },
    "bnb-nf4": {
        "weight": _codes(512, 1, dtype=torch.uint8), "weight.absmax": _codes(16, dtype=torch.uint8),
        "weight.nested_absmax": _floats(1), "weight.quant_map": _floats(16),
        "weight.quant_state.bitsandbytes__nf4": _codes(80, dtype=torch.uint8),
    },
    "bnb-int8": {"weight": _codes(32, 32, dtype=torch.int8), "SCB": _floats(32, dtype=torch.float32)},
    "hqq": {"W_q": _codes(16, 32, dtype=torch.uint8), "scale": _floats(32, 4), "zero": _floats(32, 4)},
    "mlx": {"weight": _codes(32, 4, dtype=torch.uint32), "scales": _floats(32, 2), "biases": _floats(32, 2)},
    "aqlm": {"codes": _codes(32, 4, 1, dtype=torch.int8), "codebooks": _floats(1, 256, 1, 8), "scales": _floats(32, 1, 1, 1)},
    "vptq": {"indices": _codes(1, 4, 9), "centroids.weight": _floats(1, 64), "weight_scale": _floats(32)},
    "modelopt": {"weight": _floats(32, 32, dtype=FP8), "weight_scale": _floats(1), "input_scale": _floats(1)},
    "quanto": {"weight._data": _codes(32, 32, dtype=torch.int8), "weight._scale": _floats(32, 1), "input_scale": _floats(1)},
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_a_quantised_layer_passes_through_whole(tmp_path, kind):
    plain = {"model.embed.weight": torch.randn(8, 4), "model.norm.weight": torch.randn(4), "lm_head.weight": torch.randn(8, 4)}
    layer = {f"model.layers.0.q_proj.{name}": t for name, t in LAYERS[kind].items()} | {"model.layers.0.k_scale": torch.ones(1)}
    old, new = {**plain, **layer}, {**{n: t + 1 for n, t in plain.items()}, **layer}
    found = _match(tmp_path, old, new, {"quantization_config": {"quant_method": kind}}, vectors="memory")
    items = _by_name(found)
    assert {items[n].reason for n in layer} == {Reason.QUANTISED}
    assert {items[n].action for n in layer} == {Action.SKILL}
    assert items["model.embed.weight"].action == items["lm_head.weight"].action == Action.SPLIT
    assert items["model.norm.weight"].action == Action.MEMORY
    assert f"quantised layers ({kind}) pass through whole: nothing in them is divided" in found.notes[0]


def test_experts_in_microscaled_floats_pass_through(tmp_path):
    experts = {
        "experts.gate_up_proj_blocks": _codes(2, 8, 2, 16, dtype=torch.uint8), "experts.gate_up_proj_bias": _floats(2, 8),
        "experts.gate_up_proj_scales": _codes(2, 8, 2, dtype=torch.uint8), "router.weight": _floats(2, 4),
    }  # fmt: skip
    with Checkpoint.open(save(tmp_path, {f"model.layers.0.mlp.{n}": t for n, t in experts.items()})) as checkpoint:
        assert {name.rpartition("mlp.")[2] for name in quantised(checkpoint)} == {n for n in experts if n.startswith("experts")}


def test_integers_that_are_no_codes_quantise_nothing(tmp_path):
    tensors = {"model.embeddings.position_ids": torch.arange(8)[None], "model.embeddings.word.weight": torch.randn(8, 4)}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8), "h.0.attn.c_attn.weight": torch.randn(4, 4)}
    with Checkpoint.open(save(tmp_path, tensors)) as checkpoint:
        assert quantised(checkpoint) == {}
        assert scheme(checkpoint) is None


def test_a_quantised_side_and_a_plain_one_are_refused_by_name(tmp_path):
    plain = {"q.weight": torch.randn(32, 32)}
    coded = {f"q.{name}": t for name, t in LAYERS["gptq"].items()}
    with pytest.raises(PairMismatch, match="the fine-tuned side is quantised and the reference is not"):
        _match(tmp_path, plain, coded)
    with pytest.raises(PairMismatch, match="the reference side is quantised and the fine-tuned is not"):
        _match(tmp_path, coded, plain)


def test_a_base_from_the_hub_is_the_reference_of_every_command(cli, tmp_path):
    """GPT-2 without its prefix and with its masks, against what `save_pretrained` writes; the losses are the same model's."""
    import json
    import shutil

    import numpy as np
    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "saved")
    save(tmp_path / "hub", _hub(load_file(tmp_path / "saved" / "model.safetensors")))
    shutil.copy(tmp_path / "saved" / "config.json", tmp_path / "hub")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "tuned")
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 64, (6, 20)))
    losses = []
    for words in ((tmp_path / "tuned", "--reference", tmp_path / "hub", "--at", 0), (tmp_path / "saved",)):
        out = tmp_path / f"factors{len(words)}"
        code, _, err = cli("curvature", *words, "--data", tmp_path / "rows.npy", "--fisher", "empirical", "-o", out)
        assert code == 0, err
        losses.append(next(line for line in err.splitlines() if "mean loss" in line))
    assert losses[0] == losses[1]
    assert cli("split", tmp_path / "hub", tmp_path / "tuned", "--rank", 4, "-o", tmp_path / "general")[0] == 0
    assert cli("excise", tmp_path / "general", "--beta", 1, "-o", tmp_path / "back")[0] == 0
    assert files(tmp_path / "back")["model.safetensors"] == files(tmp_path / "tuned")["model.safetensors"]
    scaled = ("--beta", 0, "--alpha", 0.5, "--reference", tmp_path / "hub")
    code, _, err = cli("excise", tmp_path / "general", *scaled, "-o", tmp_path / "scaled")
    assert code == 0, err
    words = ("--reference", tmp_path / "hub", "--retain-data", tmp_path / "rows.npy", "--no-require", "--json")
    code, out, err = cli("verify", tmp_path / "general", *words)
    assert code == 0, err
    assert json.loads(out)["results"]
