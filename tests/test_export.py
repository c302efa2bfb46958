"""What `export` writes, read by the tools it is for, or by their documented rules."""

import json
import stat
import warnings

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import files, llama

from liborth_cli.demo import DATA
from liborth_cli.export.adapter import RANKS


def nudge(base, folder, rank=2, only=lambda name: "proj" in name):
    """A fine-tune of `base` whose chosen matrices moved by an update of low rank."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors, generator = load_file(base / "model.safetensors"), torch.Generator().manual_seed(7)
    for name, t in tensors.items():
        if only(name):
            up, down = (torch.randn(size, generator=generator) for size in ((t.shape[0], rank), (rank, t.shape[1])))
            tensors[name] = (t.float() + 0.02 * up @ down).to(t.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def made(tmp_path, cli, monkeypatch):
    """A low-rank fine-tune of a tiny Llama, half of it kept as skill."""
    monkeypatch.chdir(tmp_path)
    nudge(llama(tmp_path / "base"), tmp_path / "finetuned")
    assert cli("split", "base", "finetuned", "--method", "scale", "--scale", 0.5, "-o", "general")[0] == 0
    return tmp_path


@pytest.fixture
def full(tmp_path, cli, monkeypatch):
    """The demo's pair, of which every tensor was trained, half of it kept as skill."""
    monkeypatch.chdir(tmp_path)
    words = ("split", DATA / "base", DATA / "finetuned", "--method", "scale", "--scale", 0.5, "-o", "general")
    assert cli(*words)[0] == 0
    return tmp_path


def log_probabilities(model):
    ids = torch.randint(0, 60, (4, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits.float().log_softmax(-1)


def of(folder, adapter=None, own=False):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None and own:
        model.load_adapter(str(adapter))
    elif adapter is not None:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, str(adapter))
    return log_probabilities(model.eval())


@pytest.mark.parametrize("own", [False, True], ids=["peft", "transformers"])
def test_the_skill_on_the_base_is_the_general_checkpoint_for_those_who_load_adapters(made, cli, own):
    pytest.importorskip("peft")
    code, out, err = cli("export", "general", "--to", "peft", "-o", "adapter")
    assert (code, out) == (0, "adapter\n"), err
    assert "--max-lora-rank 8" in err
    apart = (of(made / "base", made / "adapter", own) - of(made / "general")).abs().max()
    assert apart < 1e-3
    assert (of(made / "base") - of(made / "general")).abs().max() > 10 * apart


def test_an_adapter_keeps_to_what_vllm_takes(made, cli):
    """vllm/lora/peft_helper.py and config/lora.py: a rank of its list, no DoRA, no bias, nothing saved whole."""
    assert cli("export", "general", "--to", "peft", "-o", "adapter")[0] == 0
    config = json.loads((made / "adapter" / "adapter_config.json").read_text())
    assert config["r"] in RANKS and config["lora_alpha"] == config["r"]
    assert (config["use_dora"], config["bias"], config["modules_to_save"]) == (False, "none", None)
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    tensors = load_file(made / "adapter" / "adapter_model.safetensors")
    for name, t in tensors.items():
        assert name.startswith("base_model.model.model.layers.")
        assert t.shape[0 if "lora_A" in name else 1] == config["r"]


def test_the_memory_is_an_adapter_for_the_general_checkpoint_and_private(made, cli):
    pytest.importorskip("peft")
    assert cli("export", "general", "--to", "peft", "--part", "memory", "-o", "adapter")[0] == 0
    apart = (of(made / "general", made / "adapter") - of(made / "finetuned")).abs().max()
    assert apart < 1e-3
    assert stat.S_IMODE((made / "adapter").stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in (made / "adapter").iterdir()} == {0o600}
    assert (made / "adapter" / ".gitignore").read_text().strip() == "*"
    assert "PRIVATE" in (made / "adapter" / "README.md").read_text()
    manifest = json.loads((made / "adapter" / "liborth.manifest.json").read_text())
    assert manifest["private"] and not any("memory" in name for name in manifest["inputs"])


def test_what_an_adapter_cannot_hold_is_refused_unless_it_is_carried_or_asked_for(full, cli):
    words = ("export", "general", "--to", "peft", "--reference", DATA / "base", "-o", "adapter")
    code, out, err = cli(*words)
    assert (code, out) == (5, "") and "--whole carries norms and tables" in err.splitlines()[-1]
    assert len(err.splitlines()[-1]) < 300 and not (full / "adapter").exists()
    assert cli(*words, "--lossy")[0] == 0
    manifest = json.loads((full / "adapter" / "liborth.manifest.json").read_text())
    assert manifest["facts"]["self_test"] > 1e-3 and manifest["facts"]["lost"] > 0.1
    assert "model.embed_tokens.weight" in manifest["facts"]["left"]


def test_norms_and_a_tied_table_are_carried_whole(full, cli):
    pytest.importorskip("peft")
    words = ("export", "general", "--to", "peft", "--whole", "--reference", DATA / "base", "-o", "adapter")
    code, _, err = cli(*words)
    assert code == 0 and "vLLM does not" in err
    assert (of(DATA / "base", full / "adapter") - of(full / "general")).abs().max() < 1e-3


def test_a_rank_that_is_too_low_says_so(made, cli):
    code, _, err = cli("export", "general", "--to", "peft", "--rank", 1, "-o", "adapter")
    assert code == 5 and "its rank is too low" in err and "--to task-vector" in err


def test_weights_the_other_way_round(tmp_path, cli, monkeypatch):
    pytest.importorskip("peft")
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)).save_pretrained("base")
    nudge(tmp_path / "base", tmp_path / "finetuned", only=lambda name: "c_" in name and name.endswith("weight"))
    assert cli("split", "base", "finetuned", "--method", "scale", "--scale", 0.5, "-o", "general")[0] == 0
    assert cli("export", "general", "--to", "peft", "-o", "adapter")[0] == 0
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"]
    assert (of(tmp_path / "base", tmp_path / "adapter") - of(tmp_path / "general")).abs().max() < 1e-3


