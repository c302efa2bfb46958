"""Leading eigenpairs of a dense symmetric matrix by a Householder tridiagonalisation that stops when it has seen enough.

LAPACK's SYTRD reduces G a panel of columns at a time. After m columns G is orthogonally similar to

    [ T        β e_m e_1ᵀ ]     T: tridiagonal, (m, m), the Lanczos matrix of a Krylov space of G, with Ritz values θ
    [ β e_1 e_mᵀ      R   ]     R: what is left, dense, (n − m, n − m)

The outer eigenvalues converge long before m = n, and going on only polishes the others. When s·I − R is positive definite (a
Cholesky factorisation L Lᵀ decides) its Schur complement bounds every eigenvalue of G from s on:

    λ_i(G) ≤ λ_i(T + c e_m e_mᵀ),   c = β² e_1ᵀ(s·I − R)⁻¹e_1 = β² ‖L⁻¹e_1‖²,   for all i with θ_i ≥ s,

because inertia adds over Schur complements (Haynsworth 1968) and c falls as s grows. With s = θ_k this is an upper bound on
λ_1 + … + λ_k, and θ_1 + … + θ_k is a lower one (Cauchy): when the two agree, nothing is missing, copies of multiple eigenvalues
included. Where they do not agree by half of the columns the reduction is finished, and T is all of G. LAPACK's drivers reduce
all of G before they look; what they are made of (LATRD, SYR2K, STEBZ, STEIN, ORMQR) is called here, so that we can stop.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import numpy as np
import torch
from liborth_kernels.fortran import call

from liborth_cli.linalg.eigen import leading_eigh

PANEL = 32
"""Columns reduced between two updates of the rest."""
CHECKPOINTS = (0.25, 0.3125, 0.375, 0.4375, 0.5)
"""Shares of the columns after which to look: a look costs a tenth of what is left, or less."""
SMALLEST = 256
"""Below this size the whole reduction is cheap."""
NOISE = 64
"""A k-th eigenvalue below so many units of rounding of the first is noise, and no factorisation can tell what is above it."""
GAP = 5e-6
"""How far the bounds may be apart, relative to the rest of the trace: a twentieth of the excess that `split` promises."""


@dataclass(frozen=True)
class LeadingPairs:
    """The k leading eigenpairs of G, and a bound on what they can miss.

    Attributes:
        values: θ, descending, (k,), of G's dtype.
        vectors: orthonormal columns, (n, k).
        upper: λ_1 + … + λ_k is at most this, up to rounding in G's dtype.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    upper: float


def leading_pairs(g: torch.Tensor, count: int) -> LeadingPairs:
    """Find the k leading eigenpairs of a symmetric matrix; on other devices than the CPU by torch, all of them.

    Args:
        g: (n, n), float32 or float64, contiguous; on the CPU only its upper triangle is read. It is overwritten.
        count: k, from 1 to n.
    """
    if g.is_cuda:
        values, vectors = leading_eigh(g, count)
        return LeadingPairs(values, vectors, values.double().sum().item())
    n = g.shape[0]
    reduction, trace = _Reduction(g), float(g.diagonal().double().sum())
    if n >= SMALLEST:
        for share in CHECKPOINTS:
            m = int(share * n) // PANEL * PANEL
            if m < 3 * count:
                continue
            reduction.reach(m)
            theta = reduction.ritz_values(count)
            if theta[-1] < NOISE * theta[0] * torch.finfo(g.dtype).eps:
                break
            upper = reduction.bound(theta)
            if upper - float(theta.sum(dtype=np.float64)) <= GAP * (trace - upper):
                return reduction.pairs(count, upper)
    reduction.finish()
    return reduction.pairs(count, None)


