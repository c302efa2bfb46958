"""Symmetric eigenproblems and factorisations: LAPACK on the CPU, and torch elsewhere.

torch.linalg cannot ask for the leading pairs alone; scipy.linalg can, and holds the interpreter lock meanwhile. LAPACK called
through ctypes lets other matrices be worked on (docs/decisions/0004).
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from liborth_kernels.fortran import call
from liborth_kernels.gram import gram

from liborth_cli.errors import LiborthError


def leading_eigh(g: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the largest eigenvalues of a symmetric matrix and their vectors.

    LAPACK's SYEVR (relatively robust representations, Dhillon & Parlett 2004) finds them by their index with Sturm counts.

    Args:
        g: symmetric, (n, n), float32 or float64; overwritten.
        count: how many, from 1 to n.

    Returns:
        Eigenvalues (count,), descending, and orthonormal eigenvectors (n, count).
    """
    if g.device.type != "cpu":
        values, vectors = torch.linalg.eigh(g)
        return values.flip(0)[:count], vectors.flip(1)[:, :count].contiguous()
    values, vectors = _syevr(g, count, want_vectors=True)
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[::-1].T.copy(order="C"))


def eigenvalues(g: torch.Tensor) -> torch.Tensor:
    """Compute all eigenvalues of a symmetric matrix (n, n), descending, (n,); overwrites it."""
    if g.device.type != "cpu":
        return torch.linalg.eigvalsh(g).flip(0)
    return torch.from_numpy(_syevr(g, g.shape[0], want_vectors=False)[0][::-1].copy())


def singular_values(u: torch.Tensor) -> torch.Tensor:
    """Compute all singular values of U (m, n) from its Gram matrix in float64, descending, (min(m, n),)."""
    return eigenvalues(gram(u, torch.float64)).clamp_min_(0).sqrt_()


def cholesky(g: torch.Tensor) -> torch.Tensor | None:
    """Factorise symmetric matrices, (n, n) or (blocks, n, n): the lower L of G = L Lᵀ; None when one is not positive.

    Overwrites a single matrix. SciPy's OpenBLAS does it in two thirds of the time of torch's MKL (docs/log.md).
    """
    if g.device.type != "cpu" or g.dim() == 3:
        lower, failed = torch.linalg.cholesky_ex(g)
        return None if bool(failed.any()) else lower
    return g.tril_() if _factorised(g) else None


def solve_lower(lower: torch.Tensor, x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """Return L⁻¹x, or L⁻ᵀx, for a lower triangular L (n, n), or (blocks, n, n), and x (n, k), or (blocks, n, k).

    SciPy's OpenBLAS takes half of torch's time for a transposed L of width 1,024, and a tenth less elsewhere (docs/log.md).

    Args:
        lower: what is above its diagonal is not read.
        x: of the same dtype; read as it lies, row by row or column by column.
        transposed: solve with Lᵀ.
    """
    if lower.device.type != "cpu" or lower.dim() == 3:
        return torch.linalg.solve_triangular(lower.mT if transposed else lower, x, upper=transposed)
    columns = x.T.is_contiguous()
    out = x.clone() if columns else x.clone(memory_format=torch.contiguous_format)
    name, real = _kind(lower, "trsm")
    # To Fortran a row-major L is U = Lᵀ, and an x that lies row by row is xᵀ, with U on its right.
    side, turned, rows, count = ("L", not transposed, *x.shape) if columns else ("R", transposed, x.shape[1], x.shape[0])
    array = (out.T if columns else out).numpy()
    call(name, side, "U", "T" if turned else "N", "N", rows, count, 1.0, lower.numpy(), len(lower), array, rows, real=real)
    return out


def is_positive_definite(g: torch.Tensor) -> bool:
    """Try a Cholesky factorisation of a symmetric matrix (n, n); overwrites it."""
    return _factorised(g) if g.device.type == "cpu" else not torch.linalg.cholesky_ex(g)[1].item()


def _factorised(g: torch.Tensor) -> bool:
    """Put L where G was, below and on the diagonal, and return whether G was positive."""
    name, _ = _kind(g, "potrf")
    info = ctypes.c_int()
    call(name, "U", g.shape[0], g.numpy(), g.shape[0], info)  # to Fortran a row-major L is a U
    return info.value == 0 and bool(torch.isfinite(g.diagonal().sum()))  # OpenBLAS takes NaN for positive


def _syevr(g: torch.Tensor, count: int, want_vectors: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return ascending eigenvalues (count,) and eigenvectors as rows (count, n)."""
    name, real = _kind(g, "syevr")
    a = g.numpy()
    size, kind = a.shape[0], a.dtype
    values = np.empty(size, kind)
    vectors = np.empty((count if want_vectors else 1, size), kind)
    support = np.empty(2 * max(count, 1), np.int32)
    found, info = ctypes.c_int(), ctypes.c_int()
    whole = count == size
    work, iwork = np.empty(1, kind), np.empty(1, np.int32)
    for lwork in (-1, 0):
        if lwork == 0:
            work, iwork = np.empty(int(work[0]), kind), np.empty(int(iwork[0]), np.int32)
        call(
            name, "V" if want_vectors else "N", "A" if whole else "I", "L", size, a, size, 0.0, 0.0, size - count + 1, size,
            0.0, found, values, vectors, size, support, work, lwork or len(work), iwork, lwork or len(iwork), info, real=real,
        )  # fmt: skip
    if info.value or found.value != count:
        raise LiborthError(f"LAPACK's {name} did not converge (info {info.value}); the matrix may be badly scaled")
    return values[:count], vectors


def _kind(g: torch.Tensor, suffix: str) -> tuple[str, type]:
    return ("s" + suffix, ctypes.c_float) if g.dtype == torch.float32 else ("d" + suffix, ctypes.c_double)