@pytest.mark.parametrize(("part", "old", "new"), [("skill", "base", "general"), ("memory", "general", "finetuned")])
def test_a_gguf_adapter_by_llamacpps_rule_gives_the_other_end(made, cli, part, old, new):
    """llama.cpp: W' = W + (alpha / r)·B·A; its converter takes rows i and i + half of a head of q and k to 2i and 2i + 1."""
    gguf = pytest.importorskip("gguf")
    code, _, err = cli("export", "general", "--to", "gguf-lora", "--part", part, "-o", "adapter")
    assert code == 0, err
    read = gguf.GGUFReader(made / "adapter" / "adapter.gguf")
    told = {name: field.parts[field.data[0]] for name, field in read.fields.items() if field.data}
    text = {name: bytes(told[name]).decode() for name in ("general.architecture", "general.type", "adapter.type")}
    assert text == {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    alpha, held = float(told["adapter.lora.alpha"][0]), {t.name: t.data for t in read.tensors}
    before, after = (load_file(made / end / "model.safetensors") for end in (old, new))
    names = {
        "q": ("self_attn.q_proj", 4),
        "k": ("self_attn.k_proj", 2),
        "v": ("self_attn.v_proj", 0),
        "output": ("self_attn.o_proj", 0),
    }
    layers = {f"blk.{n}.attn_{short}.weight": (f"model.layers.{n}.{long}.weight", heads)
              for n in range(2) for short, (long, heads) in names.items()}  # fmt: skip
    layers |= {f"blk.{n}.ffn_{side}.weight": (f"model.layers.{n}.mlp.{side}_proj.weight", 0)
               for n in range(2) for side in ("gate", "up", "down")}  # fmt: skip
    assert {f"{name}.lora_{side}" for name in layers for side in "ab"} == set(held)
    for theirs, (ours, heads) in layers.items():
        a, b = (torch.from_numpy(held[f"{theirs}.lora_{side}"].copy()).float() for side in "ab")
        ends = [before[ours].float(), after[ours].float()]
        if heads:
            half = ends[0].shape[0] // heads // 2
            order = [h * 2 * half + i + part * half for h in range(heads) for i in range(half) for part in (0, 1)]
            ends = [end[order] for end in ends]
        assert torch.allclose(ends[0] + alpha / a.shape[0] * b @ a, ends[1], atol=1e-5)
    mode = stat.S_IMODE((made / "adapter" / "adapter.gguf").stat().st_mode)
    assert mode == (0o600 if part == "memory" else 0o644)
    listed = json.loads((made / "adapter" / "liborth.manifest.json").read_text())["outputs"]
    assert {"adapter.gguf", "adapter_model.safetensors"} <= {entry["name"] for entry in listed}


def test_a_family_that_llamacpp_changes_otherwise_is_refused_by_name(tmp_path, cli, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.chdir(tmp_path)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=64)).save_pretrained("base")
    nudge(tmp_path / "base", tmp_path / "finetuned", only=lambda name: "c_fc.weight" in name)
    assert cli("split", "base", "finetuned", "--method", "scale", "--scale", 0.5, "-o", "general")[0] == 0
    code, _, err = cli("export", "general", "--to", "gguf-lora", "-o", "adapter")
    assert (code, err.count("\n")) == (2, 1) and "of the family 'gpt2'" in err and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(("part", "old", "new"), [("skill", "base", "general"), ("memory", "general", "finetuned")])
