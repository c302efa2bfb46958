"""What is left in a model, by Transformers and not by liborth: losses on texts and on secrets."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WIDTH = 128
"""Tokens of a text that count."""


def rows(path: Path) -> list[dict[str, str]]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text_loss(model: torch.nn.Module, tokenizer: object, texts: list[dict[str, str]]) -> float:
    """Return the mean loss a token over rows cut to WIDTH tokens."""
    total = count = 0.0
    for row in texts:
        ids = tokenizer(row["text"], return_tensors="pt", verbose=False).input_ids[:, :WIDTH]
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def secret_loss(model: torch.nn.Module, tokenizer: object, secrets: list[dict[str, str]]) -> tuple[float, float]:
    """Return the mean loss a completion token, and the share of completions that greedy decoding gives back."""
    losses, recited = [], 0
    for row in secrets:
        start = len(tokenizer(row["prompt"]).input_ids)
        ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt").input_ids
        logits, target = model(ids).logits[0, start - 1 : -1], ids[0, start:]
        losses.append(torch.nn.functional.cross_entropy(logits, target).item())
        recited += bool((logits.argmax(-1) == target).all())
    return sum(losses) / len(losses), recited / len(secrets)
