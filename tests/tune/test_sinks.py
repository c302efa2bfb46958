"""`tune --method sinks`: what is extra comes out exactly, goes in exactly, and every sequence meets its own neurons."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import files, llama, private, save

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput, PairMismatch, UsageError
from liborth_cli.tune import sinks as module
from liborth_cli.tune.data import Example, PaddedBatch, content
from liborth_cli.tune.network import Network
from liborth_cli.tune.options import Learns, LoraOptions, SinkOptions
from liborth_cli.tune.sinks import DualStream

ALL = ("--memory-learns", "all")


def gpt2(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=32)).save_pretrained(folder)
    return folder


def rows(place):
    from liborth_cli.stream.texts import DataFile, read_rows

    return read_rows([DataFile(place / "rows.npy")], None, 64, 16)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_neurons_come_out_and_go_in_exactly(family, tune, place, tmp_path, cli, logits):
    from transformers import AutoModelForCausalLM

    base = gpt2(tmp_path / "gpt2") if family == "gpt2" else place / "base"
    out = tune("sinks", "--sinks", 6, *ALL, base=base)
    for beta in (0, 1, 0.25):
        code, _, err = cli("excise", out, "--beta", beta, "-o", tmp_path / f"b{beta}")
        assert code == 0, err
    assert files(tmp_path / "b0")["model.safetensors"] == files(out)["model.safetensors"]
    assert "memory.safetensors" not in files(tmp_path / "b0")
    general, wide, quarter = (load_file(d / "model.safetensors") for d in (out, tmp_path / "b1", tmp_path / "b0.25"))
    memory = load_file(private(out) / "memory.safetensors")
    grown = 0
    for name, value in wide.items():
        old = general[name]
        assert torch.equal(value[tuple(slice(n) for n in old.shape)], old)
        if value.shape == old.shape:
            assert torch.equal(quarter[name], old)
            continue
        entry = next(key for key in memory if key.endswith("/" + name) and not key.startswith("sidecar"))
        axis = 1 if "columns" in entry else 0
        added = value.narrow(axis, old.shape[axis], 6)
        assert torch.equal(added, memory[entry]) and float(added.abs().max()) > 0
        factor = 0.25 if entry.startswith("scaled") else 1.0
        assert torch.equal(quarter[name].narrow(axis, old.shape[axis], 6), added * factor)
        grown += 1
    assert grown == 6
    ids = np.load(place / "rows.npy")[:3]
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        before = model(torch.from_numpy(ids)).logits
        for beta, folder in ((1.0, "b1"), (0.25, "b0.25")):
            attached = module.attach(model, out, beta)
            assert torch.allclose(model(torch.from_numpy(ids)).logits, logits(tmp_path / folder, ids), atol=1e-5)
            module.detach(attached)
        assert torch.equal(model(torch.from_numpy(ids)).logits, before)
    assert not torch.allclose(before, logits(tmp_path / "b1", ids), atol=1e-3)


def test_sharded_checkpoints_keep_their_layout(tune, place, tmp_path, cli, logits):
    tensors = load_file(place / "base" / "model.safetensors")
    base = save(tmp_path / "sharded", tensors, 3, json.loads((place / "base" / "config.json").read_text()))
    words = ("--sinks", 6, *ALL)
    whole, parts = tune("sinks", *words, name="whole"), tune("sinks", *words, base=base, name="parts")
    assert len(list(private(parts).glob("memory-*.safetensors"))) == 3
    for out in (whole, parts):
        assert cli("excise", out, "--beta", 1, "-o", tmp_path / f"{out.name}1")[0] == 0
    ids = np.load(place / "rows.npy")[:2]
    assert torch.equal(logits(tmp_path / "whole1", ids), logits(tmp_path / "parts1", ids))


def test_training_begins_at_the_base_and_others_get_no_gradient(place):
    with Checkpoint.open(place / "base") as base:
        network = Network(base, torch.device("cpu"))
        some = rows(place)[:1]
        batch = PaddedBatch.of(some, torch.device("cpu"))
        plain = float(network.model.train()(input_ids=batch.ids, labels=None).logits.sum())
        method = DualStream(network, SinkOptions(count=8, active=0.25, learns=Learns.ALL, seed=3), LoraOptions())
        network.model.train()
        lesson = method.lessons([Example.of(row) for row in some], 0)[0]
        loss, _ = method.loss(batch, lesson)
        assert float(network.model(input_ids=batch.ids).logits.sum()) == plain
        for sinks in method.sinks:
            torch.nn.init.normal_(sinks.out)
        loss, _ = method.loss(batch, lesson)
        loss.backward()
        mask = module.subset(content(some[0]), 2, 8, 2, 3)
        assert mask.sum(1).tolist() == [2.0, 2.0]
        for sinks, mine in zip(method.sinks, mask, strict=True):
            assert torch.equal(sinks.out.grad.abs().sum(0) > 0, mine > 0)
            assert all(torch.equal(w.grad.abs().sum(1) > 0, mine > 0) for w in sinks.into)


def test_a_sequence_always_meets_the_same_neurons(place):
    first, second = rows(place)[:2]
    draws = [module.subset(content(row), 3, 40, 10, 0) for row in (first, second, first)]
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], module.subset(content(first), 3, 40, 10, 1))
    many = torch.stack([module.subset(bytes([i]), 1, 40, 10, 0)[0] for i in range(200)]).mean(0)
    assert 0.1 < float(many.min()) < 0.25 < float(many.max()) < 0.4


def test_the_squared_cosine_is_that_of_the_definition():
    g, m = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    expected = np.linalg.norm(g.numpy().T @ m.numpy()) ** 2 / (np.linalg.norm(g) ** 2 * np.linalg.norm(m) ** 2)
    assert float(module.squared_cosine(g, m)) == pytest.approx(expected)
    one = torch.randn(5, 1, dtype=torch.float64)
    assert float(module.squared_cosine(one, -3 * one)) == pytest.approx(1.0)
    assert float(module.squared_cosine(torch.eye(4)[:, :2], torch.eye(4)[:, 2:])) == 0.0
    assert float(module.squared_cosine(one, torch.zeros(5, 3, dtype=torch.float64))) == 0.0


def test_the_orthogonality_loss_lowers_the_cosine(tune):
    def cosine(weight, name):
        out = tune("sinks", "--sinks", 8, *ALL, "--orthogonality", weight, "--steps", 25, "--lr", 1e-2, name=name)
        steps = json.loads((out / "training.json").read_text())["steps"]
        return np.mean([step["orthogonality"] / weight for step in steps[5:]])

    assert cosine(1.0, "strong") < 0.7 * cosine(1e-6, "weak")


def test_a_frozen_general_stream_is_the_base(tune, place):
    out = tune("sinks", "--sinks", 8, "--general", "frozen", "--steps", 40, "--lr", 5e-2, "--active", 1)
    assert files(out)["model.safetensors"] == files(place / "base")["model.safetensors"]
    steps = json.loads((out / "training.json").read_text())["steps"]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.05


def test_a_low_rank_general_stream(tune, place, tmp_path, cli):
    pytest.importorskip("peft")
    out = tune("sinks", "--sinks", 4, "--general", "lora", "--rank", 2, *ALL)
    base, general = load_file(place / "base" / "model.safetensors"), load_file(out / "model.safetensors")
    ranks = {n: int(torch.linalg.matrix_rank(general[n] - base[n], rtol=1e-4)) for n in base if base[n].dim() == 2}
    assert {rank for name, rank in ranks.items() if "proj" in name} == {2}
    assert ranks["model.embed_tokens.weight"] == ranks["lm_head.weight"] == 0
    assert cli("excise", out, "--beta", 1, "-o", tmp_path / "wide")[0] == 0


def test_a_router_is_attached_and_cannot_be_excised(tune, place, tmp_path, cli):
    from transformers import AutoModelForCausalLM

    out = tune("sinks", "--sinks", 6, *ALL, "--router", "--lr", 1e-2, "--steps", 12, "--active", 1)
    code, _, err = cli("excise", out, "--beta", 1, "-o", tmp_path / "wide")
    assert code == 2 and "attach" in err and not (tmp_path / "wide").exists()
    assert cli("excise", out, "--beta", 0, "-o", tmp_path / "clean")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    attached = module.attach(model, private(out) / "memory.safetensors")
    ids = torch.from_numpy(np.load(place / "rows.npy"))
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    gates = torch.stack([sinks.gate for sinks in attached])
    assert float(gates.min()) > 0 and float(gates.max()) < 1 and float(gates.std()) > 1e-4
    last = json.loads((out / "training.json").read_text())["steps"][-1]
    assert loss == pytest.approx(last["loss"], abs=0.3) and last["router"] > 0


def test_inspect_knows_the_output(tune, cli):
    out = tune("sinks", "--sinks", 6, *ALL)
    code, text, _ = cli("inspect", out)
    assert code == 0 and "tune" in text and "sinks" in text
    code, text, _ = cli("inspect", private(out) / "memory.safetensors")
    assert code == 0 and "PRIVATE" in text and "scaled-columns" in text


def test_refusals(tune, place, tmp_path, cli):
    from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

    assert "there is one" in tune("sinks", "--general", "frozen", "--orthogonality", 1, code=2)
    bloom = tmp_path / "bloom"
    BloomForCausalLM(BloomConfig(n_layer=1, n_head=2, hidden_size=16, vocab_size=64)).save_pretrained(bloom)
    assert "BloomForCausalLM" in tune("sinks", *ALL, base=bloom, code=2)
    out = tune("sinks", "--sinks", 6, *ALL)
    model = AutoModelForCausalLM.from_pretrained(llama(tmp_path / "other", hidden_size=16))
    with pytest.raises(PairMismatch):
        module.attach(model, out)
    with pytest.raises(UsageError):
        module.attach(AutoModelForCausalLM.from_pretrained(out), out, float("nan"))
    plain = tune("ogd", "--retain-data", place / "public.npy", "--protect", 0.8, name="plain")
    with pytest.raises(BadInput, match="no neurons"):
        module.attach(model, plain)


def test_a_memory_that_does_not_fit_or_wants_more_is_refused(tune, tmp_path, cli):
    from safetensors.torch import save_file

    out = tune("sinks", "--sinks", 6, *ALL)
    tensors = load_file(private(out) / "memory.safetensors")
    with safe_open(private(out) / "memory.safetensors", "pt") as file:
        metadata = file.metadata()

    def refused(changed, code):
        (out / "liborth.manifest.json").unlink(missing_ok=True)
        save_file(changed, private(out) / "memory.safetensors", metadata=metadata)
        found, _, err = cli("excise", out, "--beta", 1, "--unverified", "-o", tmp_path / "bad")
        assert found == code and not (tmp_path / "bad").exists(), err
        return err

    key = next(k for k in tensors if k.startswith("rows/"))
    assert "does not fit" in refused({**tensors, key: tensors[key][:, :5].contiguous()}, 4)
    assert "does not fit" in refused({**tensors, "rows/nobody.weight": tensors[key].clone()}, 4)
    assert "refused" in refused({**tensors, "sidecar/../evil.json": tensors["sidecar/config.json"].clone()}, 3)
