"""Σ w·x xᵀ over the rows of a matrix, added to a running total."""

from __future__ import annotations

import torch
from scipy.linalg.blas import dsyrk, ssyrk

from liborth_kernels.gram import _mirror


def add_covariance(total: torch.Tensor, rows: torch.Tensor, weight: float = 1.0) -> None:
    """Add weight · XᵀX to the upper triangle of `total`, in place.

    On the CPU this is BLAS SYRK: half the work of the product that torch would do, and no temporary of the size of `total`.
    Only the upper triangle is kept up to date; `symmetric` fills the other one when the total is complete.

    Args:
        total: running sum, (d, d), float32 or float64, contiguous.
        rows: X, (n, d), any floating dtype; converted to the dtype of `total`.
        weight: how often every row counts.
    """
    rows = rows.to(total.dtype)
    if total.is_cuda:
        total.addmm_(rows.T, rows, alpha=weight)
        return
    if not rows.shape[0]:
        return
    syrk = ssyrk if total.dtype == torch.float32 else dsyrk
    # The transpose of a C-ordered array is the Fortran-ordered one BLAS wants: its lower triangle is our upper one.
    syrk(weight, rows.contiguous().numpy().T, beta=1.0, c=total.numpy().T, trans=0, lower=1, overwrite_c=1)


def symmetric(total: torch.Tensor) -> torch.Tensor:
    """Copy the upper triangle of (d, d) onto the lower one, in place, and return it."""
    return _mirror(total)


def covariance_reference(total: torch.Tensor, rows: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """Return total + weight · XᵀX: what `add_covariance` and `symmetric` must agree with."""
    return total + weight * rows.to(total.dtype).T @ rows.to(total.dtype)
