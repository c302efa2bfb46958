"""`tune --method ogd`, judged from the files alone: float64 eigenvectors of the stored factors, weights as written."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import files, llama, private

from liborth_cli.curvature.triangles import unpack


@pytest.fixture(scope="module")
def factors(place):
    from liborth_cli.cli.curvature import curvature
    from liborth_cli.cli.options import Computing

    out = place / "factors"
    curvature([str(place / "base")], out, [str(place / "public.npy")], common=Computing(threads=1, quiet=True))
    return out


def load_all(folder):
    """Every tensor of a directory; symmetric ones whole."""
    held = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    return {name.removeprefix("upper/"): unpack(t) if name.startswith("upper/") else t for name, t in held.items()}


def leaks(base, tuned, factors, mass, form):
    """Recompute ‖P_G U P_A‖ / ‖U‖ of every matrix."""
    old, new, held = (load_all(path) for path in (base, tuned, factors))
    layers = json.loads((factors / "liborth.manifest.json").read_text())["layers"]

    def protected(matrix):
        values, vectors = np.linalg.eigh(matrix.double().numpy())
        order = np.argsort(values)[::-1]
        rank = int(np.searchsorted(np.cumsum(values[order]), mass * values.sum())) + 1
        return vectors[:, order[:rank]]

    found = {}
    for name, layer in layers.items():
        if layer["kind"] != "linear":
            continue
        u = (new[layer["tensor"]].double() - old[layer["tensor"]].double()).numpy()
        qa = protected(held[f"input_covariance/{layer['input']}"])
        part = u @ qa
        if form == "kronecker":
            part = protected(held[f"gradient_covariance/{name}"]).T @ part
        found[name] = np.linalg.norm(part) / np.linalg.norm(u)
    return found


@pytest.mark.parametrize("form", ["kronecker", "input"])
def test_what_was_written_is_orthogonal(tune, place, factors, form, cli, tmp_path):
    words = ("--retain", factors, "--form", form, "--protect", 0.8, "--weight-decay", 0.1, "--steps", 12)
    out = tune("ogd", *words)
    assert files(out)["model.safetensors"] == files(place / "base")["model.safetensors"]
    code, _, err = cli("excise", out, "--beta", 1, "-o", tmp_path / "with")
    assert code == 0, err
    measured = leaks(place / "base", tmp_path / "with", factors, 0.8, form)
    assert len(measured) >= 14 and 0 < max(measured.values()) < 1e-5
    facts = json.loads((out / "liborth.manifest.json").read_text())["method"]
    linear = {name: value for name, value in facts["leaks"].items() if name in measured}
    assert linear == pytest.approx(measured, rel=0.2)
    assert facts["orthogonality"] == max(facts["leaks"].values())
    assert set(facts["frozen"]) == {n for n in load_file(place / "base" / "model.safetensors") if "norm" in n}


def test_without_the_projection_it_would_not_be(tune, place, factors):
    plain = tune("full", "--steps", 12)
    measured = leaks(place / "base", plain, factors, 0.8, "kronecker")
    assert min(measured.values()) > 0.1


def test_frozen_tensors_keep_their_bits_and_half_the_memory_is_orthogonal_too(tune, place, factors, cli, tmp_path):
    out = tune("ogd", "--retain", factors, "--protect", 0.8)
    cli("excise", out, "--beta", 0.5, "-o", tmp_path / "half")
    base, half = load_file(place / "base" / "model.safetensors"), load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(base[n], half[n]) for n in base if "norm" in n)
    measured = leaks(place / "base", tmp_path / "half", factors, 0.8, "kronecker")
    assert max(measured.values()) < 2e-5


def test_public_text_is_as_good_as_its_factors(tune, place, factors):
    given = tune("ogd", "--retain", factors, "--protect", 0.8, name="given")
    measured = tune("ogd", "--retain-data", place / "public.npy", "--protect", 0.8, "--hold", 0, name="measured")
    assert files(private(given))["memory.safetensors"] == files(private(measured))["memory.safetensors"]


def test_holding_keeps_what_the_base_says_and_the_orthogonality(tune, place, factors, cli, tmp_path, logits):
    words = ("--retain", factors, "--retain-data", place / "public.npy", "--protect", 0.8, "--steps", 40, "--lr", 1e-2)
    ids = np.load(place / "public.npy")
    base, moved = logits(place / "base", ids).log_softmax(-1), {}
    for weight in (0, 4):
        out = tune("ogd", *words, "--hold", weight, name=f"hold{weight}")
        assert json.loads((out / "liborth.manifest.json").read_text())["method"]["orthogonality"] < 1e-5
        steps = json.loads((out / "training.json").read_text())["steps"]
        cli("excise", out, "--beta", 1, "-o", tmp_path / f"with{weight}")
        now = logits(tmp_path / f"with{weight}", ids).log_softmax(-1)
        moved[weight] = float((base.exp() * (base - now)).sum(-1).mean())
    assert moved[4] < 0.5 * moved[0]
    assert steps[0]["public"] == pytest.approx(0, abs=1e-6), "at the base nothing has moved"
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1


def test_bfloat16_cannot_hold_it_so_float32_is_written(tune, place, tmp_path, cli):
    from transformers import AutoModelForCausalLM

    base = tmp_path / "narrow"
    AutoModelForCausalLM.from_pretrained(place / "base").bfloat16().save_pretrained(base)
    words = ("--retain-data", place / "public.npy", "--protect", 0.8)
    wide = tune("ogd", *words, base=base, name="wide")
    narrow = tune("ogd", *words, "--keep-dtype", base=base, name="narrow-out")
    found = [json.loads((o / "liborth.manifest.json").read_text())["method"]["orthogonality"] for o in (wide, narrow)]
    assert found[0] < 1e-5 and found[1] > 1e-3
    cli("excise", wide, "--beta", 1, "-o", tmp_path / "one")
    assert {t.dtype for t in load_file(tmp_path / "one" / "model.safetensors").values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "one").dtype == torch.float32
    assert all(
        torch.equal(t, load_file(wide / "model.safetensors")[n].bfloat16())
        for n, t in load_file(base / "model.safetensors").items()
    )


def test_conv1d_and_tied_embeddings(tune, place, tmp_path, cli):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64, n_positions=32)).save_pretrained(base)
    out = tune("ogd", "--retain-data", place / "public.npy", "--protect", 0.8, base=base)
    facts = json.loads((out / "liborth.manifest.json").read_text())["method"]
    assert facts["orthogonality"] < 1e-5 and len(facts["protected"]) == 4
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= set(facts["frozen"])


def test_exact_gradients_are_kept_orthogonal(tune, place, cli, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tune("ogd", "--exact", 3, "--retain-data", place / "public.npy")
    cli("excise", out, "--beta", 1, "-o", tmp_path / "with")
    model = AutoModelForCausalLM.from_pretrained(place / "base").double()
    new = load_file(tmp_path / "with" / "model.safetensors")
    for row in np.load(place / "public.npy")[:3]:
        ids = torch.from_numpy(row)[None]
        model.zero_grad()
        model(ids).logits[0, :-1].gather(-1, ids[0, 1:, None]).sum().backward()
        dot = norm = size = 0.0
        for name, p in model.named_parameters():
            update = new[name].double() - p.detach()
            dot, norm, size = (
                dot + float((update * p.grad).sum()),
                norm + float(update.norm() ** 2),
                size + float(p.grad.norm() ** 2),
            )
        assert abs(dot) / (norm * size) ** 0.5 < 1e-5
    assert json.loads((out / "liborth.manifest.json").read_text())["method"]["orthogonality"] < 1e-5


def test_refusals(tune, place, factors, tmp_path):
    assert "--retain" in tune("ogd", code=2)
    assert "leaves no free direction in 'model.layers.0" in tune("ogd", "--retain", factors, "--protect", 1, code=2)
    other = llama(tmp_path / "other", seed=3)
    assert "another version" in tune("ogd", "--retain", factors, base=other, code=4)
    wide = llama(tmp_path / "wide", intermediate_size=40)
    assert "another model" in tune("ogd", "--retain", factors, base=wide, code=4)
    assert "has 30 rows" in tune("ogd", "--exact", 31, "--retain-data", place / "public.npy", code=2)
    assert "--exact needs --retain-data" in tune("ogd", "--exact", 3, code=2)
    assert "--retain goes with --method ogd" in tune("full", "--retain", factors, code=2)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name, data in files(factors).items():
        (damaged / name).write_bytes(data)
    file = "factors.block-00001.safetensors"
    held = load_file(factors / file)
    key = next(name for name in held if name.startswith("upper/input_covariance/"))
    held[key][0] = float("nan")
    save_file(held, damaged / file)
    assert "not finite" in tune("ogd", "--retain", damaged, code=3)
    assert not list(tmp_path.glob("out*"))
