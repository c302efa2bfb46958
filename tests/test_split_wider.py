"""Several forget sets, one checkpoint, tables, biases, experts and tied matrices, through the command line."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import files

from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.split import matrix

KINDS = ("untied", "tied", "experts")


def model(folder, kind, seed):
    """A random model of tiny shape; its biases and weights are large enough to matter."""
    import transformers

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
             "num_key_value_heads": 1, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
    if kind == "experts":
        config = transformers.MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=1)
    else:
        config = transformers.LlamaConfig(**shape, attention_bias=True, tie_word_embeddings=kind == "tied")
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pairs, and factors of retain data at the end and of two kinds of forget data half way: kind → folder."""
    import sys

    from liborth_cli.cli import main

    root, argv = tmp_path_factory.mktemp("wider"), sys.argv
    for number, kind in enumerate(KINDS):
        folder = root / kind
        base, tuned = (model(folder / name, kind, 10 * number + k) for k, name in enumerate(("base", "finetuned")))
        for name, low, high, rows in (("retain", 0, 30, 24), ("forget1", 20, 40, 3), ("forget2", 5, 15, 3)):
            np.save(folder / f"{name}.npy", np.random.default_rng(low).integers(low, high, (rows, 12)))
            words = ["curvature", tuned, "--data", folder / f"{name}.npy", "-o", folder / name, "-q"]
            words += ["--diagonal", "--moments", "marginal"] if name == "retain" else ["--at", "0.5", "--reference", base]
            sys.argv = ["liborth", *map(str, words)]
            with pytest.raises(SystemExit) as stop:
                main.run()
            assert not stop.value.code
    sys.argv = argv
    return {kind: root / kind for kind in KINDS}


def sets(folder, *names):
    return [word for name in names for word in (("--retain" if name == "retain" else "--forget"), folder / name)]


def contrastive(folder, *names, strength: object = 1):
    return ("--method", "contrastive", "--strength", strength, *sets(folder, *(names or ("retain", "forget1", "forget2"))))


def load(folder):
    return load_file(folder / "model.safetensors")


def read(folder):
    return json.loads((folder / "liborth.manifest.json").read_text())


@pytest.fixture
def split(cli, tmp_path):
    def run(*words, out="out", code=0):
        found, _, err = cli("split", *words, "-o", tmp_path / out)
        assert found == code, err
        return read(tmp_path / out) if code == 0 else err

    return run


def test_a_second_forget_set_adds_to_the_first(made, split, tmp_path):
    f = made["untied"]
    pair = (f / "base", f / "finetuned")
    both = split(*pair, *contrastive(f))
    one = split(*pair, *contrastive(f, "retain", "forget1"), out="one")
    assert [len(m["totals"]["forget_gain"]) for m in (both, one)] == [2, 1]
    assert both["totals"]["retain_cost"] > one["totals"]["retain_cost"]
    assert [m["at"] for m in both["factors"]["forget"]] == [0.5, 0.5]
    assert [m["at"] for m in one["factors"]["forget"]] == [0.5]
    again = split(*pair, *contrastive(f), out="again")
    assert files(tmp_path / "out") == files(tmp_path / "again")
    assert again == both


def test_the_report_holds_what_it_says(made, split, tmp_path, cli):
    f, name = made["untied"], "model.layers.1.mlp.up_proj.weight"
    document = split(f / "base", f / "finetuned", *contrastive(f))
    old, new, general = (load(folder)[name].double() for folder in (f / "base", f / "finetuned", tmp_path / "out"))
    record, removed = document["tensors"][name], new - general
    values = torch.linalg.svdvals(new - old).square()
    assert record["dimension"] == pytest.approx((values.sum() ** 2 / values.square().sum()).item(), rel=1e-4)
    assert record["norm_general"] == pytest.approx(general.norm().item(), rel=1e-5)
    assert record["norm_reference"] == pytest.approx(old.norm().item(), rel=1e-5)
    with FactorSet.open(f / "retain") as retain, FactorSet.open(f / "forget2") as forget:
        for one, found in ((retain, record["retain_cost"]), (forget, record["forget_gain"][1])):
            k = one.layer(name)
            expected = 0.5 * torch.trace(k.gradient_covariance.double() @ removed @ k.input_covariance.double() @ removed.T)
            assert found == pytest.approx(expected.item(), rel=1e-3)
    total = sum(t["retain_cost"] for t in document["tensors"].values() if "retain_cost" in t)
    assert document["totals"]["retain_cost"] == pytest.approx(total)
    code, shown, _ = cli("inspect", tmp_path / "out")
    assert code == 0
    assert "retain cost" in shown


