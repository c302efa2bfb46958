"""The leading singular subspace of a matrix, with a proven bound on what is lost against the optimum.

Keeping k singular directions of U leaves the tail energy τ_k = Σ_{i>k} σ_i². Any other k directions leave more; the
*excess* is that surplus divided by τ_k. We never promise vectors (inside a flat spectrum they are ill-defined), we
promise the excess, and prove it from an upper bound on σ_1² + … + σ_k²:

- small matrices: the Gram matrix G is tridiagonalised as far as it takes for an upper and a lower bound of the sum to meet
  (tridiagonal.py), and to the end where they do not;
- large matrices: Ritz pairs (Θ, Y) with residual R of a block Krylov space. If G − YΘYᵀ ≺ μI (one Cholesky
  factorisation decides) and θ_k > μ, then λ_i(G) ≤ λ_i(Θ + RᵀR / (θ_k − μ)) for i ≤ k, by the Schur complement of
  G − sI at s ≥ θ_k.

Rounding of a float32 Gram and of its eigenvalues is allowed for by (3·√k + 5)·u·σ_1²: the square root is what probabilistic
rounding analysis gives (Higham & Mary 2019), the constants are 1.6 times the worst case measured over shapes, spectra and
seeds (docs/log.md; the tests hold it against float64). Tensor cores do not round to nearest: they cut off, so a GPU's Gram is
too small throughout. By how much is measured for every matrix, tr G against ‖U‖² in float64, and twice that is allowed for
beside the rest. Where the bound misses the tolerance the work is done again in
float64, then by full SVD. No library's truncated SVD comes with a bound on the energy it missed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from liborth_cli.linalg.eigen import is_positive_definite
from liborth_cli.linalg.krylov import RitzPairs, block_krylov
from liborth_cli.linalg.rows import Rows, ThinProduct, along, gram_of, whole
from liborth_cli.linalg.tridiagonal import leading_pairs

KRYLOV_FROM = 4096
"""Shorter side from which block Krylov beats the partial eigensolver (measured, docs/log.md)."""
KRYLOV_DEPTH = 14
"""Blocks of rank + 16 vectors; twelve were too few to certify 1e-4 inside a flat spectrum (docs/log.md)."""
TAIL_FLOOR = 1e-6
"""A tail below this share of the energy counts as this share: beneath it float32 weights are only rounding."""


@dataclass(frozen=True)
class LeadingSubspace:
    """Orthonormal directions on the shorter side of U, and U's coordinates along them.

    Attributes:
        vectors: Q, (min(m, n), k).
        coordinates: QᵀU (k, n) when m ≤ n, else UQ (m, k).
        captured: ‖coordinates‖², the energy these directions hold.
        excess: proven bound on (tail energy − optimal tail energy) / optimal tail energy.
        route: how it was found: "gram32", "krylov32", "gram64" or "svd".
    """

    vectors: torch.Tensor
    coordinates: torch.Tensor
    captured: float
    excess: float
    route: str

    @property
    def values(self) -> torch.Tensor:
        """The singular values along them, descending but for rounding, (k,)."""
        return torch.linalg.vector_norm(self.coordinates, dim=int(len(self.coordinates) == self.vectors.shape[1]))

    def rebuild(self, out: torch.Tensor) -> torch.Tensor:
        """Write the rank-k part of U into `out` (m, n) and return it."""
        if out.shape[0] <= out.shape[1]:
            return torch.mm(self.vectors, self.coordinates, out=out)
        return torch.mm(self.coordinates, self.vectors.T, out=out)

    def thin(self, tall: bool) -> ThinProduct:
        """Return the rank-k part of U as two thin factors; `tall` says whether U has more rows than columns."""
        return ThinProduct(self.coordinates, self.vectors) if tall else ThinProduct(self.vectors, self.coordinates.T)


def energy(u: torch.Tensor) -> float:
    """Return ‖U‖² accumulated in float64, in pieces that fit the cache; on a GPU in pieces that keep it busy."""
    pieces = (piece.double() for piece in u.reshape(-1).split(1 << 18 if u.device.type == "cpu" else 1 << 26))
    return math.fsum(torch.dot(piece, piece).item() for piece in pieces)


def leading_subspace(
    u: torch.Tensor | Rows, rank: int, total: float, generator: torch.Generator, tolerance: float = 1e-4
) -> LeadingSubspace:
    """Find k directions whose excess over the optimum is proven to be at most `tolerance`.

    Args:
        u: U, (m, n), float32 or float64, finite; in memory, or formed by rows.
        rank: k, from 1 to min(m, n).
        total: ‖U‖², from `energy`.
        generator: CPU generator for the Krylov start block.
        tolerance: the largest excess to accept; 0 asks for the full SVD.
    """
    if tolerance > 0:
        routes = [_gram32] if u.dtype == torch.float32 else []
        if u.dtype == torch.float32 and _is_large(u, rank):
            routes.insert(0, _krylov32)
        for route in [*routes, _gram64]:
            found = route(u, rank, total, generator)
            if found.excess <= tolerance:
                return found
    return _svd(whole(u), rank)


def _is_large(u: torch.Tensor | Rows, rank: int) -> bool:
    """Tell whether block Krylov comes first. A GPU has no partial eigensolver, so it does for fewer directions of less."""
    side = min(u.shape)
    if isinstance(u, torch.Tensor) and u.device.type != "cpu" and 36 * (rank + 16) <= side:
        return side >= KRYLOV_FROM // 4
    return side >= KRYLOV_FROM and 18 * (rank + 16) <= side


def _krylov32(u: torch.Tensor | Rows, rank: int, total: float, generator: torch.Generator) -> LeadingSubspace:
    g = gram_of(u, u.dtype)
    pairs = block_krylov(g, 2 * rank, rank + 16, KRYLOV_DEPTH, generator)
    upper = _krylov_bound(g, pairs, rank) * _lost(g, total)
    return _certify(u, pairs.vectors[:, :rank].contiguous(), upper, total, "krylov32")


def _gram32(u: torch.Tensor | Rows, rank: int, total: float, generator: torch.Generator) -> LeadingSubspace:
    g = gram_of(u, u.dtype, both=False)
    lost = _lost(g, total)
    found = leading_pairs(g, rank)
    return _certify(u, found.vectors, _padded(found.upper, found.values, torch.float32) * lost, total, "gram32")


def _gram64(u: torch.Tensor | Rows, rank: int, total: float, generator: torch.Generator) -> LeadingSubspace:
    found = leading_pairs(gram_of(u, torch.float64, both=False), rank)
    return _certify(u, found.vectors.to(u.dtype), _padded(found.upper, found.values, torch.float64), total, "gram64")


def _svd(u: torch.Tensor, rank: int) -> LeadingSubspace:
    left, values, right = torch.linalg.svd(u, full_matrices=False)
    if u.shape[0] <= u.shape[1]:
        vectors, coordinates = left[:, :rank].contiguous(), values[:rank, None] * right[:rank]
    else:
        vectors, coordinates = right[:rank].T.contiguous(), left[:, :rank] * values[:rank]
    return LeadingSubspace(vectors, coordinates.contiguous(), energy(coordinates), 0.0, "svd")


def _padded(upper: float, values: torch.Tensor, dtype: torch.dtype) -> float:
    """Add to a bound on the sum of the top eigenvalues of a Gram matrix what rounding may have hidden."""
    return upper + (3 * math.sqrt(len(values)) + 5) * torch.finfo(dtype).eps / 2 * values[0].item()


def _lost(g: torch.Tensor, total: float) -> float:
    """Return what a bound found from a Gram matrix is multiplied by for what its sums lost; 1 on the CPU, which rounds."""
    if g.device.type == "cpu" or not total:
        return 1.0
    return 1.0 + 2.0 * abs(1.0 - g.diagonal().double().sum().item() / total)


def _krylov_bound(g: torch.Tensor, pairs: RitzPairs, rank: int) -> float:
    """Bound λ_1 + … + λ_rank from above, or return infinity when the deflated matrix is not below μ."""
    theta = pairs.values
    mu = (theta[rank - 1] + theta[-1]).item() / 2
    deflated = torch.addmm(g, pairs.vectors * theta.to(g.dtype), pairs.vectors.T, beta=-1)
    deflated.diagonal().add_(mu)
    if not is_positive_definite(deflated):
        return math.inf
    r = pairs.residuals.double()
    corrected = torch.diag(theta.double()) + (r.T @ r) / (theta[rank - 1].item() - mu)
    top = torch.linalg.eigvalsh(corrected).flip(0)[:rank]
    return _padded(top.sum().item(), top, g.dtype)


def _certify(u: torch.Tensor | Rows, vectors: torch.Tensor, upper: float, total: float, route: str) -> LeadingSubspace:
    coordinates = along(u, vectors)
    captured = energy(coordinates)
    tail = max(total - upper, TAIL_FLOOR * total)
    excess = max(upper - captured, 0.0) / tail if tail > 0 else 0.0
    return LeadingSubspace(vectors, coordinates, captured, excess, route)
