"""W_g = round(W_r + α·U_s), and the bits that lead from it to W_f."""

from __future__ import annotations

import torch

from liborth_kernels.rounding import round_to

WIDE = (torch.float32, torch.float64)


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
