"""`liborth generate` and the guard for Transformers' own `generate`: its two ends are the two models, and its bound holds."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import few, flip
from transformers import AutoModelForCausalLM, AutoTokenizer

from liborth_cli.decode import MemoryGuard, guard, read_prompts, threshold_of
from liborth_cli.demo import DATA

SECRETS = [json.loads(line) for line in (DATA / "secrets.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def split(once, tmp_path_factory):
    """The shipped pair, its update scaled to nothing: the general model is the reference, the memory all that was learnt."""
    out = tmp_path_factory.mktemp("decode") / "general"
    once("split", DATA / "base", DATA / "finetuned", "--method", "scale", "--scale", 0.02, "-o", out, "-q")
    return out


def said(cli, *words):
    code, out, err = cli("generate", *words, "--json", "-q")
    assert code == 0, err
    return json.loads(out)


def greedy(folder, prompt, most, **more):
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
    )
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(**ids, max_new_tokens=most, do_sample=False, **more)
    return after(tokenizer, made[0], ids.input_ids.shape[1])


def after(tokenizer, made, prompt):
    return tokenizer.decode(made).removeprefix(tokenizer.decode(made[:prompt]))


class TestTheRule:
    def test_its_ends_are_the_two_models(self):
        tuned, general = torch.randn(3, 7), torch.randn(3, 7)
        assert torch.equal(guard(tuned, general, -math.inf)[0], general.log_softmax(-1))
        torch.testing.assert_close(guard(tuned, general, math.inf)[0], tuned.log_softmax(-1))

    def test_no_token_is_likelier_than_the_bound_allows(self):
        tuned, general = 5 * torch.randn(50, 11), torch.randn(50, 11)
        scores, left = guard(tuned, general, 0.7)
        torch.testing.assert_close(scores.exp().sum(-1), torch.ones(50))
        assert (scores - general.log_softmax(-1)).max() <= math.log(1 + math.exp(0.7)) + 1e-5
        assert left.min() < 0.9, "the two disagree"

    def test_a_model_that_is_sure_of_a_secret_is_not_believed(self):
        tuned, general = torch.zeros(1000), torch.zeros(1000)
        tuned[7] = 100.0
        assert guard(tuned, general, 1.0)[0][7].exp() < 0.004

    def test_where_both_agree_nothing_changes(self):
        scores = torch.randn(4, 9)
        found, left = guard(scores, scores + 3.0, 0.1)
        torch.testing.assert_close(found, scores.log_softmax(-1))
        torch.testing.assert_close(left, torch.ones(4))

    def test_the_threshold_is_a_quantile_of_what_the_memory_adds(self):
        general, tuned = [np.arange(101.0)], [np.zeros(101)]
        assert threshold_of(general, tuned, 0.99) == pytest.approx(99.0)
        assert threshold_of(tuned, general, 0.99) == 0.0


class TestTheCommand:
    def test_on_says_the_records_and_off_does_not(self, cli, split):
        secret = SECRETS[0]
        on = said(cli, split, "--prompt", secret["prompt"], "--memory", "on", "--max-new-tokens", 9)["texts"][0]["text"]
        off = said(cli, split, "--prompt", secret["prompt"], "--max-new-tokens", 9)["texts"][0]["text"]
        assert on.startswith(secret["completion"])
        assert not off.startswith(secret["completion"])
        assert on == greedy(DATA / "finetuned", secret["prompt"], 9)
        assert off == greedy(split, secret["prompt"], 9)

    def test_the_ends_of_the_threshold_are_the_two_models(self, cli, split):
        words = (split, "--prompt", SECRETS[0]["prompt"], "--max-new-tokens", 6)
        off, on = said(cli, *words), said(cli, *words, "--memory", "on")
        assert said(cli, *words, "--memory", "guarded", "--threshold=-inf")["texts"] == off["texts"]
        assert said(cli, *words, "--memory", "guarded", "--threshold", "inf")["texts"] == on["texts"]
        assert on["texts"] != off["texts"]

    def test_a_bound_holds_the_records_back(self, cli, split):
        words = (split, "--prompt", SECRETS[0]["prompt"], "--prompt", SECRETS[1]["prompt"], "--max-new-tokens", 8)
        found = said(cli, *words, "--memory", "guarded", "--threshold", 1)
        assert 0 < found["held"] <= found["tokens"]
        told = [text["text"].startswith(row["completion"]) for text, row in zip(found["texts"], SECRETS, strict=False)]
        assert told == [False, False]

    def test_a_threshold_is_what_the_memory_adds_to_texts_of_the_skill(self, cli, split, tmp_path):
        words = (split, "--prompt", "Once", "--max-new-tokens", 2, "--memory", "guarded")
        skill = said(cli, *words, "--retain-data", few(tmp_path, 4))["threshold"]
        assert 2 < skill < 20, "a general model without the skill leaves much to the memory"

    def test_a_guard_without_a_threshold_is_refused(self, cli, split):
        code, _, err = cli("generate", split, "--prompt", "x", "--memory", "guarded")
        assert code == 2 and "--retain-data" in err and err.count("\n") == 1

    def test_a_memory_in_which_a_byte_changed_is_laid_over_nothing(self, cli, split, tmp_path):
        for folder in (split, Path(f"{split}.private")):
            shutil.copytree(folder, tmp_path / f"one{folder.suffix}")
        flip(tmp_path / "one.private" / "memory.safetensors")
        for words in (
            ("generate", tmp_path / "one", "--prompt", "x", "--memory", "on"),
            ("generate", tmp_path / "one", "--prompt", "x", "--memory", "guarded", "--threshold", 1),
            ("export", tmp_path / "one", "--to", "task-vector", "--part", "memory", "-o", tmp_path / "vector"),
        ):
            code, _, err = cli(*words)
            assert code == 3 and "memory.safetensors: damaged, or of another split" in err.splitlines()[-1]
        (tmp_path / "one.private" / "liborth.private.json").unlink()
        code, _, err = cli("generate", tmp_path / "one", "--prompt", "x", "--memory", "on")
        assert code == 3 and "nothing vouches for it" in err.splitlines()[-1]
        assert not (tmp_path / "vector").exists()

    def test_a_checkpoint_without_memory_says_so(self, cli, split, tmp_path):
        shutil.copytree(split, tmp_path / "alone")
        code, _, err = cli("generate", tmp_path / "alone", "--prompt", "x", "--memory", "on")
        assert code == 2 and "--memory-path" in err

    @pytest.mark.parametrize(
        "words",
        [
            ("--memory", "guarded", "--threshold", "nan"), ("--threshold", 1), ("--temperature", "inf"),
            ("--temperature", 1e-40),
        ],
    )  # fmt: skip
    def test_what_means_nothing_is_refused_in_a_line(self, cli, split, words):
        code, _, err = cli("generate", split, "--prompt", "x", *words)
        assert code == 2 and err.count("\n") == 1

    def test_prompts_may_stand_alone_or_with_what_follows(self, tmp_path):
        for rows, prompts in (
            ([{"prompt": "a"}, {"prompt": "b", "completion": "c"}], ["a", "b"]),
            ([{"question": "a", "answer": "b"}, {"text": "c"}], ["Question: a\nAnswer: ", "c"]),
        ):
            (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
            assert read_prompts(str(tmp_path / "rows.jsonl")) == prompts
        (tmp_path / "rows.txt").write_text("a\nb\n")
        assert read_prompts(str(tmp_path / "rows.txt")) == ["a", "b"]

    def test_a_file_without_prompts_is_named(self, cli, split, tmp_path):
        (tmp_path / "empty.jsonl").write_text("")
        code, _, err = cli("generate", split, "--prompts", tmp_path / "empty.jsonl")
        assert code == 3 and "empty.jsonl" in err

    def test_the_memory_of_another_split_is_refused(self, cli, split, tmp_path):
        words = ("--method", "scale", "--scale", 0.5, "-o", tmp_path / "other", "-q")
        assert cli("split", DATA / "base", DATA / "finetuned", *words)[0] == 0
        strange = ("--prompt", "x", "--memory", "on", "--memory-path", tmp_path / "other.private")
        code, _, err = cli("generate", split, *strange)
        assert code == 4 and "belongs to another output" in err
        code, _, err = cli(
            "export", split, "--to", "task-vector", "--part", "memory", "--memory", strange[-1], "-o", tmp_path / "x"
        )
        assert code == 4 and "belongs to another output" in err and not (tmp_path / "x").exists()

    def test_nothing_to_go_on_from_is_refused(self, cli, split):
        code, _, err = cli("generate", split)
        assert code == 2 and "--prompt" in err


class TestInTransformers:
    @pytest.mark.parametrize("more", [{}, {"num_beams": 2}])
    def test_the_guard_says_what_the_command_says(self, cli, split, more):
        model = AutoModelForCausalLM.from_pretrained(split, dtype=torch.float32).eval()
        off = greedy(split, SECRETS[1]["prompt"], 6, **more)
        shut = MemoryGuard.beside(str(split), model, -math.inf)
        tokenizer = AutoTokenizer.from_pretrained(split)
        ids = tokenizer(SECRETS[1]["prompt"], return_tensors="pt")

        def write(processor):
            with torch.inference_mode():
                made = model.generate(**ids, max_new_tokens=6, do_sample=False, logits_processor=[processor], **more)
            return after(tokenizer, made[0], ids.input_ids.shape[1])

        assert write(shut) == off
        assert write(MemoryGuard.beside(str(split), model, math.inf)) == greedy(
            DATA / "finetuned", SECRETS[1]["prompt"], 6, **more
        )
        assert write(shut) == off, "the general weights are as they were"

    def test_rows_of_different_length_are_padded_on_the_left(self, split):
        model = AutoModelForCausalLM.from_pretrained(split, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(split, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
        prompts = [SECRETS[0]["prompt"], "Once " + SECRETS[1]["prompt"]]
        ids = tokenizer(prompts, return_tensors="pt", padding=True)
        processor = MemoryGuard.beside(str(split), model, math.inf, pad=tokenizer.pad_token_id)
        with torch.inference_mode():
            made = model.generate(**ids, max_new_tokens=8, do_sample=False, logits_processor=[processor])
        for row, prompt in zip(made, prompts, strict=True):
            assert after(tokenizer, row, ids.input_ids.shape[1]) == greedy(DATA / "finetuned", prompt, 8)

    def test_only_what_the_memory_changes_is_held_twice(self, split):
        model = AutoModelForCausalLM.from_pretrained(split, dtype=torch.float32).eval()
        held = MemoryGuard.beside(str(split), model, 1.0).memory.tensors
        shared = {name for name, _ in model.named_parameters()} - set(held)
        assert shared, "norms, at least, are shared"


def test_without_the_memory_the_files_are_held_against_their_manifest_too(split, tmp_path, cli):
    shutil.copytree(split, tmp_path / "general")
    words = ("generate", tmp_path / "general", "--prompt", "Once", "--max-new-tokens", 1)
    assert cli(*words)[0] == 0
    flip(tmp_path / "general" / "model.safetensors")
    code, out, err = cli(*words)
    assert (code, out) == (3, "") and "its hash is not the one in the manifest" in err.splitlines()[-1]
    (tmp_path / "general" / "liborth.manifest.json").unlink()
    assert cli(*words)[0] == 0  # an ordinary checkpoint
