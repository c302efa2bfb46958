"""Directions in weight space to measure curvature along: all of it, the streams of a split, and subspaces of them.

For one matrix, (d_out, d_in), with U_s = W_g − W_r the skill and U_m = W_f − W_g the memory of the split, a stream's
subspace is spanned by the k² matrices u_i v_jᵀ of its k leading left and right singular vectors. They are orthonormal, so
the curvature restricted to them is C ↦ Uᵀ (∂ of the loss) V with U C Vᵀ the direction: k² numbers, whatever the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from liborth_cli.linalg.eigen import eigenvalues, leading_eigh
from liborth_cli.measure.thin import Bases
from liborth_cli.stream.labels import row_seed
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.weights import Weights


class Flat:
    """Coordinates of some parameters as one flat vector, at which products are taken.

    Attributes:
        size: coordinates of all parameters together, n.
    """

    def __init__(self, shapes: Iterable[tuple[str, Sequence[int]]]) -> None:
        """Lay the coordinates out one after the other; a name that comes again is the same parameter."""
        self._places, self.size = dict[str, tuple[int, Sequence[int]]](), 0
        for name, shape in shapes:
            if name not in self._places:
                self._places[name] = self.size, shape
                self.size += math.prod(shape)
        self.vector, self.result = torch.empty(0), torch.empty(0)

    def multiply(self, product: Callable[..., None], vector: torch.Tensor) -> torch.Tensor:
        """Return H v in these coordinates, (n,), from a function that multiplies directions."""
        self.vector, self.result = vector, torch.zeros_like(vector)
        product(self, self)
        return self.result

    def _view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        start, shape = self._places[name]
        return flat[start : start + math.prod(shape)].view(*shape)


class Whole(Flat):
    """All weights of a model as one flat vector; also takes products."""

    def __init__(self, model: BlockModel) -> None:
        """Lay the parameters out, every tied one once."""
        super().__init__((name, tensor.shape) for stage in model.stages for name, tensor in model.parameters(stage).items())
        self._model = model

    def tangents(self, stage: str) -> dict[str, torch.Tensor]:
        """Return views of the vector."""
        return {name: self._view(self.vector, name) for name in self._model.parameters(stage)}

    def collect(self, stage: str, product: dict[str, torch.Tensor]) -> None:
        """Add a part of the product."""
        for name, part in product.items():
            self._view(self.result, name).add_(part)


class Between:
    """The direction from one point to another, in the matrices inside the blocks; read when it is asked for."""

    def __init__(self, model: BlockModel, start: Weights, end: Weights) -> None:
        """Remember the two points."""
        self._model, self._start, self._end, self._names = model, start, end, matrices(model)
        self.square = 0.0

    def tangents(self, stage: str) -> dict[str, torch.Tensor]:
        """Return end − start."""
        return {name: self.update(name) for name, where in self._names.items() if where == stage}

    def update(self, name: str) -> torch.Tensor:
        """Return end − start of one parameter."""
        return self._model.read(name, self._end) - self._model.read(name, self._start)


class NoiseLike:
    """A random direction with the norms that another one has, matrix by matrix."""

    def __init__(self, model: BlockModel, norms: dict[str, torch.Tensor], seed: int) -> None:
        """Take the norms, (matrices,) for each parameter."""
        self._model, self._norms, self._seed, self._names = model, norms, seed, matrices(model)

    def tangents(self, stage: str) -> dict[str, torch.Tensor]:
        """Draw one stage's part; the seed and the parameter's name decide it."""
        found = {}
        for name, where in self._names.items():
            if where == stage and name in self._norms:
                like = self._model.parameters(stage)[name]
                generator = torch.Generator().manual_seed(row_seed(self._seed, name.encode()))
                noise = torch.randn(like.shape, generator=generator).to(like)
                noise = noise.view(-1, *like.shape[-2:])
                noise *= (self._norms[name].to(like) / torch.linalg.matrix_norm(noise))[:, None, None]
                found[name] = noise.view(like.shape)
        return found


class Subspace(Flat):
    """Directions U C Vᵀ of some matrices as one flat vector of cores; also takes products, if those are within its bases.

    Attributes:
        bases: parameter → U (matrices, d_out, k) and V (matrices, d_in, k), orthonormal columns.
    """

    def __init__(self, bases: Bases, names: dict[str, str]) -> None:
        """Lay the coordinates out.

        Args:
            bases: as the attribute.
            names: parameter → its stage.
        """
        super().__init__((name, (u.shape[0], u.shape[2], v.shape[2])) for name, (u, v) in bases.items())
        self.bases, self._names = bases, names

    def tangents(self, stage: str) -> dict[str, torch.Tensor]:
        """Return views of the vector: C of the stage's matrices."""
        return {name: self._view(self.vector, name) for name in self.bases if self._names[name] == stage}

    def collect(self, stage: str, product: dict[str, torch.Tensor]) -> None:
        """Add a part of the product."""
        for name, part in product.items():
            self._view(self.result, name).add_(part)


