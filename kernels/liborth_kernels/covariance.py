"""Σ w·x xᵀ over the rows of a matrix, added to a running total."""

from __future__ import annotations

import torch

from liborth_kernels.dispatch import KERNELS, NARROW, kernel_for
from liborth_kernels.gram import accumulate, mirror

STRIP = 256
"""Columns of a strip: wide enough for a product to run at full speed."""


def add_covariance(total: torch.Tensor, rows: torch.Tensor, weight: float = 1.0) -> None:
    """Add weight · XᵀX to the upper triangle of `total`, in place.

    On one thread this is BLAS SYRK: half the work of the product that torch would do, and no temporary of the size of `total`.
    On several it is torch's own product, strip by strip along the diagonal: SciPy's BLAS has threads of its own, and two pools
    that wait for work by spinning take the processor from each other (measured: docs/curvature.md). So it is on a GPU.

    On a GPU it can be the kernel of `syrk_triton`, which reads narrow rows as they are.

    Only the upper triangle is kept up to date; `symmetric` fills the other one when the total is complete.

    Args:
        total: running sum, (d, d), float32 or float64, contiguous.
        rows: X, (n, d), any floating dtype; converted to the dtype of `total`.
        weight: how often every row counts.
    """
    if rows.dtype in NARROW and total.dtype == torch.float32 and kernel_for("add_covariance", total, rows):
        from liborth_kernels.syrk_triton import syrk

        syrk(total, rows.T, None, weight, KERNELS["add_covariance"].precision)
        return
    rows = rows.to(total.dtype)
    if not rows.shape[0]:
        return
    if total.device.type != "cpu" or torch.get_num_threads() > 1:
        strip = max(STRIP, total.shape[0] // 8)
        for start in range(0, total.shape[0], strip):
            total[start : start + strip, start:].addmm_(rows[:, start : start + strip].T, rows[:, start:], alpha=weight)
        return
    accumulate(rows.contiguous(), True, total, weight)


def symmetric(total: torch.Tensor) -> torch.Tensor:
    """Copy the upper triangle of (d, d) onto the lower one, in place, and return it."""
    return mirror(total)


def covariance_reference(total: torch.Tensor, rows: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """Return total + weight · XᵀX: what `add_covariance` and `symmetric` must agree with."""
    return total + weight * rows.to(total.dtype).T @ rows.to(total.dtype)