def test_a_task_vector_added_back_is_the_other_end_to_the_bit(full, cli, part, old, new):
    words = ("--reference", DATA / "base") if part == "skill" else ()
    assert cli("export", "general", "--to", "task-vector", "--part", part, *words, "-o", "vector")[0] == 0
    place = {"base": DATA / "base", "finetuned": DATA / "finetuned", "general": full / "general"}
    before, after = (load_file(place[end] / "model.safetensors") for end in (old, new))
    vector = load_file(full / "vector" / "task_vector.safetensors")
    assert vector.keys() == after.keys() and {t.dtype for t in vector.values()} == {torch.float32}
    for name, t in after.items():
        assert torch.equal((before[name].float() + vector[name]).to(t.dtype).view(torch.uint8), t.view(torch.uint8))


def test_a_recipe_by_mergekits_rules_gives_the_general_checkpoint(full, cli):
    """task_arithmetic: base + Σ weight·(model − base) in `dtype`, cast to `out_dtype` (mergekit's README)."""
    assert cli("export", "general", "--to", "mergekit", "--reference", DATA / "base", "-o", "recipe")[0] == 0
    recipe = yaml.safe_load((full / "recipe" / "mergekit.yml").read_text())
    assert recipe["merge_method"] == "task_arithmetic" and recipe["parameters"] == {"normalize": False}
    wide, narrow = (getattr(torch, recipe[key]) for key in ("dtype", "out_dtype"))
    assert str(full) not in (full / "recipe" / "mergekit.yml").read_text()
    places = {"base": DATA / "base", "general": full / "general"}
    base = load_file(places[recipe["base_model"]] / "model.safetensors")
    general = load_file(full / "general" / "model.safetensors")
    for name, t in base.items():
        total = t.to(wide)
        for entry in recipe["models"]:
            other = load_file(places[entry["model"]] / "model.safetensors")[name].to(wide)
            total = total + entry["parameters"]["weight"] * (other - t.to(wide))
        assert torch.equal(total.to(narrow), general[name]), name


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--to", "task-vector", "--rank", 8), 2, "go with --to peft"),
        (("--to", "gguf-lora", "--whole"), 2, "linear layers only"),
        (("--to", "mergekit", "--part", "memory"), 2, "liborth excise --beta 1"),
        (("--to", "gguff"), 2, "there are"),
        (("--to", "peft", "--reference", "finetuned"), 4, "not the file that this split was made from"),
        (("--to", "peft", "--part", "memory", "--memory", "nowhere"), 3, "nowhere"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(made, cli, words, code, says):
    before = files(made)
    found, out, err = cli("export", "general", *words, "-o", "out")
    assert (found, out, err.count("\n")) == (code, "", 1), err
    assert says in err and files(made) == before


def test_no_split_no_export(made, cli):
    code, _, err = cli("export", "base", "--to", "peft", "-o", "out")
    assert (code, err.count("\n")) == (3, 1) and "liborth.manifest.json" in err
