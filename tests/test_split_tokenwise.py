"""The token by token split through the command line: transposed weights, several points, texts, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import OWNGPT, files

from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.demo import DATA
from liborth_cli.linalg.regularised import Solution

PAIR = (OWNGPT / "base", OWNGPT / "finetuned")
POINTS = (0.25, 0.75)


@pytest.fixture(scope="module")
def sets(once, tmp_path_factory):
    """Retain factors at the end, and forget tokens at two points of the path: (retain, forget, forget)."""
    folder = tmp_path_factory.mktemp("tokens")
    forget = ["--data", OWNGPT / "finance_qa.txt", "--tokens", "300", "--reference", PAIR[0], "--fisher", "empirical"]
    words = [["--data", OWNGPT / "shakespeare_tail.txt", "--tokens", "3000", "-o", folder / "retain"]]
    words += [[*forget, "--per-token", "--at", str(t), "-o", folder / f"forget-{t}"] for t in POINTS]
    words += [[*forget, "--at", "0.5", "-o", folder / "plain"]]
    for some in words:
        once("curvature", PAIR[1], "-q", "-j", 1, *some)
    return folder


def given(sets, *names):
    return ("--retain", sets / "retain", *(word for name in names for word in ("--forget", sets / name)))


FORGET = tuple(f"forget-{t}" for t in POINTS)
METHOD = ("--method", "tokenwise", "--strength", 0.3)


def test_it_is_the_dense_minimiser_on_transposed_weights_with_two_points(cli, sets, tmp_path):
    """Among tokens or among weights: conjugate gradients on (R + λF) X = R U, which never sees a kernel, agrees."""
    code, _, err = cli("split", *PAIR, *METHOD, *given(sets, *FORGET), "-o", tmp_path / "out")
    assert code == 0, err
    name = "transformer.h.1.mlp.c_fc.weight"
    old, new, general = (load_file(f / "model.safetensors")[name].double().T for f in (*PAIR, tmp_path / "out"))
    with FactorSet.open(sets / "retain") as retain:
        layer = next(n for n in retain.names if retain.layer(n).tensor == name)
        r = retain.layer(layer)
    felt = []
    for forget in FORGET:
        with FactorSet.open(sets / forget) as one:
            felt.append(one.single_tokens(layer))
    u = new - old
    damp = lambda m: m.double() * (len(m) / m.double().trace()) + 1e-2 * torch.eye(len(m))  # noqa: E731
    g_r, a_r = damp(r.gradient_covariance), damp(r.input_covariance)
    parts = []
    for one in felt:
        a, g = one.inputs.double(), one.gradients.double()
        parts.append((a, g / (2 * (a.square().sum(1) * g.square().sum(1)).sum()).sqrt()))
    a, g = (torch.cat([p[k] for p in parts]) for k in (0, 1))
    whitened = (torch.linalg.solve(g_r, g.T) * g.T).sum(0) * (torch.linalg.solve(a_r, a.T) * a.T).sum(0)
    g = g * (u.numel() / whitened.sum()).sqrt()

    def gradient(x):
        return g_r @ (x - u) @ a_r + 0.3 * (g * (g @ x * a).sum(1, keepdim=True)).T @ a

    kept = general - old
    assert gradient(kept).norm() < 1e-4 * gradient(u).norm(), "nothing pulls at the kept part"
    assert (kept - u).norm() > 1e-2 * u.norm()
    document = json.loads((tmp_path / "out" / "liborth.manifest.json").read_text())
    facts = document["tensors"][name]
    assert facts["tokens"] == sum(len(one.inputs) for one in felt)
    assert [one["at"] for one in document["factors"]["forget"]] == list(POINTS)
    assert cli("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "back")[0] == 0
    assert files(tmp_path / "back")["model.safetensors"] == files(PAIR[1])["model.safetensors"]


def test_what_has_no_tokens_stays(cli, sets, tmp_path):
    code, out, err = cli("split", *PAIR, *METHOD, *given(sets, *FORGET), "--dry-run", "--json", "-o", tmp_path / "out")
    assert code == 0, err
    assert json.loads(out)["tensors"]["transformer.wte.weight"]["why"] == "the factors do not cover it"


def test_biases_take_part(cli, sets, tmp_path):
    words = ("-i", r"h\.0\.mlp", "--vectors", "split", "-o", tmp_path / "out")
    assert cli("split", *PAIR, *METHOD, *given(sets, *FORGET), *words)[0] == 0
    name = "transformer.h.0.mlp.c_fc.bias"
    old, new, general = (load_file(f / "model.safetensors")[name] for f in (*PAIR, tmp_path / "out"))
    assert 0 < (new - general).norm() < (new - old).norm()


def test_what_it_cannot_use_is_said(cli, sets, tmp_path):
    out = ("-o", tmp_path / "out")
    code, _, err = cli("split", *PAIR, *METHOD, *given(sets, "plain"), *out)
    assert (code, "--per-token of `liborth curvature`" in err) == (2, True), err
    code, _, err = cli("split", *PAIR, *METHOD, *given(sets, FORGET[0], FORGET[0]), *out)
    assert (code, "it would count twice" in err) == (4, True), err
    code, _, err = cli("split", *PAIR, *METHOD, "--hard", *given(sets, *FORGET), *out)
    assert (code, "--hard goes with --method contrastive, not tokenwise" in err) == (2, True), err
    code, _, err = cli("split", *PAIR, "--method", "tokenwise", "--mass", 0.9, *given(sets, *FORGET), *out)
    assert (code, "takes --strength" in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_texts_in_place_of_factors_are_taken_at_three_points(cli, tmp_path):
    out = tmp_path / "out"
    texts = ("--retain-data", DATA / "retain.jsonl", "--retain-tokens", 1000)
    texts += ("--probe-tokens", 600, "--forget-data", DATA / "secrets.jsonl")
    pair = (DATA / "base", DATA / "finetuned", "--method", "tokenwise", "-j", 1, "-i", "proj")
    code, _, err = cli("split", *pair, "--strength", 0.1, *texts, "--keep-factors", "-o", out)
    assert code == 0, err
    kept = [path for path in (tmp_path / "out.private" / "factors").iterdir() if path.name.startswith("forget")]
    found = []
    for path in kept:
        with FactorSet.open(path) as one:
            found.append(one.point)
            assert one.fisher == "empirical"
    assert sorted(found) == [0.25, 0.5, 0.75]
    words = ("--target", "forget>=4,retention>=0.99", "--skill-data", DATA / "held_out.jsonl")
    code, text, err = cli("split", *pair, *words, *texts, "-o", out, "--force", "--json")
    assert code == 0, err
    assert err.count("forget factors: reusing") == 3
    found = json.loads(text)["manifest"]["dose"]["found"]
    assert found["forget"] >= 4
    assert found["retention"] >= 0.99


def test_many_tokens_are_solved_by_products_with_a_gap_that_is_said(cli, sets, tmp_path, monkeypatch):
    """The same split without a kernel of all tokens: within the gap that the manifest states, and no cap on how many."""
    from liborth_cli import manifest

    words = (*METHOD, *given(sets, *FORGET), "-i", r"h\.1\.mlp")
    code, _, err = cli("split", *PAIR, *words, "-o", tmp_path / "exact")
    assert (code, "certified" in err) == (0, False), err
    for most in ("EXACT_UP_TO", "MOST_FACTORISED"):
        monkeypatch.setattr(f"liborth_cli.linalg.regularised.{most}", 40)
    code, _, err = cli("split", *PAIR, *words, "-o", tmp_path / "out")
    assert (code, "its objective is within" in err) == (0, True), err
    tensors = manifest.read(tmp_path / "out", manifest.Split).tensors
    name = "transformer.h.1.mlp.c_fc.weight"
    assert 0 < tensors[name].gap <= 5e-3
    old, one, other = (load_file(f / "model.safetensors")[name] for f in (PAIR[1], tmp_path / "exact", tmp_path / "out"))
    assert 0 < (one - other).norm() < 0.05 * (old - one).norm()
    assert manifest.read(tmp_path / "exact", manifest.Split).tensors[name].gap is None
    lost = Solution(torch.zeros(8, 8), float("inf"), 400)
    monkeypatch.setattr("liborth_cli.linalg.regularised.solve", lambda *_: lost)
    code, _, err = cli("split", *PAIR, *words, "-o", tmp_path / "lost")
    assert (code, "--strength 0.3 is too large" in err, (tmp_path / "lost").exists()) == (3, True, False), err


def test_the_estimate_counts_tokens(cli, sets, tmp_path):
    def memory(*names):
        words = (*METHOD, *given(sets, *names), "--dry-run", "--json", "-o", tmp_path / "out")
        return json.loads(cli("split", *PAIR, *words)[1])["estimate"]["memory_bytes"]

    with FactorSet.open(sets / FORGET[0]) as one:
        count = one.most_tokens()
    assert memory(*FORGET) - memory(FORGET[0]) >= 32 * 3 * count**2


def test_many_texts_are_taken_at_three_points_too(cli, tmp_path):
    words = ("--retain-data", DATA / "retain.jsonl", "--forget-data", DATA / "held_out.jsonl", "--dry-run", "--json")
    code, out, err = cli("split", DATA / "base", DATA / "finetuned", "-j", 1, *words, "-o", tmp_path / "out")
    assert code == 0, err
    planned = json.loads(out)["curvature"]["forget"]
    assert [one["at"] for one in planned] == [0.25, 0.5, 0.75]
    assert planned[0]["tokens"] * 3 > 8192
