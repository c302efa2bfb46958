"""U = W_f − W_r, formed wide."""

from __future__ import annotations

import torch


def update(finetuned: torch.Tensor, reference: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write finetuned − reference into `out`, each converted before the subtraction.

    Call it on cache-sized pieces: on whole matrices the two converted copies cost more in page faults than the
    subtraction (docs/log.md).

    Args:
        finetuned: W_f, any floating dtype.
        reference: W_r, any floating dtype, same shape.
        out: float32 or float64, same shape.

    Returns:
        `out`.
    """
    return torch.sub(finetuned.to(out.dtype), reference.to(out.dtype), out=out)
