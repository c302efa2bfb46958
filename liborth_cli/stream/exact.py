"""The exact Fisher of small vocabularies: one backward pass for each position and label."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from liborth_cli.stream.blocks import BlockModel
from liborth_cli.stream.tap import Tap
from liborth_cli.stream.walk import Batch, BatchObserver, Losses, check_finite


def walk_exact(
    model: BlockModel, batches: Sequence[Batch], observer: BatchObserver, advance: Callable[[int], None] = lambda tokens: None
) -> Losses:
    """Sum over all labels of all positions, each weighted by its probability.

    The labels of different positions are independent given the row, so Σ over positions t and labels c of
    p_tc·∇L_tc ∇L_tcᵀ is the whole Fisher. Positions cannot share a backward pass: attention would mix their gradients, and
    the mixed terms, which are zero on average, would not be zero in a sum of √p. Rows can.

    Args:
        model: the model, after `load_all`.
        batches: the rows.
        observer: learns inputs once, and output gradients once for each position and label, scaled by √p.
        advance: told of every batch's tokens.

    Returns:
        The loss of the real labels.
    """
    losses, tap = Losses(), Tap(model.sites(None), observer)
    for batch in batches:
        observer.begin(batch)
        with tap:
            hidden = model.through(batch.ids, lambda level, states, b=batch: check_finite(states, level, b))
            logits = model.tail(hidden.reshape(-1, hidden.shape[-1])).view(*batch.ids.shape, -1)
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        chances = wide.softmax(-1)
        real = -wide.log_softmax(-1).gather(-1, batch.labels[..., None])[..., 0]
        losses.total += float((real * batch.keep).sum())
        losses.tokens += int(batch.keep.sum())
        for position in torch.nonzero(batch.keep.any(0))[:, 0].tolist():
            here = chances[:, position]
            for label in range(here.shape[-1]):
                seed = here.clone()
                seed[:, label] -= 1.0
                seed *= (here[:, label].sqrt() * batch.keep[:, position])[:, None]
                gradient = torch.zeros_like(logits)
                gradient[:, position] = seed.to(logits.dtype)
                logits.backward(gradient, retain_graph=True)
        advance(batch.tokens)
    return losses
