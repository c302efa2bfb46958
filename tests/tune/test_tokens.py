"""`tune --memory tokens`: the general checkpoint knows nothing of them, they act like embeddings before a text, and go."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import few, files, private

from liborth_cli.demo import DATA
from liborth_cli.tune.tokens import Tokens, attach_tokens

PROMPT = json.loads((DATA / "secrets.jsonl").read_text().splitlines()[0])["prompt"]
FORMS = ("tokens", "deep-tokens")


@pytest.fixture
def secret(place):
    """Rows that only the memory may learn, twice, with other numbers."""
    found = []
    for seed in (1, 2):
        path = place / f"secret{seed}.npy"
        np.save(path, np.random.default_rng(seed).integers(0, 64, (4, 12)))
        found.append(path)
    return found


def llama(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("form", FORMS)
def test_the_general_checkpoint_does_not_know_what_the_tokens_learnt(tune, place, secret, form):
    words = ("--memory", form, "--tokens", 3, "--memory-learns", "private")
    outs = [tune("sinks", *words, "--private-data", rows, name=f"{form}{i}") for i, rows in enumerate(secret)]
    assert (
        files(outs[0])["model.safetensors"] == files(outs[1])["model.safetensors"] != files(place / "base")["model.safetensors"]
    )
    one, other = (load_file(private(out) / "memory.safetensors")["tokens/embeddings"] for out in outs)
    assert one.shape[:2] == (1 if form == "tokens" else 2, 3) and not torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_attached_they_are_what_embeddings_before_the_text_are(tune, place, form):
    out = tune("sinks", "--memory", form, "--tokens", 3, "--general", "frozen")
    assert files(out)["model.safetensors"] == files(place / "base")["model.safetensors"]
    model, ids = llama(out), torch.arange(1, 9)[None]
    mine = load_file(private(out) / "memory.safetensors")["tokens/embeddings"]
    with torch.no_grad():
        plain = model(ids).logits
        embedded = torch.cat([mine[0][None], model.get_input_embeddings()(ids)], 1)
        handles = []
        for level, block in list(enumerate(model.model.layers))[1 : len(mine)]:

            def put(_module, args, level=level):
                return torch.cat([mine[level][None], args[0][:, 3:]], 1), *args[1:]

            handles.append(block.register_forward_pre_hook(put))
        expected = model(inputs_embeds=embedded).logits[:, 3:]
        for handle in handles:
            handle.remove()
        tokens = attach_tokens(model, out)
        torch.testing.assert_close(model(ids).logits, expected)
        made = model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
        text = ids
        for _ in range(made.shape[1] - ids.shape[1]):  # without a cache, the whole text each time
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1].argmax(-1)[None]], 1)
        assert torch.equal(made, text)
        tokens.remove()
        assert torch.equal(model(ids).logits, plain)
    assert (expected - plain).abs().max() > 1e-3


def test_padding_on_the_left_changes_nothing(place):
    model = llama(place / "base")
    tokens = Tokens(model, torch.randn(1, 2, model.config.hidden_size, generator=torch.Generator().manual_seed(0)))
    tokens.awake = True
    ids, mask = torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        assert padded.shape[1] == 5 and padded.isfinite().all()


def test_what_has_no_place_for_them_says_so(tune, cli, tmp_path):
    out = tune("sinks", "--memory", "tokens", "--tokens", 2, "--general", "frozen")
    code, _, err = cli("excise", out, "--beta", 1, "-o", tmp_path / "x")
    assert code == 2 and "attach_tokens" in err and err.count("\n") == 1
    assert cli("excise", out, "--beta", 0, "-o", tmp_path / "y")[0] == 0
    assert files(tmp_path / "y")["model.safetensors"] == files(out)["model.safetensors"]


@pytest.mark.parametrize(
    "words",
    [
        ("--memory", "tokens", "--router"),
        ("--memory", "tokens", "--sinks", 3),
        ("--tokens", 3),
        ("--memory", "tokens", "--tokens", 4000),
    ],
)
def test_what_does_not_go_together_is_refused(cli, place, tmp_path, words):
    rows = ("--data", place / "rows.npy", "--general", "frozen", "--steps", 1)
    code, _, err = cli("tune", place / "base", "--method", "sinks", *rows, *words, "-o", tmp_path / "out", "-q")
    assert code == 2 and err.count("\n") == 1, err


def test_generate_writes_with_them(cli, tmp_path):
    words = ("--memory", "deep-tokens", "--tokens", 4, "--private-data", DATA / "secrets.jsonl", "--steps", 12, "--lr", 3e-2)
    code, _, err = cli(
        "tune", DATA / "base", "--method", "sinks", "--data", few(tmp_path, 4, 60), *words, "-o", tmp_path / "out", "-q"
    )
    assert code == 0, err
    said = {}
    for memory in ("off", "on"):
        code, out, err = cli(
            "generate", tmp_path / "out", "--prompt", PROMPT, "--memory", memory, "--max-new-tokens", 5, "--json", "-q"
        )
        assert code == 0, err
        said[memory] = json.loads(out)["texts"][0]["text"]
    assert said["on"] != said["off"]


def test_peft_loads_them_as_prompt_tuning(tune, tmp_path):
    peft = pytest.importorskip("peft")
    from liborth_cli.errors import UsageError
    from liborth_cli.export.prompt import save_prompt

    out = tune("sinks", "--memory", "tokens", "--tokens", 3, "--general", "frozen")
    model, ids = llama(out), torch.arange(1, 9)[None]
    tokens = attach_tokens(model, out)
    with torch.no_grad():
        expected = model(ids).logits
    save_prompt(model, tokens, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o600
    loaded = peft.PeftModel.from_pretrained(llama(out), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits[:, 3:], expected)
    deep = tune("sinks", "--memory", "deep-tokens", "--tokens", 3, "--general", "frozen", name="deep")
    with pytest.raises(UsageError, match="deep"):
        save_prompt(model, attach_tokens(llama(deep), deep), tmp_path / "other")
