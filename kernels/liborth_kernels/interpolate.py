"""W(α, β) = W_r + α·(W_g − W_r) + β·(W_f − W_g), rounded once."""

from __future__ import annotations

import torch

from liborth_kernels.rebuild import WIDE
from liborth_kernels.rounding import round_to


def interpolate(
    general: torch.Tensor,
    finetuned: torch.Tensor,
    beta: float,
    reference: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> torch.Tensor:
    """Walk from the general weight towards (or past) the fine-tuned one.

    Args:
        general: W_g, floating dtype; the result has this dtype.
        finetuned: W_f, same shape and dtype.
        beta: how much of the memory part to add; any real number.
        reference: W_r, needed when alpha is not 1.
        alpha: factor on the skill part W_g − W_r.

    Returns:
        The rounded weight. Arithmetic is float64 for float32 and wider, else float32.
    """
    wide = torch.float64 if general.dtype in WIDE else torch.float32
    start = general.to(wide)
    end = finetuned.to(wide)
    out = (end - start).mul_(beta).add_(start)
    if reference is not None:
        out += (start - reference.to(wide)) * (alpha - 1.0)
    return round_to(out, general.dtype)
