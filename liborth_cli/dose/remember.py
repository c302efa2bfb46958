"""Matrices that are divided many times over: each is decomposed once, and what another amount needs of it is kept.

Between the doses of a sweep only filters change. In a walk that measures factors block by block (curvature/together.py) what is
kept of a matrix is made while its factors are in memory, and then they go: no factor is stored for a search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from liborth_cli.console import Console, size
from liborth_cli.curvature.layer import DiagonalFisher
from liborth_cli.curvature.together import Together
from liborth_cli.linalg.truncated import LeadingSubspace
from liborth_cli.machine import Run
from liborth_cli.measure.unwritten import Division
from liborth_cli.methods import METHODS, Amount, Layer
from liborth_cli.methods.selection import Basis, Thinning
from liborth_cli.methods.svd import SingularBasis
from liborth_cli.split import SplitOptions, Splitter
from liborth_cli.split.divide import Divider, Job
from liborth_cli.split.matrix import MatrixReport, divide, keep_first, split_matrix

Key = tuple[str, int]
"""A matrix: its name, and the seed that belongs to it alone."""


@dataclass
class Recorded:
    """A division that notes what it did to every matrix.

    Attributes:
        division: the division.
        shares: energy of each matrix's update, and the share of it in the memory part.
    """

    division: Division
    shares: dict[Key, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, layer: Layer, options: SplitOptions) -> tuple[torch.Tensor, MatrixReport]:
        """Divide one matrix."""
        key = key_of(layer)
        skill, report = self.division(layer, options)
        self.shares[key] = (report.energy, report.memory)
        return skill, report

    @property
    def removed(self) -> float:
        """The share of the update's energy in the memory part, over all matrices."""
        whole = sum(energy for energy, _ in self.shares.values())
        return sum(energy * memory for energy, memory in self.shares.values()) / whole if whole else 0.0


@dataclass
class Remembered:
    """Divides like `split_matrix`, and keeps bases and scores in memory as far as the budget goes; the others are recomputed.

    Attributes:
        budget: bytes that may be kept.
        rank: the largest rank that will be asked of `svd`.
    """

    budget: int
    rank: int = 1
    _kept: dict[Key, tuple[Basis, torch.Tensor]] = field(default_factory=dict)
    _diagonals: dict[Key, DiagonalFisher] = field(default_factory=dict)
    _subspaces: dict[Key, LeadingSubspace] = field(default_factory=dict)
    _spent: int = 0

    def __call__(self, layer: Layer, options: SplitOptions) -> tuple[torch.Tensor, MatrixReport]:
        """Divide one matrix; see `split_matrix`."""
        key = key_of(layer)
        if options.method == "svd" and options.amount.kind == "rank" and options.side == "tail":
            return self._truncate(key, layer, options)
        if key in self._kept:
            return divide(*self._kept[key], layer, options)
        if "retain" not in METHODS[options.method].needs:
            # These have no basis to speak of: the elements themselves.
            layer.diagonal = self._diagonals.get(key, layer.diagonal)
            return split_matrix(layer, options)
        basis, scores = _decomposed(layer, options)
        kept = _thin(basis)
        if self._room(scores, *_tensors(kept)):
            self._kept[key] = (kept, scores)
        return divide(basis, scores, layer, options)

    def learn(self, layer: Layer, options: SplitOptions) -> tuple[torch.Tensor, MatrixReport]:
        """Keep what any amount needs of one matrix, whatever the budget; its update comes back whole."""
        key = key_of(layer)
        if "retain" in METHODS[options.method].needs:
            basis, scores = _decomposed(layer, options)
            self._kept[key] = (_thin(basis), scores)
        elif layer.diagonal is not None:
            self._diagonals[key] = layer.diagonal
        return layer.update, MatrixReport(layer.energy, 1.0, 0.0, {})

    @property
    def nbytes(self) -> int:
        """Bytes that are kept; what several matrices share counts once."""
        every = {id(t): t.nbytes for part in (self._kept, self._diagonals) for one in part.values() for t in _tensors(one)}
        return sum(every.values())

    def _room(self, *tensors: torch.Tensor) -> bool:
        """Take room for some tensors, where there is any left."""
        cost = sum(tensor.nbytes for tensor in tensors)
        fits = self._spent + cost <= self.budget
        self._spent += cost if fits else 0
        return fits

    def _truncate(self, key: Key, layer: Layer, options: SplitOptions) -> tuple[torch.Tensor, MatrixReport]:
        """Keep a leading run of the directions found for the largest rank."""
        rank, most = int(options.amount.value or 0), min(self.rank, min(layer.update.shape) - 1)
        if rank > most or most < 1:
            return split_matrix(layer, options)
        found = self._subspaces.get(key)
        if found is None:
            basis = METHODS["svd"].basis(layer, Amount("rank", most))
            assert isinstance(basis, SingularBasis)
            assert basis.subspace is not None
            found = basis.subspace
            if self._room(found.vectors, found.coordinates):
                self._subspaces[key] = found
        return keep_first(found, rank, layer)


