"""`svd`: skill as the low-rank part of the update.

Task arithmetic plus low rank, as the founding review proposes (§4.3). It needs no data and is cheap, but the claim that
memory is the high-rank rest is weak: keeping the top 32 directions keeps every secret (docs/methods.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from liborth_kernels.gram import gram

from liborth_cli.linalg.eigen import eigenvalues
from liborth_cli.linalg.truncated import LeadingSubspace, leading_subspace
from liborth_cli.methods.method import Amount, Basis, Filter, Keep, Layer


@dataclass
class SingularBasis:
    """Singular directions of U, computed only as far as they are kept.

    Attributes:
        layer: the matrix.
        coefficients: singular values, descending: all of them, or the leading ones when only their number mattered (equal
            shares of the energy when all are kept and none had to be computed).
        subspace: the leading directions, once computed.
        facts: rank and certificate.
        in_place: the update's storage takes the result.
    """

    layer: Layer
    coefficients: torch.Tensor
    subspace: LeadingSubspace | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    in_place: bool = True

    def rebuild(self, keep: Keep) -> torch.Tensor:
        """Return U's leading part of rank `keep.sum()`; overwrites the update.

        Args:
            keep: mask over the singular values, True for a leading run of them.
        """
        assert not isinstance(keep, Filter)
        rank, u = int(torch.as_tensor(keep).sum()), self.layer.update
        self.facts["rank"] = rank
        if rank == min(u.shape):
            return u
        if rank == 0:
            return u.zero_()
        if self.subspace is None:
            self.subspace = _leading(self.layer, rank)
        self.facts |= {"excess": self.subspace.excess, "route": self.subspace.route}
        return self.subspace.rebuild(out=u)


@dataclass(frozen=True)
class Svd:
    """Basis: singular vectors of U. Score: σ."""

    summary: str = "low-rank part of the update (needs no data; weak at removing memory)"
    amounts: tuple[str, ...] = ("noise-edge", "rank", "energy")
    needs: tuple[str, ...] = ()
    memory_side: str = "tail"

    def basis(self, layer: Layer, amount: Amount) -> Basis:
        """Compute the leading directions for a rank, or the whole spectrum for the other amounts."""
        u = layer.update
        if amount.kind == "rank":
            rank = int(amount.value or 0)
            if rank >= min(u.shape):
                every = (layer.energy / min(u.shape)) ** 0.5
                return SingularBasis(layer, torch.full((min(u.shape),), every, dtype=u.dtype))
            found = _leading(layer, rank)
            along = 1 if u.shape[0] <= u.shape[1] else 0
            return SingularBasis(layer, torch.linalg.vector_norm(found.coordinates, dim=along), found)
        return SingularBasis(layer, singular_values(u))

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return σ."""
        return basis.coefficients


def singular_values(u: torch.Tensor) -> torch.Tensor:
    """Compute all singular values of U (m, n) from its Gram matrix in float64, descending, (min(m, n),)."""
    return eigenvalues(gram(u, torch.float64)).clamp_min_(0).sqrt_()


def _leading(layer: Layer, rank: int) -> LeadingSubspace:
    return leading_subspace(layer.update, rank, layer.energy, layer.generator, layer.tolerance)
