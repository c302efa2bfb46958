"""Round to a storage dtype without ever making an infinity."""

from __future__ import annotations

import torch


def round_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to nearest even, saturating at the dtype's largest finite value.

    Args:
        x: float32 or float64 values, any shape.
        dtype: a floating-point dtype.

    Returns:
        The rounded values, same shape. (fp8 in torch would turn an overflow into NaN.)
    """
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)