def test_tables_heads_and_biases_take_part(made, split, tmp_path):
    """The embedding's A is a diagonal, the head's G is; a bias's curvature is G itself."""
    f = made["untied"]
    document = split(f / "base", f / "finetuned", *contrastive(f), "--vectors", "split")
    actions = {name: t["action"] for name, t in document["tensors"].items()}
    bias = "model.layers.0.self_attn.q_proj.bias"
    for name in ("model.embed_tokens.weight", "lm_head.weight", bias):
        assert actions[name] == "split", document["tensors"][name]["why"]
        assert document["tensors"][name]["memory"] > 0
    assert actions["model.norm.weight"] == "skill"
    old, new, general = (load(folder)[bias].double() for folder in (f / "base", f / "finetuned", tmp_path / "out"))

    def unit(m):
        return m.double() * (len(m) / m.double().trace())

    with FactorSet.open(f / "retain") as r, FactorSet.open(f / "forget1") as f1, FactorSet.open(f / "forget2") as f2:
        g_r, *g_f = (unit(s.layer(bias.replace("bias", "weight")).gradient_covariance) for s in (r, f1, f2))
    expected = torch.linalg.solve((1.0001 * (g_r + 1e-4 * torch.eye(len(g_r)))) + g_f[0] + g_f[1], 1.0001 * (
        (g_r + 1e-4 * torch.eye(len(g_r))) @ (new - old)))  # fmt: skip
    corrected, whole = (general - old - expected).norm(), (new - old).norm()
    assert corrected < 0.1 * whole, "near the exact minimiser; two sets are not exactly diagonal together"
    rows = {name: load(folder)["model.embed_tokens.weight"] for name, folder in
            (("new", f / "finetuned"), ("general", tmp_path / "out"))}  # fmt: skip
    seen = {int(t) for name in ("retain", "forget1", "forget2") for t in np.load(f / f"{name}.npy")[:, :-1].ravel()}
    for token in range(40):
        if token not in seen:
            assert torch.allclose(rows["new"][token], rows["general"][token], atol=1e-5), "nobody asked for this token"


@pytest.mark.parametrize("words", [("kfac", "--mass", 0.9), ("ekfac", "--mass", 0.9), ("diagonal", "--mass", 0.9)])
def test_biases_with_the_other_methods(made, split, words):
    f = made["untied"]
    document = split(f / "base", f / "finetuned", "--method", *words, *sets(f, "retain"), "--vectors", "split")
    assert document["tensors"]["model.layers.1.self_attn.v_proj.bias"]["action"] == "split"


