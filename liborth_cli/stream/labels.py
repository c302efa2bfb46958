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


class LogitGradient:
    """Differentiates the summed cross-entropy with respect to logits, in buffers that are used again.

    A fresh buffer of a vocabulary's width costs more in page faults than the arithmetic done in it.
    """

    def __init__(self) -> None:
        """Start without buffers."""
        self._buffers: dict[str, torch.Tensor] = {}

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, keep: torch.Tensor, draws: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute softmax minus label.

        Args:
            logits: (tokens, vocabulary).
            labels: the real next tokens, (tokens,).
            keep: which positions carry loss, (tokens,), bool.
            draws: when given, the labels are drawn from the model with these numbers, (tokens,).

        Returns:
            The gradient, (tokens, vocabulary) in the logits' dtype, zero where no loss is carried, valid until the next call;
            and the loss of the real labels, summed, a scalar.
        """
        scores = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        gradient = self._buffer("probabilities", scores)
        torch.softmax(scores, -1, out=gradient)
        # log Z through the likeliest label, whose probability cannot underflow; the real label's can.
        top = scores.max(-1, keepdim=True)
        normaliser = top.values - gradient.gather(-1, top.indices).log()
        loss = ((normaliser - scores.gather(-1, labels[:, None]))[:, 0] * keep).sum()
        chosen = labels if draws is None else sample(gradient, draws, self._buffer("cumulative", scores))
        gradient.scatter_add_(-1, chosen[:, None], gradient.new_full((len(labels), 1), -1.0))
        if not bool(keep.all()):
            gradient[~keep] = 0.0
        return gradient.to(logits.dtype), loss

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        known = self._buffers.get(name)
        if known is None or known.numel() < like.numel() or known.dtype != like.dtype or known.device != like.device:
            self._buffers[name] = known = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        return known[: like.numel()].view(like.shape)


def sample(probabilities: torch.Tensor, draws: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Draw one label for each position by inverting the distribution function.

    Args:
        probabilities: (tokens, vocabulary), float32.
        draws: (tokens,), in [0, 1).
        out: room for the distribution function, shaped like `probabilities`.

    Returns:
        Labels, (tokens,).
    """
    cumulative = torch.cumsum(probabilities, -1, out=out)
    # The last entry is 1 only to rounding: scaling the draw keeps it from falling off the end.
    targets = draws.to(cumulative.device, cumulative.dtype)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_(max=probabilities.shape[-1] - 1)
