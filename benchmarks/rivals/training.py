"""What rivals that train have in common: rows in batches, losses of completions, and AdamW with a short warm-up."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional

from benchmarks.surgery.job import Completion

ROWS = 16
"""Rows of a batch."""
WIDTH = 512
"""Hidden width at which a learning rate means what it says; other widths get rate · WIDTH / width."""
IGNORED = -100

Batch = tuple[torch.Tensor, torch.Tensor]
"""Ids and labels, (rows, tokens) each. Rows are padded at the end, where a causal model sees nothing of it."""


def whole(rows: Sequence[list[int]]) -> list[Completion]:
    """Let every token of a row count but its first, which nothing predicts."""
    return [Completion(list(row), 1) for row in rows if len(row) > 1]


def pad(rows: Sequence[Completion], device: torch.device) -> Batch:
    """Put rows into one batch; labels are −100 at prompts and padding."""
    ids = [torch.tensor(row.ids) for row in rows]
    labels = [row.clone() for row in ids]
    for row, label in zip(rows, labels, strict=True):
        label[: max(row.prompt, 1)] = IGNORED
    pads = torch.nn.utils.rnn.pad_sequence
    return pads(ids, batch_first=True).to(device), pads(labels, batch_first=True, padding_value=IGNORED).to(device)


def batches(rows: Sequence[Completion], device: torch.device, seed: int, size: int = ROWS) -> Iterator[Batch]:
    """Give batches without an end; every pass is in a new order."""
    draw = random.Random(seed)
    while True:
        order = draw.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), size):
            yield pad([rows[i] for i in order[start : start + size]], device)


def row_losses(model: Any, batch: Batch, exact: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss in nats and the tokens that carry it, (rows,) each.

    Args:
        model: in float32.
        batch: ids and labels.
        exact: to measure by: all products are float32, which on a GPU those of training are not.
    """
    ids, labels = batch
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda" and not exact):
        logits = model(input_ids=ids, use_cache=False).logits
    flat = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(len(ids), -1).sum(1), (labels[:, 1:] != IGNORED).sum(1)


def mean_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Return the mean loss a token, in nats."""
    losses, tokens = row_losses(model, batch)
    return losses.sum() / tokens.sum()


def device_of(model: Any) -> torch.device:
    """Return where a model lies."""
    return next(model.parameters()).device


def train(model: Any, rate: float, steps: int, loss: Callable[[], torch.Tensor], only: Sequence[Any] | None = None) -> None:
    """Minimise a loss that is drawn anew at every step.

    Args:
        model: is changed.
        rate: of AdamW, for a width of `WIDTH`; it rises over the first tenth of the steps. Gradients are clipped at norm 1.
        steps: of it.
        loss: returns the loss of the next batches.
        only: parameters that learn; all when not given.
    """
    learning = list(model.parameters()) if only is None else list(only)
    rate *= WIDTH / model.config.hidden_size
    optimiser = torch.optim.AdamW(learning, lr=rate, weight_decay=0.0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / max(1.0, steps / 10))
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