@pytest.mark.parametrize("words", [("contrastive", "--strength", 1), ("kfac", "--mass", 0.9)])
def test_a_tied_matrix_takes_part_with_both_its_uses(made, split, cli, tmp_path, words):
    f = made["tied"]
    given = sets(f, "retain", "forget1") if words[0] == "contrastive" else sets(f, "retain")
    document = split(f / "base", f / "finetuned", "--method", *words, *given, "-i", "embed")
    record = document["tensors"]["model.embed_tokens.weight"]
    assert (record["action"], record["memory"] > 0) == ("split", True)
    assert cli("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "one")[0] == 0
    assert files(tmp_path / "one")["model.safetensors"] == files(f / "finetuned")["model.safetensors"]


def test_experts_take_part_one_by_one(made, split, tmp_path):
    """An expert that no forget token reached stays; the others are divided, whether stored apart or as a stack."""
    f = made["experts"]
    with FactorSet.open(f / "forget1") as forget:
        reached = {n for n in forget.names if "experts" in n}
    document = split(f / "base", f / "finetuned", *contrastive(f, "retain", "forget1"))
    experts = {n: t for n, t in document["tensors"].items() if "experts" in n}
    assert experts
    for name, record in experts.items():
        own = {n for n in reached if n == name or n.startswith(f"{name}[")}
        assert (record["action"] == "split") == bool(own), (name, record["why"])
    new, general = load(f / "finetuned"), load(tmp_path / "out")
    assert all(torch.equal(new[n], general[n]) for n, t in experts.items() if t["action"] != "split")
    assert any(not torch.equal(new[n], general[n]) for n in experts)


@pytest.mark.parametrize(
    "words", [("kfac", "--mass", 0.9), ("ekfac", "--mass", 0.9), ("svd", "--rank", 4), ("scale", "--scale", 0.9)]
)
def test_one_checkpoint_is_edited_and_comes_back(made, split, cli, tmp_path, words):
    """No reference: the weights are divided themselves (arXiv 2510.24256), with the same undo."""
    f = made["untied"]
    given = sets(f, "retain") if "kfac" in words[0] else []
    document = split(f / "finetuned", "--one-checkpoint", "--method", *words, *given)
    assert document["inputs"]["reference"] == {"title": "none", "commit": None, "files": {}}
    assert document["parameters"]["one_checkpoint"] is True
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(load(tmp_path / "out")[name], load(f / "finetuned")[name])
    if given:
        assert document["tensors"]["model.embed_tokens.weight"]["action"] == "skill"
        with FactorSet.open(f / "retain") as one:
            k = one.layer(name)
        whole = load(f / "finetuned")[name].double()
        kept = k.basis.gradient_vectors.T @ load(tmp_path / "out")[name].double() @ k.basis.input_vectors
        c = k.basis.gradient_vectors.T @ whole @ k.basis.input_vectors
        masked = torch.minimum((kept - c).abs(), kept.abs())
        assert masked.max() < 1e-5, "every coordinate is kept or gone"
    assert cli("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "one")[0] == 0
    assert files(tmp_path / "one")["model.safetensors"] == files(f / "finetuned")["model.safetensors"]
    assert cli("excise", tmp_path / "out", "--beta", 0.5, "-o", tmp_path / "half")[0] == 0
    assert cli("inspect", tmp_path / "out")[0] == 0


def test_one_checkpoint_can_be_told_what_it_must_not(made, split, cli, tmp_path):
    f = made["untied"]
    one = (f / "finetuned", "--one-checkpoint", "--method", "kfac", "--mass", 0.9, *sets(f, "retain"))
    assert "would set norms and biases to zero" in split(*one, "--vectors", "memory", code=2)
    assert "was measured at 0.5 on a path" in split(
        f / "finetuned", "--one-checkpoint", *contrastive(f, "retain", "forget1"), code=4
    )
    split(*one, "-i", "embed")
    code, _, err = cli("excise", tmp_path / "out", "--beta", 0, "--alpha", 0.5, "-o", tmp_path / "no")
    assert code == 2
    assert "no reference" in err


def test_some_tensors_get_something_else(made, split, tmp_path):
    f = made["untied"]
    pair, words = (f / "base", f / "finetuned"), contrastive(f)
    rules = (r"mlp=strength:0", r"layers\.0\.=skip", r"o_proj=drop", r"layers\.0\.self_attn\.o_proj=strength:1e9")
    split(*pair, *words, *(word for rule in rules for word in ("--for", rule)))
    old, new, general = (load(folder) for folder in (*pair, tmp_path / "out"))
    assert torch.allclose(general["model.layers.1.mlp.up_proj.weight"], new["model.layers.1.mlp.up_proj.weight"], atol=1e-5)
    assert torch.equal(general["model.layers.0.self_attn.q_proj.weight"], new["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(general["model.layers.1.self_attn.o_proj.weight"], old["model.layers.1.self_attn.o_proj.weight"])
    name = "model.layers.0.self_attn.o_proj.weight"
    assert (general[name] - old[name]).norm() < 1e-3 * (new[name] - old[name]).norm(), "the last rule wins"
    assert read(tmp_path / "out")["parameters"]["overrides"] == list(rules)


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        ("mlp", "write REGEX=WHAT"), ("=skip", "write REGEX=WHAT"), ("mlp=rank:3", "is none of strength:NUMBER"),
        ("mlp=strength:much", "is not a number"), ("mlp=strength:-1", "takes a number from 0"),
        ("mlp=strength:inf", "not inf"), ("(=skip", "not a regular"),
        ("nothing_here=skip", "matches no tensor"), ("mlp=strength", "takes a number from 0"),
    ],
)  # fmt: skip
def test_rules_that_say_nothing_are_refused(made, split, rule, word):
    f = made["untied"]
    assert word in split(f / "base", f / "finetuned", *contrastive(f), "--for", rule, code=2)


def test_settings_of_another_method_are_refused(made, split):
    f = made["untied"]
    pair = (f / "base", f / "finetuned")
    assert "--sides goes with --method contrastive" in split(*pair, "--rank", 2, "--sides", "input", code=2)
    assert "--damping takes a number" in split(*pair, *contrastive(f), "--damping", -1, code=2)


def test_factors_of_the_wrong_data_or_point(made, split, cli, tmp_path):
    f = made["untied"]
    pair = (f / "base", f / "finetuned")
    assert "it would count twice" in split(*pair, *contrastive(f, "retain", "forget1", "forget1"), code=4)
    half = tmp_path / "half"
    words = ("--at", 0.5, "--reference", f / "base", "--data", f / "retain.npy", "-o", half)
    assert cli("curvature", f / "finetuned", *words)[0] == 0
    both = ("--method", "contrastive", "--strength", 1, "--retain", f / "retain", "--forget", half)
    assert "what must be kept cannot be what must go" in split(*pair, *both, code=4)
    code, _, err = cli("split", *pair, "--method", "kfac", "--mass", 0.9, "--retain", half, "-o", tmp_path / "warned")
    assert (code, "not at the fine-tuned model" in err) == (0, True)
    end = tmp_path / "end"
    assert cli("curvature", f / "finetuned", "--data", f / "forget1.npy", "-o", end)[0] == 0
    words = ("--method", "contrastive", "--strength", 1, "--retain", f / "retain", "--forget", end, "-o", tmp_path / "warned2")
    code, _, err = cli("split", *pair, *words)
    assert (code, "hardly any curvature" in err) == (0, True)
    stranger = model(tmp_path / "stranger", "untied", 99)
    assert "path from another reference" in split(stranger, f / "finetuned", *contrastive(f), code=4)
    assert not (tmp_path / "out").exists()


def test_a_factor_file_that_was_changed_is_refused(made, split, tmp_path):
    f = made["untied"]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (f / "retain").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    name = "factors.block-00000.safetensors"
    save_file({k: 2 * v for k, v in load_file(damaged / name).items()}, damaged / name, metadata={"format": "pt"})
    words = ("--method", "kfac", "--mass", 0.9, "--retain", damaged)
    assert f"{name}: damaged, or of another set" in split(f / "base", f / "finetuned", *words, code=3)
    assert not (tmp_path / "out").exists()


def test_the_dimension_of_a_large_update_is_as_good_in_bfloat16(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    u = torch.randn(512, 64, generator=draw) @ torch.randn(64, 640, generator=draw) * 1e-4
    narrowed = []
    monkeypatch.setattr(matrix, "multiplies_bfloat16", lambda device: narrowed.append(device) or True)
    assert matrix.participation(u) == pytest.approx(matrix.participation(u.double()), rel=5e-4)
    assert len(narrowed) == 1, "the exact one is not asked about"
