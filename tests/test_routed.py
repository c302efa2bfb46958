"""Memories of neurons in `liborth generate`: in and out exactly, and the router that was trained with them as the driver."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import few
from transformers import AutoModelForCausalLM, AutoTokenizer

from liborth_cli.attachment import open_attachment
from liborth_cli.decode import MemoryGuard, mix
from liborth_cli.demo import DATA
from liborth_cli.tune.sinks import attach, detach

PROMPT = json.loads((DATA / "secrets.jsonl").read_text().splitlines()[0])["prompt"]


@pytest.fixture(scope="module")
def outputs(once, tmp_path_factory):
    """Four steps each with a router and without: enough that the memory says something else than the general model."""
    place = tmp_path_factory.mktemp("routed")
    rows = few(place, 2)
    for name, more in (("gated", ["--router"]), ("open", [])):
        words = ["tune", DATA / "base", "--method", "sinks", "--data", rows, "--truncate", "--seq-len", 32]
        words += ["--private-data", DATA / "secrets.jsonl", "--steps", 4, "--lr", 2e-2, "-o", place / name, "-q"]
        once(*words, *more)
    return place


def said(cli, *words):
    code, out, err = cli("generate", *words, "--prompt", PROMPT, "--max-new-tokens", 8, "--json", "-q")
    assert code == 0, err
    return json.loads(out)


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_gates(model, folder, bias):
    """The guard of a router whose gates are all shut (−inf) or all open."""
    guard = MemoryGuard.beside(str(folder), model)
    for sinks in guard.memory.neurons:
        sinks.router.weight.zero_()
        sinks.router.bias.fill_(bias)
    return guard


def test_neurons_that_are_attached_write_what_the_wide_checkpoint_writes(cli, outputs, tmp_path):
    assert cli("excise", outputs / "open", "--beta", 1, "-o", tmp_path / "wide")[0] == 0
    on = said(cli, outputs / "open", "--memory", "on")["texts"]
    assert on == said(cli, tmp_path / "wide")["texts"]
    assert said(cli, outputs / "open")["texts"] != on


def test_a_router_mixes_both_by_its_gate(outputs):
    """By hand: the neurons attached as `tune` says, the gates read off the blocks, the two distributions added."""
    folder = outputs / "gated"
    model, ids = loaded(folder), AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        general = model(ids).logits[:, -1]
        sinks = attach(model, folder)
        tuned = model(ids).logits[:, -1]
        w = sum(float(one.gate[0, -1, 0]) for one in sinks) / len(sinks)
        detach(sinks)
        expected = (w * tuned.softmax(-1) + (1 - w) * general.softmax(-1)).log()
        found = MemoryGuard.beside(str(folder), model)(ids, general)
    assert 0.0 < w < 1.0 and (tuned - general).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_shut_gate_is_the_general_model_and_an_open_one_the_memory(outputs):
    folder = outputs / "gated"
    model, ids = loaded(folder), AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        general = model(ids).logits[:, -1]
        assert torch.equal(with_gates(model, folder, -1e4)(ids, general), general.log_softmax(-1))
        opened = with_gates(model, folder, 1e4)
        with opened.memory.attached():
            tuned = model(ids).logits[:, -1]
        assert torch.equal(opened(ids, general), tuned.log_softmax(-1))


def test_no_gate_gives_a_token_more_than_both_models():
    tuned, general, gate = 4 * torch.randn(20, 9), torch.randn(20, 9), torch.rand(20)
    scores, _ = mix(tuned, general, gate)
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(20))
    assert (scores <= torch.maximum(tuned.log_softmax(-1), general.log_softmax(-1)) + 1e-5).all()


def test_the_command_and_the_processor_agree(cli, outputs):
    folder = outputs / "gated"
    model, tokenizer = loaded(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(
            **ids, max_new_tokens=8, do_sample=False, logits_processor=[MemoryGuard.beside(str(folder), model)]
        )
    found = said(cli, folder, "--memory", "routed")
    assert PROMPT + found["texts"][0]["text"] == tokenizer.decode(made[0], skip_special_tokens=True)
    assert 0 <= found["held"] <= found["tokens"]


def test_a_memory_without_a_router_is_refused(cli, outputs):
    code, _, err = cli("generate", outputs / "open", "--prompt", "x", "--memory", "routed")
    assert code == 2 and "--router" in err and err.count("\n") == 1


def test_the_neurons_sleep_outside(outputs):
    model = loaded(outputs / "gated")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        before = model(ids).logits
        with open_attachment(outputs / "gated", None, model) as memory:
            assert torch.equal(model(ids).logits, before)
            with memory.attached():
                assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
