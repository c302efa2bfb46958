"""Curvature methods through the command line, on the shipped GPT-2 pair (whose linear layers are stored transposed)."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import OWNGPT, files, pair, reseal

from liborth_cli.curvature.factor_set import FactorSet

BASE, FINETUNED = OWNGPT / "base", OWNGPT / "finetuned"


@pytest.fixture(scope="module")
def sets(once, tmp_path_factory):
    """Retain factors on Shakespeare at the fine-tuned point, forget factors on finance half way."""
    folder = tmp_path_factory.mktemp("factors")
    retain, forget = folder / "retain", folder / "forget"
    for words in (
        ["--data", OWNGPT / "shakespeare_tail.txt", "--diagonal", "--moments", "marginal", "-o", retain],
        ["--data", OWNGPT / "finance_qa.txt", "--at", "0.5", "--reference", BASE, "--fisher", "empirical", "-o", forget],
    ):
        once("curvature", FINETUNED, "--tokens", 3000, "-q", *words)
    return retain, forget


def load(folder):
    return load_file(folder / "model.safetensors")


def test_contrastive_is_its_formula_on_transposed_weights(cli, tmp_path, sets):
    retain, forget = sets
    words = ("--method", "contrastive", "--strength", 0.3, "--retain", retain, "--forget", forget, "-o", tmp_path / "out")
    code, _, err = cli("split", BASE, FINETUNED, *words)
    assert code == 0, err
    name = "transformer.h.1.mlp.c_fc.weight"
    old, new, general = (load(folder)[name].double() for folder in (BASE, FINETUNED, tmp_path / "out"))
    with FactorSet.open(retain) as retain_set, FactorSet.open(forget) as forget_set:
        layer = next(n for n in retain_set.names if retain_set.layer(n).tensor == name)
        r, f = retain_set.layer(layer), forget_set.layer(layer)
    assert r.transposed

    def solve(damped, other):
        values, vectors = torch.linalg.eigh(damped)
        root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
        ratios, turned = torch.linalg.eigh(root @ other @ root)
        return root @ turned, ratios

    def joint(a, b):
        a, b = a.double(), b.double()
        b = b * a.trace() / b.trace()
        return solve(a + 1e-2 * a.trace() / len(a) * torch.eye(len(a)), b)

    x_g, gamma = joint(r.gradient_covariance, f.gradient_covariance)
    x_a, alpha = joint(r.input_covariance, f.input_covariance)
    u = (new - old).T
    c = torch.linalg.solve(x_g, u) @ torch.linalg.inv(x_a).T
    kept = x_g @ (c / (1 + 0.3 * torch.outer(gamma, alpha))) @ x_a.T
    assert torch.allclose(general, old + kept.T, atol=1e-5)
    assert (general - new).abs().max() > 1e-4


@pytest.mark.parametrize(
    "words",
    [
        ("kfac", "--mass", 0.9),
        ("ekfac", "--mass", 0.9),
        ("diagonal", "--mass", 0.9),
        ("contrastive", "--strength", 1, "--hard"),
    ],
)
def test_every_method_splits_and_comes_back(cli, tmp_path, sets, words):
    method, *amount = words
    given = ("--retain", sets[0], *(("--forget", sets[1]) if method == "contrastive" else ()))
    out = tmp_path / "out"
    code, _, err = cli("split", BASE, FINETUNED, "--method", method, *amount, *given, "-o", out)
    assert code == 0, err
    manifest = json.loads((out / "liborth.manifest.json").read_text())
    assert manifest["factors"]["retain"]["at"] == 1.0
    assert 0 < manifest["totals"]["skill"] < 1
    assert cli("excise", out, "--beta", 1, "-o", tmp_path / "one")[0] == 0
    assert files(tmp_path / "one")["model.safetensors"] == files(FINETUNED)["model.safetensors"]


def test_sides_swap_through_the_command_line(cli, tmp_path, sets):
    for side in ("low", "high"):
        words = ("--method", "kfac", "--mass", 0.5, "--retain", sets[0], "--memory-side", side, "-i", "mlp.c_fc")
        assert cli("split", BASE, FINETUNED, *words, "-o", tmp_path / side)[0] == 0
    old, new, low, high = (
        load(f)["transformer.h.0.mlp.c_fc.weight"] for f in (BASE, FINETUNED, tmp_path / "low", tmp_path / "high")
    )
    assert torch.allclose((low - old) + (high - old), new - old, atol=1e-5)


def test_factors_that_are_missing_or_of_another_model(cli, tmp_path, sets):
    out = ("-o", tmp_path / "out")
    code, _, err = cli("split", BASE, FINETUNED, "--method", "kfac", "--mass", 0.9, *out)
    assert (code, "needs --retain" in err) == (2, True)
    code, _, err = cli("split", BASE, FINETUNED, "--method", "contrastive", "--strength", 1, "--retain", sets[0], *out)
    assert (code, "needs --forget" in err) == (2, True)
    code, _, err = cli("split", BASE, FINETUNED, "--method", "kfac", "--mass", 0.9, "--hard", "--retain", sets[0], *out)
    assert (code, "--hard goes with --method contrastive" in err) == (2, True)
    code, _, err = cli("split", BASE, FINETUNED, "--method", "diagonal", "--mass", 0.9, "--retain", sets[1], *out)
    assert (code, "no diagonal for any matrix" in err) == (2, True)
    code, _, err = cli("split", FINETUNED, BASE, "--method", "kfac", "--mass", 0.9, "--retain", sets[0], *out)
    assert (code, "another version of model.safetensors" in err) == (4, True)
    base, other = pair(tmp_path)
    code, _, err = cli("split", base, other, "--method", "kfac", "--mass", 0.9, "--retain", sets[0], *out)
    assert (code, "no such tensor" in err) == (4, True)
    assert cli("split", BASE, FINETUNED, "--method", "kfac", "--mass", 0.9, "--retain", FINETUNED, *out)[0] == 3
    assert not (tmp_path / "out").exists()


def test_the_output_may_not_replace_the_factors(cli, tmp_path, sets):
    """A factor set has a manifest too, so --force alone would not protect it."""
    before = files(sets[0])
    words = ("--method", "kfac", "--mass", 0.9, "--retain", sets[0], "-o", sets[0], "--force")
    code, _, err = cli("split", BASE, FINETUNED, *words)
    assert (code, "must lie outside the input" in err) == (6, True)
    assert files(sets[0]) == before


def test_a_tied_copy_uses_the_factors_of_what_it_is_tied_to(cli, tmp_path, sets):
    """Only the fine-tuned side stores the second copy; the factors know the first."""
    folder = tmp_path / "finetuned"
    folder.mkdir()
    for file in FINETUNED.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors = load(FINETUNED)
    save_file({**tensors, "copy.weight": tensors[name].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    retain = tmp_path / "retain"
    words = ("--data", OWNGPT / "shakespeare_tail.txt", "--tokens", 2000, "--tensors", "mlp.c_fc", "-o", retain)
    assert cli("curvature", FINETUNED, *words)[0] == 0
    reseal(retain, lambda m: m["inputs"]["model"].update(files={}))
    code, _, err = cli("split", BASE, folder, "--method", "kfac", "--mass", 0.9, "--retain", retain, "-o", tmp_path / "out")
    assert code == 0, err
    general = load(tmp_path / "out")
    assert torch.equal(general[name], general["copy.weight"])
    assert not torch.equal(general[name], tensors[name])


def test_what_the_factors_do_not_cover_stays(cli, tmp_path, sets):
    assert cli("split", BASE, FINETUNED, "--method", "kfac", "--mass", 0.9, "--retain", sets[0], "-o", tmp_path / "out")[0] == 0
    tensors = json.loads((tmp_path / "out" / "liborth.manifest.json").read_text())["tensors"]
    new, general = load(FINETUNED), load(tmp_path / "out")
    left = [name for name, t in tensors.items() if t["why"] == "the factors do not cover it"]
    assert "transformer.wpe.weight" in left
    assert all(torch.equal(new[name], general[name]) for name in left)
