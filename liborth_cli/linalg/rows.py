"""Matrices of low rank, or too tall to hold: blocks of rows, two thin factors, and what spans a covariance of few samples.

NumPy, SciPy and torch want a matrix whole; an embedding's update is formed from two files and looked at twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from liborth_kernels.gram import accumulate, gram, mirror
from liborth_kernels.sketch import add_update_gram, update_sketch

MOST_DIRECTIONS = 2048
"""Directions beyond which a covariance counts as full."""
LOOK = 32
"""Steps between two looks at what is left: on a GPU every look waits for it."""
PIVOTS = 64
"""Rows that a GPU factorises at a time."""
MISSED = 1e-6
"""Share of the trace that may be missed. Covariances come in float32: about a tenth of that is their own rounding."""


class Rows(Protocol):
    """A tall matrix, (m, n) with m ≥ n, that is formed when it is looked at.

    Attributes:
        shape: (m, n).
        dtype: of its blocks.
    """

    @property
    def shape(self) -> tuple[int, int]: ...  # noqa: D102

    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield blocks of rows, top to bottom, (some, n); each is valid until the next one."""
        ...

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]] | None:
        """Return the same blocks as two weights to be subtracted, on a GPU; None where there are no such two."""
        ...


@dataclass(frozen=True)
class ThinProduct:
    """L Rᵀ, multiplied out only where it is looked at.

    Attributes:
        left: L, (m, k).
        right: R, (n, k).
    """

    left: torch.Tensor
    right: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where both factors are."""
        return self.left.device

    @property
    def dtype(self) -> torch.dtype:
        """Of both factors."""
        return self.left.dtype

    def whole(self, dtype: torch.dtype, exact: bool = False) -> torch.Tensor:
        """Multiply it out, (m, n), in a dtype; `exact` multiplies in the factors' own and rounds once, in twice the time."""
        if exact:
            return (self.left @ self.right.T).to(dtype)
        return self.left.to(dtype) @ self.right.to(dtype).T

    def on_orthonormal(self, dtype: torch.dtype) -> ThinProduct:
        """Return the same matrix with the columns of R orthonormal, so that those of L are as large as what they stand for."""
        basis, triangle = torch.linalg.qr(self.right)
        return ThinProduct((self.left @ triangle.T).to(dtype), basis.to(dtype))

    def __getitem__(self, elements: slice) -> torch.Tensor:
        """Return a range of elements in row-major order, flat."""
        n = self.right.shape[0]
        first, last = elements.start // n, -(-elements.stop // n)
        rows = self.left[first:last] @ self.right.T
        return rows.view(-1)[elements.start - first * n : elements.stop - first * n]


@dataclass(frozen=True)
class Samples:
    """A covariance XᵀX of few samples, never multiplied out where a product with it is all that is wanted.

    Attributes:
        rows: X, (k, d), with what each sample counts in it.
    """

    rows: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """(d, d)."""
        return torch.Size((self.rows.shape[1],) * 2)

    @property
    def dtype(self) -> torch.dtype:
        """Of the samples."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        return self.rows.device

    def __len__(self) -> int:
        """Return d."""
        return self.rows.shape[1]

    def dim(self) -> int:
        """Return 2, the dimensions of a matrix."""
        return 2

    def to(self, like: torch.Tensor) -> Samples:
        """Return the same with the dtype and device of another tensor."""
        return Samples(self.rows.to(like))

    def trace(self) -> float:
        """Return the sum of the eigenvalues."""
        return float(self.rows.double().square().sum())

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Multiply it out, (d, d)."""
        rows = self.rows.to(dtype)
        return rows.T @ rows


def gram_of(u: torch.Tensor | Rows, dtype: torch.dtype, both: bool = True) -> torch.Tensor:
    """Multiply a matrix by its own transpose on its shorter side, (min(m, n), min(m, n)).

    Args:
        u: (m, n).
        dtype: of the result.
        both: fill both triangles; else the lower one holds zeros on the CPU.
    """
    if isinstance(u, torch.Tensor):
        return gram(u, dtype, both)
    n = u.shape[1]
    out: torch.Tensor | None = None
    pairs = u.pairs()
    if pairs is not None:
        for new, old in pairs:
            out = torch.zeros(n, n, dtype=dtype, device=new.device) if out is None else out
            add_update_gram(out, new, old)
        assert out is not None
        return mirror(out)
    out = torch.zeros(n, n, dtype=dtype)
    for block in u.blocks():
        accumulate(block.to(dtype), True, out)
    return mirror(out) if both else out


