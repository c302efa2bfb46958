"""Does what was removed come back? Train on half of the secrets and watch the other half."""

from __future__ import annotations

from pathlib import Path

import torch
from tune_losses import rows, secret_loss

STEPS = (10, 20, 30, 40)
RATE = 1e-3


def attack(model: torch.nn.Module, tokenizer: object, work: Path) -> tuple[float, ...]:
    """Train on half of the secrets, and return the loss of the other half before, and after so many steps.

    Args:
        model: is changed.
        tokenizer: of the model.
        work: where the halves lie.
    """
    half = [tokenizer(row["text"], return_tensors="pt").input_ids[0] for row in rows(work / "half.jsonl")]
    other = rows(work / "other_half.canary.jsonl")
    ids = torch.nn.utils.rnn.pad_sequence(half, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(half, batch_first=True, padding_value=-100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)

    def left() -> float:
        with torch.no_grad():
            return secret_loss(model, tokenizer, other)[0]

    found = [left()]
    for step in range(1, max(STEPS) + 1):
        optimiser.zero_grad()
        with torch.enable_grad():
            model(ids, labels=labels).loss.backward()
        optimiser.step()
        if step in STEPS:
            found.append(left())
    return tuple(found)