@dataclass(frozen=True)
class Lesson:
    """What is to be remembered of a split while its factors are there.

    Attributes:
        plan: the split.
        remembered: where it is kept.
    """

    plan: Splitter
    remembered: Remembered

    def layers(self) -> dict[str, set[str]]:
        """Return tensor → the layers whose factors its matrices are divided by."""
        factors = self.plan.factors
        return {
            item.tensor.name: {layer for number in range(item.grid[0]) for layer in factors.layers_of(item.twin, number)}
            for item in self.plan.split_items
        }

    def nbytes(self, tokens: int) -> int:
        """Return the bytes that will be kept, at most; `tokens` counts those of the forget data."""
        method, amount, total = self.plan.options.rule, self.plan.options.amount, 0
        for item in self.plan.split_items:
            matrices, rows, cols = item.grid
            full = self.plan.factors.widths(item.twin) or [rows]  # a bias has its matrix's curvature
            total += matrices * method.dose_bytes((rows, cols), full, math.inf if amount.hard else tokens)
        return total

    def learn(self, names: Sequence[str], device: torch.device) -> None:
        """Decompose some tensors whose factors are in memory."""
        plan, keep = self.plan, self.remembered.learn
        divider = Divider(plan.reference, plan.finetuned, plan.options, plan.factors, device, divide=keep, trial=True)
        for item in (plan.items[name] for name in names if name in plan.items):
            for number in range(item.grid[0]):
                divider.skill(Job(item, number))


def learn(lessons: Sequence[Lesson], together: Together, run: Run, console: Console) -> None:
    """Walk, and keep what every lesson needs of each block's matrices; after that no factor is read any more."""
    needed: dict[str, set[str]] = {}
    for lesson in lessons:
        for name, layers in lesson.layers().items():
            needed.setdefault(name, set()).update(layers)
    run.all_threads()
    with console.progress("curvature", together.tokens, unit="tokens", per=together.steps) as progress:
        for names in together.ready(needed, progress.advance):
            for lesson in lessons:
                lesson.learn(names, run.device)
    together.drop(())
    console.detail(f"{size(sum(lesson.remembered.nbytes for lesson in lessons))} of decompositions are kept")


def key_of(layer: Layer) -> Key:
    """Name a matrix."""
    return layer.name, layer.generator.initial_seed()


def _decomposed(layer: Layer, options: SplitOptions) -> tuple[Basis, torch.Tensor]:
    basis = options.rule.basis(layer, options.amount)
    return basis, options.rule.score(basis, layer)


def _thin(basis: Basis) -> Basis:
    return basis.thinned() if isinstance(basis, Thinning) else basis


def _tensors(value: Any) -> list[torch.Tensor]:
    """List the tensors an object holds, in its own attributes and theirs."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [t for part in value for t in _tensors(part)]
    return [t for part in vars(value).values() for t in _tensors(part)] if hasattr(value, "__dict__") else []
