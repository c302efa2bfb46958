"""W_g = round(W_r + α·U_s), and the bits that lead from it to W_f."""

from __future__ import annotations

import torch

from liborth_kernels.dispatch import NARROW, kernel_for
from liborth_kernels.rounding import round_to

WIDE = (torch.float32, torch.float64)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element → the integers that hold its bits."""


def rebuild(reference: torch.Tensor, skill: torch.Tensor, alpha: float, dtype: torch.dtype) -> torch.Tensor:
    """Add the skill part of the update to the reference and round once.

    Args:
        reference: W_r, any floating dtype.
        skill: U_s, float32 or float64, same shape.
        alpha: factor on the skill part.
        dtype: dtype of the result, that of W_f.

    Returns:
        W_g, same shape. The sum is formed in float64 when the result is float32 or wider, else in float32.
    """
    wide = torch.float64 if dtype in WIDE else torch.float32
    return round_to(torch.add(reference.to(wide), skill.to(wide), alpha=alpha), dtype)


def rebuild_delta(
    reference: torch.Tensor, finetuned: torch.Tensor, skill: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rebuild a weight, and compare it with the fine-tuned one bit by bit.

    Args:
        reference: W_r, any floating dtype, any shape.
        finetuned: W_f, same shape; the result has its dtype.
        skill: U_s, float32 or float64, same shape.
        alpha: factor on the skill part.

    Returns:
        W_g (`rebuild`), and bits(W_f) XOR bits(W_g) as integers of the same width.
    """
    kinds = {reference.dtype, finetuned.dtype} <= set(NARROW) and skill.dtype == torch.float32
    if kinds and kernel_for("rebuild_delta", reference, finetuned, skill):
        from liborth_kernels.rebuild_triton import rebuilt

        return rebuilt(reference, finetuned, skill, alpha)
    general = rebuild(reference, skill, alpha, finetuned.dtype)
    kind = BITS[general.element_size()]
    return general, finetuned.contiguous().view(kind) ^ general.contiguous().view(kind)
