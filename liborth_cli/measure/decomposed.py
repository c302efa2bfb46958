"""Dividing the same matrices by `svd` many times over, each decomposed once: for amounts that are found by trying."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from liborth_cli.linalg.truncated import LeadingSubspace, leading_subspace
from liborth_cli.methods import Layer
from liborth_cli.methods.selection import select
from liborth_cli.methods.svd import SingularBasis
from liborth_cli.split import SplitOptions
from liborth_cli.split.matrix import MatrixReport, keep_first, split_matrix

WIDEST = 2048
"""Shorter side up to which a whole decomposition costs no more than a few truncated ones."""


@dataclass
class Decomposed:
    """A division (see `Unwritten`) by `svd`, whose decompositions stay in memory as far as the budget goes.

    Attributes:
        budget: bytes that may be kept; a decomposition takes about twice its matrix.
    """

    budget: int
    _kept: dict[tuple[str, int], LeadingSubspace] = field(default_factory=dict)

    def __call__(self, layer: Layer, options: SplitOptions) -> tuple[torch.Tensor, MatrixReport]:
        """Divide one matrix; as `split_matrix`, up to rounding."""
        u = layer.update
        narrow = min(u.shape) <= WIDEST and options.method == "svd" and options.side == "tail"
        key = layer.name, layer.generator.initial_seed()
        found = self._kept.get(key)
        if found is None and not (narrow and 2 * u.nbytes <= self.budget):
            return split_matrix(layer, options)
        if found is None:
            found = self._kept[key] = leading_subspace(u, min(u.shape), layer.energy, layer.generator, 0.0)
            self.budget -= found.vectors.nbytes + found.coordinates.nbytes
        values = found.values
        keep = select(options.amount, SingularBasis(layer, values), values, (u.shape[0], u.shape[1]), layer.energy)
        rank = int(torch.as_tensor(keep).sum())
        if rank == min(u.shape):
            return u, MatrixReport(layer.energy, 1.0, 0.0, {"rank": rank})
        return keep_first(found, rank, layer)
