"""Second moments of outer products: M_ij = Σ w·g_i²·a_j², without forming any outer product."""

from __future__ import annotations

import torch

from liborth_kernels.dispatch import KERNELS, NARROW, kernel_for


def add_second_moments(total: torch.Tensor, gradients: torch.Tensor, inputs: torch.Tensor, weight: float = 1.0) -> None:
    """Add weight · (G∘G)ᵀ(A∘A) to `total`, in place.

    With g and a rotated into an eigenbasis these are the corrected eigenvalues of EK-FAC (arXiv 1806.03884, every token a
    sample); unrotated they are the diagonal Fisher.

    Args:
        total: running sum, (d_out, d_in), float32 or float64.
        gradients: g of every token, (n, d_out).
        inputs: a of every token, (n, d_in).
        weight: how often every token counts.
    """
    narrow = gradients.dtype in NARROW and inputs.dtype in NARROW and total.dtype == torch.float32
    if narrow and kernel_for("add_second_moments", total, gradients, inputs):
        from liborth_kernels.moments_triton import second_moments

        second_moments(total, gradients, inputs, weight, KERNELS["add_second_moments"].precision)
        return
    total.addmm_(gradients.to(total.dtype).square().T, inputs.to(total.dtype).square(), alpha=weight)


def second_moments_reference(gradients: torch.Tensor, inputs: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """Return Σ w·(g aᵀ)∘(g aᵀ) from the outer products themselves: what `add_second_moments` must agree with."""
    return weight * torch.einsum("ni,nj->nij", gradients, inputs).square().sum(0)
