"""Divide matrices many times over, with their decompositions computed once: between candidates only filters change."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from liborth_cli.linalg.truncated import LeadingSubspace, energy
from liborth_cli.methods import METHODS, Amount, Layer
from liborth_cli.methods.selection import Basis
from liborth_cli.methods.svd import SingularBasis
from liborth_cli.split.matrix import MatrixReport, SplitOptions, divide, split_matrix

Key = tuple[str, int]
"""A matrix: its name, and the seed that belongs to it alone."""


@dataclass
class Remembered:
    """Divides like `split_matrix`, and keeps bases and scores in memory as far as the budget goes; the others are recomputed.

    Attributes:
        budget: bytes that may be kept.
        rank: the largest rank that will be asked of `svd`.
        shares: what the last candidate did to each matrix.
        match: energy to keep of each matrix, for a random edit of the same size; None leaves it to the amount.
    """

    budget: int
    rank: int = 1
    shares: dict[Key, MatrixReport] = field(default_factory=dict)
    match: dict[Key, float] | None = None
    _kept: dict[Key, tuple[Basis, torch.Tensor]] = field(default_factory=dict)
    _subspaces: dict[Key, LeadingSubspace] = field(default_factory=dict)
    _spent: int = 0

    def __call__(self, layer: Layer, options: SplitOptions) -> tuple[torch.Tensor, MatrixReport]:
        """Divide one matrix; see `split_matrix`."""
        key = (layer.name, layer.generator.initial_seed())
        if self.match is not None:
            part = Amount("energy", self.match.get(key, 1.0))
            skill, report = split_matrix(layer, replace(options, method="random", amount=part, memory_side="tail"))
        elif options.method == "svd" and options.amount.kind == "rank" and options.side == "tail":
            skill, report = self._truncate(key, layer, options)
        elif key in self._kept:
            skill, report = divide(*self._kept[key], layer, options)
        elif "retain" in METHODS[options.method].needs:
            method = options.rule
            basis = method.basis(layer, options.amount)
            scores = method.score(basis, layer)
            self._keep(key, basis, scores)
            skill, report = divide(basis, scores, layer, options)
        else:
            # These have no basis to speak of: the elements themselves.
            skill, report = split_matrix(layer, options)
        self.shares[key] = report
        return skill, report

    @property
    def removed(self) -> float:
        """The share of the update's energy that the last candidate's memory part holds."""
        whole = sum(report.energy for report in self.shares.values())
        return sum(report.energy * report.memory for report in self.shares.values()) / whole if whole else 0.0

    def _keep(self, key: Key, basis: Basis, scores: torch.Tensor) -> None:
        cost = scores.nbytes + sum(tensor.nbytes for tensor in _tensors(basis))
        if self._spent + cost <= self.budget:
            self._kept[key] = (basis, scores)
            self._spent += cost

    def _truncate(self, key: Key, layer: Layer, options: SplitOptions) -> tuple[torch.Tensor, MatrixReport]:
        """Keep a leading run of the directions found for the largest rank."""
        rank, most = int(options.amount.value or 0), min(self.rank, min(layer.update.shape) - 1)
        if rank > most or most < 1:
            return split_matrix(layer, options)
        if key not in self._subspaces:
            basis = METHODS["svd"].basis(layer, Amount("rank", most))
            assert isinstance(basis, SingularBasis)
            assert basis.subspace is not None
            cost = basis.subspace.vectors.nbytes + basis.subspace.coordinates.nbytes
            found = basis.subspace
            if self._spent + cost <= self.budget:
                self._subspaces[key], self._spent = found, self._spent + cost
        else:
            found = self._subspaces[key]
        wide = layer.update.shape[0] <= layer.update.shape[1]
        coordinates = found.coordinates[:rank] if wide else found.coordinates[:, :rank]
        part = LeadingSubspace(found.vectors[:, :rank], coordinates, energy(coordinates), found.excess, found.route)
        skill = part.rebuild(layer.update)
        share = part.captured / layer.energy
        return skill, MatrixReport(layer.energy, share, max(1 - share, 0.0), {"rank": rank})


def _tensors(value: Any) -> list[torch.Tensor]:
    """List the tensors an object holds, in its own attributes and theirs."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in vars(value).values() for t in _tensors(part)] if hasattr(value, "__dict__") else []
