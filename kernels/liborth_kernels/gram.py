"""G = U Uᵀ or UᵀU, whichever is smaller."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg.blas import dsyrk, ssyrk

BLOCK = 4096


def gram(u: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Multiply a matrix by its own transpose on its shorter side.

    On the CPU this is BLAS SYRK, half the work of the matrix product that torch would do. A float64 Gram of a float32
    matrix is accumulated over blocks of the longer side, so no float64 copy of `u` is made.

    Args:
        u: matrix, (m, n), float32 or float64.
        dtype: of the result; `u.dtype` when None.

    Returns:
        (min(m, n), min(m, n)), symmetric, both triangles filled.
    """
    dtype = dtype or u.dtype
    if u.is_cuda:
        side = u if u.shape[0] <= u.shape[1] else u.T
        return side.to(dtype) @ side.to(dtype).T
    long_first = (u if u.shape[0] > u.shape[1] else u.T).numpy()
    if dtype == u.dtype:
        syrk = ssyrk if dtype == torch.float32 else dsyrk
        lower = _syrk(syrk, long_first)
    else:
        size = long_first.shape[1]
        lower = np.zeros((size, size), np.float64, order="F")
        for start in range(0, long_first.shape[0], BLOCK):
            block = long_first[start : start + BLOCK].astype(np.float64)
            lower = _syrk(dsyrk, block, beta=1.0, c=lower, overwrite_c=1)
    return _mirror(torch.from_numpy(lower.T))


def _syrk(syrk, long_first: np.ndarray, **accumulate):
    """Compute XᵀX of X (long, short) into the lower triangle, without copying X whatever its order."""
    if long_first.flags.f_contiguous:
        return syrk(1.0, long_first, trans=1, lower=1, **accumulate)
    return syrk(1.0, long_first.T, trans=0, lower=1, **accumulate)


def _mirror(upper: torch.Tensor) -> torch.Tensor:
    """Copy the upper triangle onto the lower one, in place, block by block."""
    size = upper.shape[0]
    for start in range(0, size, 256):
        stop = min(start + 256, size)
        upper[stop:, start:stop] = upper[start:stop, stop:].T
        corner = upper[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
    return upper