@dataclass(frozen=True)
class Decomposed:
    """The singular spectrum of one parameter's update.

    Attributes:
        values: all singular values of each matrix, descending, (matrices, min(d_out, d_in)), float64.
        left: leading left singular vectors, (matrices, d_out, k).
        right: leading right singular vectors, (matrices, d_in, k).
    """

    values: np.ndarray
    left: torch.Tensor
    right: torch.Tensor

    @property
    def norms(self) -> torch.Tensor:
        """Frobenius norm of each matrix, (matrices,)."""
        return torch.from_numpy(self.values).square().sum(1).sqrt()


def matrices(model: BlockModel) -> dict[str, str]:
    """Return the parameters that are matrices inside the blocks (or stacks of them), and the stage of each."""
    found = {}
    for stage, sites in model.planned_sites().items():
        known = model.parameters(stage)
        found |= {site.parameter: stage for site in sites if site.kind == "linear" and site.parameter in known}
    return found


def decompose(update: torch.Tensor, rank: int) -> Decomposed:
    """Take an update apart through the Gram matrix of its shorter side, in float64.

    Singular values below 1e-8 of the largest are lost in that, and count as 0.

    Args:
        update: (…, d_out, d_in), as it lies in memory.
        rank: leading pairs at most; fewer where a matrix has not so many.

    Returns:
        The spectrum.
    """
    values, lefts, rights = [], [], []
    for matrix in update.reshape(-1, *update.shape[-2:]):
        wide = matrix.double()
        tall = wide.shape[0] > wide.shape[1]
        short = wide.T if tall else wide
        gram = short @ short.T
        spectrum = eigenvalues(gram.clone()).clamp(min=0)
        spectrum[spectrum < 1e-16 * spectrum[0]] = 0.0
        values.append(spectrum.sqrt().cpu().numpy())
        count = min(rank, int((spectrum > 1e-12 * spectrum[0]).sum()))
        near = leading_eigh(gram, max(count, 1))[1][:, :count]
        far = torch.linalg.qr(short.T @ near)[0]
        lefts.append(far if tall else near)
        rights.append(near if tall else far)
    least = min(left.shape[1] for left in lefts)
    left, right = (torch.stack([side[:, :least] for side in sides]).to(update.dtype) for sides in (lefts, rights))
    return Decomposed(np.stack(values), left.to(update.device), right.to(update.device))


def random_bases(like: dict[str, Decomposed], seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Draw orthonormal bases of the same shapes; the seed and the parameter's name decide them."""
    found = {}
    for name, parts in like.items():
        generator = torch.Generator().manual_seed(row_seed(seed, name.encode()))
        sides = [
            torch.linalg.qr(torch.randn(side.shape, generator=generator, dtype=torch.float64))[0].to(side)
            for side in (parts.left, parts.right)
        ]
        found[name] = sides[0], sides[1]
    return found
