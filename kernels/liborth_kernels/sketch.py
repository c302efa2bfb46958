"""U·X for a few columns X, and U's Gram matrix, from the two weights that U is the difference of."""

from __future__ import annotations

import torch

from liborth_kernels.covariance import add_covariance
from liborth_kernels.dispatch import KERNELS, NARROW, kernel_for
from liborth_kernels.update import update


def update_sketch(finetuned: torch.Tensor, reference: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Multiply U = W_f − W_r by a few columns.

    Args:
        finetuned: W_f, (m, n), any floating dtype, any strides (so also W_fᵀ).
        reference: W_r, same shape.
        x: X, (n, k), float32 or float64; the result and the arithmetic have its dtype.

    Returns:
        U·X, (m, k).
    """
    if _kernel("update_sketch", finetuned, reference, x):
        from liborth_kernels.sketch_triton import sketch

        return sketch(finetuned, reference, x)
    return _formed(finetuned, reference, x.dtype) @ x


def add_update_gram(total: torch.Tensor, finetuned: torch.Tensor, reference: torch.Tensor) -> None:
    """Add UᵀU of U = W_f − W_r to the upper triangle of `total`, in place.

    Args:
        total: running sum, (n, n), float32 or float64, contiguous.
        finetuned: W_f, (m, n): all rows, or some of them.
        reference: W_r, same shape.
    """
    if _kernel("update_gram", finetuned, reference, total):
        from liborth_kernels.syrk_triton import syrk

        syrk(total, finetuned.T, reference.T, 1.0, KERNELS["update_gram"].precision)
        return
    add_covariance(total, _formed(finetuned, reference, total.dtype))


def update_gram_reference(finetuned: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return UᵀU, (n, n), float64: what `add_update_gram` must agree with."""
    u = finetuned.double() - reference.double()
    return u.T @ u


def _kernel(op: str, finetuned: torch.Tensor, reference: torch.Tensor, wide: torch.Tensor) -> bool:
    kinds = finetuned.dtype in NARROW and reference.dtype in NARROW and wide.dtype == torch.float32
    return kinds and kernel_for(op, finetuned, reference, wide)


def _formed(finetuned: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return update(finetuned, reference, torch.empty(finetuned.shape, dtype=dtype, device=finetuned.device))