def along(u: torch.Tensor | Rows, vectors: torch.Tensor) -> torch.Tensor:
    """Return U's coordinates along directions of its shorter side: QᵀU (k, n) when m ≤ n, else UQ (m, k)."""
    if isinstance(u, torch.Tensor):
        return vectors.T @ u if u.shape[0] <= u.shape[1] else u @ vectors
    pairs = u.pairs()
    if pairs is not None:
        return torch.cat([update_sketch(new, old, vectors) for new, old in pairs])
    out = torch.empty(u.shape[0], vectors.shape[1], dtype=u.dtype)
    start = 0
    for block in u.blocks():
        out[start : start + len(block)] = block @ vectors
        start += len(block)
    return out


def whole(u: torch.Tensor | Rows) -> torch.Tensor:
    """Return all of it, (m, n), in memory."""
    return u if isinstance(u, torch.Tensor) else torch.cat([block.clone() for block in u.blocks()])


def few(size: int) -> int:
    """Return how many directions of a covariance of width `size` count as few."""
    return min(size // 3, MOST_DIRECTIONS)


def spanning_factor(f: torch.Tensor | Samples) -> torch.Tensor | None:
    """Factorise a covariance of few samples without an eigenproblem of its size.

    Cholesky factorisation with pivots, stopped when nothing is left (Harbrecht, Peters & Schneider 2012): every step takes the
    row with the largest diagonal entry, and what is left of the diagonal is left of the trace. A covariance of k samples is
    finished after k rows, and the others are never read; LAPACK's PSTRF would read and overwrite all of them.

    Args:
        f: F, symmetric and positive but for rounding, (d, d); or a diagonal, (d,); samples span it as they are.

    Returns:
        W, (d, k), float64, with tr(F − W Wᵀ) ≤ 1e-6 tr F; None when a third of F's directions do not do.
    """
    limit = few(len(f))
    if isinstance(f, Samples):
        return f.rows.double().T if len(f.rows) <= limit else spanning_factor(f.dense(f.dtype))
    if f.dim() == 1:
        return _columns(f.double(), limit)
    if f.device.type != "cpu":
        return in_blocks(f, limit)
    left = f.diagonal().double().clamp(min=0)
    rest = [left.sum()]
    enough = MISSED * rest[0]
    rows = left.new_empty(min(limit, 2 * LOOK), len(f))
    for count in range(limit + 1):
        if count % LOOK == 0 or count == limit:
            gone = torch.nonzero(torch.stack(rest) <= enough)[:, 0].tolist()
            if gone:
                return rows[: gone[0]].T
        if count == limit:
            return None
        if count == len(rows):
            rows = torch.cat([rows, rows.new_empty(min(count, limit - count), len(f))])
        pivot, done = left.argmax()[None], rows[:count]
        row = f.index_select(0, pivot)[0].double() - done.T @ done.index_select(1, pivot)[:, 0]
        rows[count] = row * left.index_select(0, pivot).clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
        left = (left - rows[count].square()).clamp(min=0)
        rest.append(left.sum())
    return None


def in_blocks(f: torch.Tensor, limit: int) -> torch.Tensor | None:
    """Do the same with `PIVOTS` pivots at a time, for a GPU: one step there is a few kernels that are too small for it.

    Of the block that the pivots meet in, directions far below its first are left: what is left of them can be met again.
    """
    left = f.diagonal().double().clamp(min=0)
    enough, done = MISSED * float(left.sum()), f.new_empty(0, len(f), dtype=torch.float64)
    while float(left.sum()) > enough:
        pivots = left.topk(min(PIVOTS, len(f))).indices
        rows = f.index_select(0, pivots).double() - done.index_select(1, pivots).T @ done
        values, vectors = torch.linalg.eigh(rows.index_select(1, pivots))
        count = min(int((values > 1e-4 * values[-1].clamp(min=0)).sum()), limit - len(done))
        if count <= 0:
            return None
        found = (vectors[:, -count:] / values[-count:].sqrt()).T @ rows
        done = torch.cat([done, found])
        left = (left - found.square().sum(0)).clamp(min=0)
    return done.T


def _columns(diagonal: torch.Tensor, limit: int) -> torch.Tensor | None:
    """Return one column for each entry of a diagonal that is not zero: of token frequencies, the tokens that occur."""
    places = diagonal.nonzero()[:, 0]
    if len(places) > limit:
        return None
    w = diagonal.new_zeros(len(diagonal), len(places))
    w[places, torch.arange(len(places), device=w.device)] = diagonal[places].clamp(min=0).sqrt()
    return w