class _Reduction:
    """G, reduced as far as it has been asked to be. Fortran sees C's upper triangle as its lower one."""

    def __init__(self, g: torch.Tensor) -> None:
        self.n, self.done = g.shape[0], 0
        self.a, self.kind = g.numpy(), g.numpy().dtype
        self.letter, self.real = ("s", ctypes.c_float) if g.dtype == torch.float32 else ("d", ctypes.c_double)
        self.diagonal, self.off, self.tau = (np.empty(self.n, self.kind) for _ in range(3))
        self.work = np.empty((PANEL, self.n), self.kind)

    def reach(self, m: int) -> None:
        """Reduce panels until m columns are done."""
        flat, n = self.a.reshape(-1), self.n
        while self.done < m:
            i, after = self.done, self.done + PANEL
            corner, rest = flat[i * n + i :], n - after
            self._call("latrd", "L", n - i, PANEL, corner, n, self.off[i:], self.tau[i:], self.work, n)
            v, w, trailing = flat[i * n + after :], self.work.reshape(-1)[PANEL:], flat[after * n + after :]
            self._call("syr2k", "L", "N", rest, PANEL, -1.0, v, n, w, n, 1.0, trailing, n)
            self.diagonal[i:after] = self.a.diagonal()[i:after]
            self.done = after

    def finish(self) -> None:
        """Reduce all that is left."""
        i, left, info = self.done, self.n - self.done, ctypes.c_int()
        corner = self.a.reshape(-1)[i * self.n + i :]
        d, e, tau = self.diagonal[i:], self.off[i:], self.tau[i:]
        self._call("sytrd", "L", left, corner, self.n, d, e, tau, self.work, self.work.size, info)
        self.done = self.n

    def ritz_values(self, count: int) -> np.ndarray:
        """Return θ, descending, (k,)."""
        return self._values(self.diagonal[: self.done], count)

    def bound(self, theta: np.ndarray) -> float:
        """Bound λ_1 + … + λ_k from above, given θ (k,), descending; infinity when R reaches up to θ_k."""
        m, left, info = self.done, self.n - self.done, ctypes.c_int()
        s = float(theta[-1]) * (1 - 4 * left**0.5 * float(np.finfo(self.kind).eps))  # Cholesky's own rounding stays below
        shifted = -self.a[m:, m:]
        shifted.reshape(-1)[:: left + 1] += self.kind.type(s)
        self._call("potrf", "L", left, shifted, left, info)
        if info.value:
            return math.inf
        first = np.zeros(left, self.kind)
        first[0] = 1
        self._call("trsv", "L", "N", "N", left, shifted, left, first, 1)
        bordered = self.diagonal[:m].copy()
        bordered[-1] += float(self.off[m - 1]) ** 2 * float(np.dot(first, first))
        return float(self._values(bordered, len(theta)).sum(dtype=np.float64))

    def pairs(self, count: int, upper: float | None) -> LeadingPairs:
        """Compute the vectors, those of T, then the reflectors in reverse; `upper` is None when T is all of G."""
        m, n, info = self.done, self.n, ctypes.c_int()
        z = np.zeros((count, n), self.kind)
        values = self._inverse_iteration(z)
        if values is None:
            every, vectors = np.linalg.eigh(self._dense(self.diagonal[:m]))
            values, z[:, :m] = every[-count:].astype(self.kind), vectors[:, -count:].T
        if n > 1:
            work, reflectors = np.empty(64 * count, self.kind), min(m, n - 1)
            below, rows = self.a.reshape(-1)[1:], z.reshape(-1)[1:]
            self._call("ormqr", "L", "N", n - 1, count, reflectors, below, n, self.tau, rows, n, work, len(work), info)
        order = np.argsort(values, kind="stable")[::-1]
        found, vectors = values[order], _orthonormal(np.ascontiguousarray(z[order].T))
        bound = float(found.sum(dtype=np.float64)) if upper is None else upper
        return LeadingPairs(torch.from_numpy(found), torch.from_numpy(vectors), bound)

    def _values(self, diagonal: np.ndarray, count: int) -> np.ndarray:
        """Return the k largest eigenvalues of T with this diagonal, descending."""
        found = self._bisection(diagonal, count)
        values = np.linalg.eigvalsh(self._dense(diagonal)).astype(self.kind) if found is None else np.sort(found[0])
        return values[-count:][::-1]

    def _bisection(self, diagonal: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Find the k largest eigenvalues of T by Sturm counts, ascending within each block that T falls apart into.

        Returns them with what STEIN wants to know of the blocks; None where STEBZ loses one, as it can when all are equal.
        """
        m = len(diagonal)
        found, blocks, info = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        values, block, split = np.empty(m, self.kind), np.empty(m, np.int32), np.empty(m, np.int32)
        work, iwork = np.empty(4 * m, self.kind), np.empty(3 * m, np.int32)
        self._call(
            "stebz", "I", "B", m, 0.0, 0.0, m - count + 1, m, 0.0, diagonal, self.off, found, blocks, values, block, split,
            work, iwork, info,
        )  # fmt: skip
        return None if info.value or found.value != count else (values[:count], block, split)

    def _inverse_iteration(self, z: np.ndarray) -> np.ndarray | None:
        """Write T's leading eigenvectors into the rows of z (k, n), and return their values; None when it does not converge."""
        m, found, info = self.done, self._bisection(self.diagonal[: self.done], len(z)), ctypes.c_int()
        if found is None:
            return None
        work, iwork, failed = np.empty(5 * m, self.kind), np.empty(m, np.int32), np.empty(len(z), np.int32)
        self._call("stein", m, self.diagonal, self.off, len(z), *found, z, self.n, work, iwork, failed, info)
        return None if info.value else found[0]

    def _dense(self, diagonal: np.ndarray) -> np.ndarray:
        """Return T with this diagonal as an ordinary matrix in float64."""
        off = self.off[: len(diagonal) - 1].astype(np.float64)
        return np.diag(diagonal.astype(np.float64)) + np.diag(off, 1) + np.diag(off, -1)

    def _call(self, name: str, *arguments: str | int | float | np.ndarray | ctypes.c_int) -> None:
        call(self.letter + name, *arguments, real=self.real)


def _orthonormal(v: np.ndarray) -> np.ndarray:
    """Take one Newton–Schulz step to the nearest orthonormal columns.

    Inverse iteration in float32 leaves vectors of close eigenvalues up to 1e-4 from orthogonal; a step squares that.
    """
    return v @ (1.5 * np.eye(v.shape[1], dtype=v.dtype) - 0.5 * (v.T @ v))
