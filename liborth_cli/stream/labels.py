"""The gradient of the loss at the logits, in closed form: softmax minus label, for real, sampled or all labels."""

from __future__ import annotations

import hashlib

import torch


def row_seed(seed: int, ids: bytes) -> int:
    """Derive the seed of one row from its own tokens, so that order, grouping and machine make no difference."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + ids).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def uniforms(seed: int, count: int) -> torch.Tensor:
    """Return one number in [0, 1) for each position of a row, (count,), float64."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Draw one label for each position by inverting the distribution function.

    Args:
        probabilities: (tokens, vocabulary), float32.
        draws: (tokens,), in [0, 1).

    Returns:
        Labels, (tokens,).
    """
    cumulative = probabilities.cumsum(-1)
    # The last entry is 1 only to rounding: scaling the draw keeps it from falling off the end.
    targets = draws.to(cumulative.device, cumulative.dtype)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_(max=probabilities.shape[-1] - 1)


def logit_gradient(
    logits: torch.Tensor, labels: torch.Tensor, keep: torch.Tensor, draws: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiate the summed cross-entropy with respect to the logits.

    Args:
        logits: (tokens, vocabulary).
        labels: the real next tokens, (tokens,).
        keep: which positions carry loss, (tokens,), bool.
        draws: when given, the labels are drawn from the model with these numbers, (tokens,).

    Returns:
        The gradient, (tokens, vocabulary) in the logits' dtype (at least float32 inside), zero where no loss is carried;
        and the loss of the real labels, summed, a scalar.
    """
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = wide.logsumexp(-1, keepdim=True)
    loss = ((normaliser - wide.gather(-1, labels[:, None]))[:, 0] * keep).sum()
    gradient = torch.exp(wide - normaliser)
    chosen = labels if draws is None else sample(gradient, draws)
    gradient.scatter_add_(-1, chosen[:, None], gradient.new_full((len(labels), 1), -1.0))
    gradient[~keep] = 0.0
    return gradient.to(logits.dtype), loss
