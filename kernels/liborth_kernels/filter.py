"""The filter of a contrastive split, applied to coefficients in the eigenbasis."""

from __future__ import annotations

import torch

from liborth_kernels.dispatch import kernel_for


def filter_coefficients(coefficients: torch.Tensor, ratios: torch.Tensor, strength: float, hard: bool = False) -> torch.Tensor:
    """Multiply each coefficient by λρ/(1 + λρ), or by 1 where λρ ≥ 1 and 0 elsewhere: the part that forget data feel.

    What is left is C/(1 + λρ), the minimiser of the contrastive objective (docs/theory.md).

    Args:
        coefficients: C, (d_out, d_in), float64.
        ratios: ρ, same shape and dtype, non-negative.
        strength: λ.
        hard: cut in place of the filter.

    Returns:
        A new tensor of the same shape.
    """
    if coefficients.dtype == torch.float64 and kernel_for("filter_coefficients", coefficients, ratios):
        from liborth_kernels.filter_triton import filtered

        return filtered(coefficients, ratios, strength, hard)
    return coefficients * share(ratios, strength, hard)


def share(ratios: torch.Tensor, strength: float, hard: bool = False) -> torch.Tensor:
    """Return the factors by themselves: λρ/(1 + λρ), or a mask."""
    return ratios * strength >= 1 if hard else ratios * strength / (1 + ratios * strength)
