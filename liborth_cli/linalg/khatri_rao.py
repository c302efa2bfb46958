"""A tall matrix whose row t is g_t ⊗ a_t, never formed: what single tokens feel of a weight matrix.

The row-wise Khatri–Rao product B (T, m·n) of g (T, m) and a (T, n). Reading a weight X (m, n) as a vector, (B X)_t = g_tᵀ X a_t
is what token t feels of it, Bᵀv = Σ_t v_t g_t a_tᵀ is a weight, and K = B Bᵀ = (g gᵀ)∘(a aᵀ) is the kernel among tokens. A
product with K costs 4·T·m·n flops and nothing of size T² or m²n². SciPy has `linalg.khatri_rao`, which forms it.

How to use it: scale the tokens as you like (whitened by retain factors, times the root of a weight), one `KhatriRao` a
matrix. The kernel of several matrices that see the same tokens is the sum of theirs, its trace the sum of the `diagonal()`s.
`liborth_cli/linalg/regularised.py` solves with it and certifies the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch

from liborth_cli.machine import multiplies_bfloat16

PIECE = 4096
"""Tokens multiplied at a time: enough to keep a processor busy, few enough for the products to stay small."""


@dataclass(frozen=True)
class KhatriRao:
    """B, (T, m·n), as its two sides.

    Attributes:
        left: g, (T, m), float32 or float64.
        right: a, (T, n), of the same dtype, on the same device.
    """

    left: torch.Tensor
    right: torch.Tensor

    def __len__(self) -> int:
        """T."""
        return len(self.left)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), of the weights."""
        return self.left.shape[1], self.right.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.left.nbytes + self.right.nbytes

    def narrowed(self) -> KhatriRao:
        """Return B in bfloat16, where products of such numbers are faster than those of its own; else itself."""
        if self.left.dtype != torch.float32 or not multiplies_bfloat16(self.left.device):
            return self
        return KhatriRao(self.left.bfloat16(), self.right.bfloat16())

    def combine(self, v: torch.Tensor) -> torch.Tensor:
        """Return Bᵀv = Σ_t v_t g_t a_tᵀ, (m, n), in the dtype of the sides, float32 at least; v (T,), of any."""
        out = self.left.new_zeros(self.shape, dtype=torch.promote_types(self.left.dtype, torch.float32))
        for g, a, w in zip(self.left.split(PIECE), self.right.split(PIECE), v.to(self.left).split(PIECE), strict=True):
            # The weights go onto the narrower side.
            g, a = (g * w[:, None], a) if g.shape[1] <= a.shape[1] else (g, a * w[:, None])  # noqa: PLW2901
            if out.dtype == g.dtype:
                out.addmm_(g.T, a)
            else:
                out += g.T @ a
        return out

    def along(self, x: torch.Tensor) -> torch.Tensor:
        """Return B X, (B X)_t = g_tᵀ X a_t, (T,), in the dtype of the sides, float32 at least; X (m, n)."""
        total = torch.promote_types(self.left.dtype, torch.float32)
        x = x.to(self.left)
        if self.shape[0] < self.shape[1]:
            sides, x = (self.right, self.left), x.T
        else:
            sides = (self.left, self.right)
        pieces = zip(*(side.split(PIECE) for side in sides), strict=True)
        return torch.cat([(p @ x).mul_(q).sum(1, dtype=total) for p, q in pieces])

    def blocks(self, parts: int) -> torch.Tensor:
        """Return K among the n-th tokens of all parts, (T/parts, parts, parts), float64; the rows are parts of equal length."""
        count = len(self) // parts
        out = torch.ones(count, parts, parts, dtype=torch.float64, device=self.left.device)
        for side in (self.left, self.right):
            some = side.split(count)
            for i, j in combinations_with_replacement(range(parts), 2):
                pieces = zip(some[i].split(PIECE), some[j].split(PIECE), strict=True)
                out[:, i, j] *= torch.cat([torch.linalg.vecdot(one, other) for one, other in pieces])
                out[:, j, i] = out[:, i, j]
        return out

    def diagonal(self) -> torch.Tensor:
        """Return K_tt = ‖g_t‖²·‖a_t‖², (T,), float64."""
        return self.blocks(1).flatten()

    def kernel(self) -> torch.Tensor:
        """Return K, (T, T), in the dtype of the sides: for few tokens."""
        return (self.left @ self.left.T).mul_(self.right @ self.right.T)
