"""G = U Uᵀ or UᵀU, whichever is smaller."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from liborth_kernels.fortran import call

BLOCK = 4096
STRIPS = 8
"""On a GPU: strips along the diagonal, so that 9/16 of the product is computed."""


def gram(u: torch.Tensor, dtype: torch.dtype | None = None, both: bool = True) -> torch.Tensor:
    """Multiply a matrix by its own transpose on its shorter side.

    On the CPU this is BLAS SYRK, half the work of the matrix product that torch would do; elsewhere torch's product in strips.
    It has no Triton kernel: with float32 products on the ordinary cores (a certificate rests on them) half the tiles cannot
    make up for what cuBLAS is faster than Triton's. A float64 Gram of a float32
    matrix is accumulated over blocks of the longer side, so no float64 copy of `u` is made.

    Args:
        u: matrix, (m, n), float32 or float64, contiguous.
        dtype: of the result; `u.dtype` when None.
        both: fill both triangles; else the lower one holds zeros on the CPU.

    Returns:
        (min(m, n), min(m, n)), symmetric.
    """
    dtype = dtype or u.dtype
    tall = u.shape[0] > u.shape[1]
    size, length = min(u.shape), max(u.shape)
    if u.device.type != "cpu":
        side = (u.T if tall else u).to(dtype)
        out, strip = torch.empty(size, size, dtype=dtype, device=u.device), max(-(-size // STRIPS), 1)
        for start in range(0, size, strip):
            torch.mm(side[start : start + strip], side[start:].T, out=out[start : start + strip, start:])
        return mirror(out)
    out = torch.zeros(size, size, dtype=dtype)
    step = length if dtype == u.dtype else BLOCK
    for start in range(0, length, step):
        block = u[start : start + step] if tall else u[:, start : start + step]
        accumulate(block.to(dtype).contiguous() if dtype != u.dtype else block, tall, out)
    return mirror(out) if both else out


def accumulate(u: torch.Tensor, tall: bool, out: torch.Tensor, weight: float = 1.0) -> None:
    """Add weight · UᵀU (tall) or weight · UUᵀ to the upper triangle of `out`, by BLAS SYRK on the CPU.

    Fortran sees both transposed, so it fills its lower triangle.

    Args:
        u: matrix, (m, n), float32 or float64, rows contiguous.
        tall: which of the two products.
        out: running total, (n, n) or (m, m), of u's dtype, contiguous.
        weight: factor on the product.
    """
    real, name = (ctypes.c_float, "ssyrk") if out.dtype == torch.float32 else (ctypes.c_double, "dsyrk")
    inner, size = (u.shape[0], u.shape[1]) if tall else (u.shape[1], u.shape[0])
    columns = u.shape[1]
    array: np.ndarray = u.numpy()
    call(name, "L", "N" if tall else "T", size, inner, float(weight), array, columns, 1.0, out.numpy(), size, real=real)


def mirror(upper: torch.Tensor) -> torch.Tensor:
    """Copy the upper triangle onto the lower one, in place, block by block."""
    size, step = upper.shape[0], 256 if upper.device.type == "cpu" else 4096
    for start in range(0, size, step):
        stop = min(start + step, size)
        upper[stop:, start:stop] = upper[start:stop, stop:].T
        corner = upper[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
    return upper
