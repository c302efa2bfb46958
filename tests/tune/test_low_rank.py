"""Low-rank updates beside layers that stay: against the formula, against peft's, and gone when they are merged."""

import copy

import numpy as np
import pytest
import torch
from tiny import llama

from liborth_cli.stream.texts import Row
from liborth_cli.tune.data import Example, batch_rows
from liborth_cli.tune.loop import train
from liborth_cli.tune.low_rank import SCALE, LowRank, linear_layers, trained
from liborth_cli.tune.options import LoopOptions, Schedule

OPTIONS = LoopOptions(steps=3, batch_size=2, rate=1e-2, schedule=Schedule.CONSTANT, warmup=0.0)


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    if request.param == "gpt2":
        torch.manual_seed(0)
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
        return GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()
    return AutoModelForCausalLM.from_pretrained(llama(tmp_path / "model"), dtype=torch.float32).eval()


def _rows():
    draw = np.random.default_rng(0)
    return [Example.of(Row(draw.integers(0, 64, 9), np.ones(8, bool), 1.0, "row")) for _ in range(4)]


def _logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None]).logits


def test_updates_begin_at_nothing_and_merged_they_say_what_they_said_beside_the_layers(model):
    before, start = _logits(model), copy.deepcopy(model)
    names = linear_layers(model)
    method = LowRank(model, 3, seed=0)
    assert torch.equal(_logits(model), before), "B is zero"
    train(method, _rows(), OPTIONS)
    model.eval()
    beside = _logits(model)
    assert not torch.allclose(beside, before, atol=1e-3)
    method.finish()
    torch.testing.assert_close(_logits(model), beside, atol=1e-4, rtol=1e-4)
    assert all(not module._forward_hooks for module in model.modules())
    moved = {n for (n, new), old in zip(model.named_parameters(), start.parameters(), strict=True) if not torch.equal(new, old)}
    assert moved == {f"{name}.weight" for name in names}
    for name in names:
        delta = model.get_parameter(f"{name}.weight") - start.get_parameter(f"{name}.weight")
        assert torch.linalg.matrix_rank(delta, rtol=1e-4) <= 3


def test_it_is_what_peft_trains(model):
    """The same rows, the same rate, the same first A: the merged weights are peft's."""
    peft = pytest.importorskip("peft")
    from transformers.pytorch_utils import Conv1D

    names, mine = linear_layers(model), copy.deepcopy(model)
    turned = any(isinstance(module, Conv1D) for module in model.modules())
    config = peft.LoraConfig(r=3, lora_alpha=int(3 * SCALE), target_modules=list(names), fan_in_fan_out=turned)
    theirs = peft.get_peft_model(model, config)
    method = LowRank(mine, 3, seed=0)
    for name, module in theirs.base_model.model.named_modules():
        if name in names:
            method.parameters[f"{name}.A"].data.copy_(module.lora_A["default"].weight.data)
    train(method, _rows(), OPTIONS)
    method.finish()
    optimiser = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=OPTIONS.rate, weight_decay=0.0)
    for step in range(OPTIONS.steps):
        rows = batch_rows(_rows(), step, OPTIONS.batch_size, OPTIONS.seed)
        ids = torch.tensor(np.array([row.ids for row in rows]))
        logits = theirs(input_ids=ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    merged = theirs.merge_and_unload()
    for name in names:
        torch.testing.assert_close(
            mine.get_parameter(f"{name}.weight"), merged.get_parameter(f"{name}.weight"), atol=2e-5, rtol=1e-4
        )


def test_rank_nought_trains_all_weights(model):
    assert set(trained(model, 0, 0).parameters) == {name for name, _ in model.named_parameters()}
    assert all(name.endswith((".A", ".B")) for name in trained(model, 2, 0).parameters)
