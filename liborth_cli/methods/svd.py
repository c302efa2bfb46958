"""`svd`: skill as the low-rank part of the update.

Task arithmetic plus low rank. It needs no data and is cheap, and it does not forget: keeping the top 32 directions of a mixed
update keeps every secret (docs/methods.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from liborth_cli.methods.method import Amount, Layer, Method

if TYPE_CHECKING:
    import torch

    from liborth_cli.linalg.truncated import LeadingSubspace
    from liborth_cli.methods.selection import Basis, Facts, Keep

NEGLIGIBLE = 1e-3
"""Share of the energy that may lie outside of the directions that are counted as an update's rank."""


@dataclass
class SingularBasis:
    """Singular directions of U, computed only as far as they are kept.

    Attributes:
        layer: the matrix.
        coefficients: singular values, descending: all of them, or the leading ones when only their number mattered (equal
            shares of the energy when all are kept and none had to be computed).
        subspace: the leading directions, once computed.
        facts: rank and certificate, and `update_rank` of an update whose rank is known.
        in_place: the update's storage takes the result.
    """

    layer: Layer
    coefficients: torch.Tensor
    subspace: LeadingSubspace | None = None
    facts: Facts = field(default_factory=dict)
    in_place: bool = True

    def rebuild(self, keep: Keep) -> torch.Tensor:
        """Return U's leading part of rank `keep.sum()`, a mask, True for a leading run of values; overwrites the update."""
        import torch

        assert isinstance(keep, (torch.Tensor, float))
        rank, u = int(torch.as_tensor(keep).sum()), self.layer.update
        self.facts["rank"] = rank
        if rank == min(u.shape):
            return u
        self.facts |= known_rank(self.coefficients, self.layer.energy)
        if rank == 0:
            return u.zero_()
        if self.subspace is None:
            self.subspace = _leading(self.layer, rank)
        self.facts |= {"excess": self.subspace.excess, "route": self.subspace.route}
        return self.subspace.rebuild(out=u)


@dataclass(frozen=True)
class Svd(Method):
    """Basis: singular vectors of U. Score: σ."""

    name = "svd"
    summary = "low-rank part of the update (needs no data; does not forget)"
    amounts = ("noise-edge", "rank", "energy")
    default = Amount("noise-edge")

    def basis(self, layer: Layer, amount: Amount) -> Basis:
        """Compute the leading directions for a rank, or the whole spectrum for the other amounts."""
        import torch

        from liborth_cli.linalg.eigen import singular_values

        u = layer.update
        if amount.kind != "rank":
            return SingularBasis(layer, singular_values(u))
        rank = int(amount.value or 0)
        if rank >= min(u.shape):
            every = (layer.energy / min(u.shape)) ** 0.5
            return SingularBasis(layer, torch.full((min(u.shape),), every, dtype=u.dtype))
        found = _leading(layer, rank)
        return SingularBasis(layer, found.values, found)

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return σ."""
        return basis.coefficients


def known_rank(values: torch.Tensor, total: float) -> Facts:
    """Return how many directions hold all of an update but a negligible rest, where the leading values σ tell.

    Args:
        values: singular values, descending, as many as were found.
        total: ‖U‖².
    """
    held = values.double().square().cumsum(0) >= (1 - NEGLIGIBLE) * total
    return {"update_rank": len(held) - int(held.sum()) + 1} if bool(held.any()) else {}


def _leading(layer: Layer, rank: int) -> LeadingSubspace:
    from liborth_cli.linalg.truncated import leading_subspace

    return leading_subspace(layer.update, rank, layer.energy, layer.generator, layer.tolerance)
