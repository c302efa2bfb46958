"""The kernel of all forget tokens over all layers, in the metric of the retain data, from one streamed walk; and a step by it.

A token t changes matrix l by the rank-one g_t a_tᵀ. With G_l = M Mᵀ and A_l = L Lᵀ the damped retain factors of the matrix,
g̃ = M⁻¹g and ã = L⁻¹a,

    K_st = Σ_l (g̃_s·g̃_t)(ã_s·ã_t)                  how moving for token s moves the loss of token t
    D_l = M⁻ᵀ(Σ_t α_t g̃_t ã_tᵀ)L⁻¹                 the move that costs the retain data least for what it does to the tokens

D changes the losses by Kα to first order and costs ½αᵀKα nats a retain token in K-FAC's metric (arXiv 1503.05671). So a step
towards residuals r is α = (K + μI)⁻¹r: Gauss–Newton among tokens, as WIN-U's Woodbury step (arXiv 2604.13438), iterated as
K-FADE's uphill steps are (arXiv 2602.10568). Everything is held whitened, where the metric is the identity: tokens as g̃ and ã,
a gradient R of retain rows as R̃ = M⁻¹RL⁻ᵀ, so that ⟨R, D⟩ = Σ_t α_t g̃_tᵀR̃ã_t. Only a step is turned back. K adds up in one
backward walk with one block of weights in memory; what the step needs of every token and matrix waits in private scratch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from liborth_kernels.covariance import add_covariance, symmetric

from liborth_cli.curvature.collect import Chosen, FactorCollector
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.factors import TOKEN_GRADIENTS, TOKEN_INPUTS
from liborth_cli.curvature.layer import Covariance
from liborth_cli.curvature.plan import CurvatureOptions
from liborth_cli.curvature.selection import Factored
from liborth_cli.machine import spare_bytes
from liborth_cli.methods.memo import Memo
from liborth_cli.methods.whitening import Whitening, mean_scale, unit
from liborth_cli.recall.moves import Moves, dot, room
from liborth_cli.stream.batches import Batch, batches, parts
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.relay import Relay, Turns
from liborth_cli.stream.sizes import batch_tokens
from liborth_cli.stream.store import Store, open_store
from liborth_cli.stream.tap import NarrowProducts
from liborth_cli.stream.texts import Row
from liborth_cli.stream.walk import walk_resident, walk_streamed
from liborth_cli.tune.options import Arithmetic

EXCESS = 1e-4
"""Factors are factorised in float32 where that is shown to stand for a metric as close as this (methods/whitening.py)."""
HELD_TOKENS = 512
"""What single tokens feel of all matrices is held for so many at a time, where all weights are in memory."""
ALIKE = 1e-6
"""Added to the Gram matrix of slopes, of its diagonal: two of them may be one."""


@dataclass
class Metric:
    """The damped retain factors of every matrix, factorised; the last ones stay in memory as far as there is room.

    Attributes:
        factors: of the retain data.
        damping: relative to the mean eigenvalue.
        device: where the solves are done.
        memo: what is kept.
    """

    factors: FactorSet
    damping: float
    device: torch.device
    memo: Memo = field(default_factory=lambda: Memo(spare_bytes() // 4))

    def inputs(self, name: str, a: torch.Tensor) -> torch.Tensor:
        """Return ãᵀ = L⁻¹aᵀ, (d_in, tokens), float32, of a matrix's inputs a (tokens, d_in)."""
        lower, scale = self._input(name)
        return lower.whiten(a.T.to(self.device)).mul_(scale).float()

    def gradients(self, name: str, g: torch.Tensor) -> torch.Tensor:
        """Return g̃ᵀ = M⁻¹gᵀ, (d_out, tokens), float32, of its output gradients g (tokens, d_out)."""
        lower, scale = self._gradient(name)
        return lower.whiten(g.T.to(self.device)).mul_(scale).float()

    def whiten(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Return R̃ = M⁻¹RL⁻ᵀ of a gradient R of a matrix, both (d_out, d_in), float32."""
        return self.gradients(name, self.inputs(name, gradient))

    def unwhiten(self, name: str, move: torch.Tensor) -> torch.Tensor:
        """Return D = M⁻ᵀD̃L⁻¹ of a whitened move D̃ of a matrix, both (d_out, d_in), float32."""
        (left, one), (right, other) = self._gradient(name), self._input(name)
        half = right.unwhiten(move.T.to(self.device)).mul_(other)
        return left.unwhiten(half.T).mul_(one).float()

    def _input(self, name: str) -> tuple[Whitening, float]:
        owner = self.factors.layers[name].input
        return self._factorised(("input", owner), name, lambda: self.factors.layer(name).input_covariance)

    def _gradient(self, name: str) -> tuple[Whitening, float]:
        return self._factorised(("gradient", name), name, lambda: self.factors.layer(name).gradient_covariance)

    def _factorised(self, key: tuple[str, str], name: str, read: Callable[[], Covariance]) -> tuple[Whitening, float]:
        """Return L of s·(a covariance) + damping·I, s its scale, and √s: √s·L⁻¹ whitens what the covariance is of."""

        def make() -> tuple[Whitening, float]:
            covariance = read()
            if self.device.type == "cpu" and isinstance(covariance, torch.Tensor):
                found = Whitening.of(covariance, self.damping, name, EXCESS)
            else:
                found = Whitening.of_unit(unit(covariance).to(self.device), self.damping, name)
            return found, mean_scale(covariance) ** 0.5

        return self.memo.get(key, make, lambda made: made[0].lower.nbytes)


@dataclass
class Felt:
    """What some tokens feel of some matrices, at one point.

    Attributes:
        kernel: K, (tokens, tokens), float64.
        inputs: matrix → ã of its tokens, (d_in, tokens), float32; shared by matrices with the same input.
        gradients: matrix → g̃, (d_out, tokens), float32.
        targets: matrix → which stored tensor it belongs to.
        metric: that they are whitened by.
    """

    kernel: torch.Tensor
    inputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    targets: dict[str, Factored]
    metric: Metric

    def solve(
        self, residuals: torch.Tensor, ridge: float, slopes: Sequence[Moves] = (), owed: Sequence[float] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return α = (K − C S⁻¹Cᵀ + μ·tr K/T·I)⁻¹(r + C S⁻¹d), (tokens,), and θ = S⁻¹(Cᵀα + d), (slopes,), S_ij = ⟨R̃_i, R̃_j⟩.

        Args:
            residuals: r, (tokens,): by how much each token's loss should rise.
            ridge: μ.
            slopes: whitened gradients of losses that must not rise.
            owed: d, (slopes,): by how much each of these losses should fall.
        """
        damped = self.kernel.clone()
        damped.diagonal().add_(ridge * float(self.kernel.trace()) / len(damped))
        if not slopes:
            return _solved(damped, residuals), damped.new_zeros(0)
        climbs = torch.stack([self._along(slope) for slope in slopes], 1)
        square = damped.new_tensor([[dot(one, other) for other in slopes] for one in slopes])
        square.diagonal().mul_(1 + ALIKE)
        share = torch.linalg.solve(square, climbs.T)
        back = torch.linalg.solve(square, damped.new_tensor(owed or [0.0] * len(slopes)))
        alpha = _solved(damped - climbs @ share, residuals.to(damped) + climbs @ back)
        return alpha, share @ alpha + back

    def _along(self, slope: Moves) -> torch.Tensor:
        """Return c_t = ⟨R, the step of token t alone⟩ = g̃_tᵀR̃ã_t, (tokens,), float64."""
        total = torch.zeros(len(self.kernel), dtype=torch.float64, device=self.kernel.device)
        for name, target in self.targets.items():
            r = slope.of(target).to(self.inputs[name])
            total += ((r.T @ self.gradients[name]) * self.inputs[name]).sum(0)
        return total

    def cost(self, alpha: torch.Tensor) -> float:
        """Return what K-FAC predicts a step to cost, ½αᵀKα, in nats a retain token."""
        return 0.5 * float(alpha @ self.kernel @ alpha)

    def fill(self, step: Moves, alpha: torch.Tensor, theta: Sequence[float] = (), slopes: Sequence[Moves] = ()) -> None:
        """Write the step of these coefficients, (tokens,), less that along ΣθR over what `step` held; one matrix at a time."""
        step.flat.zero_()
        for name, target in self.targets.items():
            white = (self.gradients[name] * alpha.to(self.gradients[name])) @ self.inputs[name].T
            for share, slope in zip(theta, slopes, strict=True):
                white.sub_(slope.of(target).to(white), alpha=float(share))
            place = step.of(target)
            place.copy_(self.metric.unwhiten(name, white).to(place.device))


def _solved(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_solve(vector.to(matrix)[:, None], torch.linalg.cholesky(matrix))[:, 0]


class KernelWalk:
    """Walks rows through a model and learns what their tokens feel.

    Attributes:
        chosen: stage → sites and their matrices.
        targets: the matrices by name.
        dtype: of products with weights in the walks to come, where all of these are in memory.
    """

    def __init__(self, model: BlockModel, chosen: Chosen, metric: Metric, folder: Path) -> None:
        """Prepare nothing yet.

        Args:
            model: that is walked through, resident or streamed, at whatever weights it has then.
            chosen: stage → sites and their matrices.
            metric: of the retain data.
            folder: private, for scratch.
        """
        self._model, self.chosen, self._metric, self._folder = model, chosen, metric, folder
        self.dtype = Arithmetic.FLOAT32
        self.targets = {t.name: t for sites in chosen.values() for _, targets in sites for t in targets}
        self._stages = {t.name: stage for stage, sites in chosen.items() for _, targets in sites for t in targets}

    def walk(self, rows: Sequence[Row]) -> Felt:
        """Return what the loss-carrying tokens of some rows feel.

        Args:
            rows: longest first, each counting once, so that tokens come in the order of the rows.
        """
        keep = torch.from_numpy(np.concatenate([row.keep for row in rows])).to(self._model.device)
        count, seen = int(keep.sum()), Counter[str]()
        inputs, gradients = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        alike = dict[str, list[str]]()

        def add(sums: dict[str, torch.Tensor], owner: str, names: Sequence[str]) -> None:
            a, first = sums[TOKEN_INPUTS + owner], seen[owner]
            here = keep[first : first + len(a)]
            begin = int(keep[:first].sum())
            place = slice(begin, begin + int(here.sum()))
            alike.setdefault(owner, list(names))
            self._put(inputs, owner, self._metric.inputs(names[0], a[here]), place, count)
            for name in names:
                self._put(gradients, name, self._metric.gradients(name, sums[TOKEN_GRADIENTS + name][here]), place, count)
            seen.update(dict.fromkeys({owner, *names}, len(a)))

        self._walk(rows, add)
        found = Felt(torch.zeros(count, count, dtype=torch.float64, device=keep.device), {}, {}, {}, self._metric)
        for owner, names in alike.items():
            both = inputs[owner].new_zeros(2, count, count)
            add_covariance(both[0], inputs[owner])
            for name in (name for name in names if seen[name] == len(keep)):
                add_covariance(both[1], gradients[name])
                found.inputs[name], found.gradients[name] = inputs[owner], gradients[name]
                found.targets[name] = self.targets[name]
            found.kernel.addcmul_(*both)
        symmetric(found.kernel)
        return found

    def climb(self, rows: Sequence[Row], slope: Moves, memory: float = 0.0) -> None:
        """Measure the slope of some retain rows' loss: its mean gradient, whitened.

        Args:
            rows: as for `walk`.
            slope: to be filled.
            memory: share of what it held that stays in the mean.
        """
        share, tokens = (1 - memory) / sum(int(row.keep.sum()) for row in rows), sum(row.tokens for row in rows)
        slope.flat.mul_(memory)
        gradients, seen = dict[str, torch.Tensor](), Counter[str]()

        def add(sums: dict[str, torch.Tensor], owner: str, names: Sequence[str]) -> None:
            a = sums[TOKEN_INPUTS + owner]
            for name in names:
                g = sums[TOKEN_GRADIENTS + name]
                gradients[name] = gradients[name].addmm_(g.T, a) if name in gradients else g.T @ a
                seen[name] += len(a)
                if seen[name] == tokens:
                    # Rows of R go through L⁻¹, its columns then through M⁻¹: as many as the matrix has, not as tokens.
                    place = slope.of(self.targets[name])
                    place.add_(self._metric.whiten(name, gradients.pop(name)).to(place.device), alpha=share)

        self._walk(rows, add)

    def _walk(self, rows: Sequence[Row], add: Callable[[dict[str, torch.Tensor], str, Sequence[str]], None]) -> None:
        """Walk, and hand over the sums of the matrices that share an input, those that see every token.

        One block at a time all tokens are handed over at once; with all weights in memory, where nothing has to be computed
        twice, some of them after others.
        """
        model = self._model
        collector = FactorCollector(self.chosen, model.device, CurvatureOptions(per_token=True))

        def take(stage: str, tokens: int) -> None:
            sums = collector.take(stage)
            alike = defaultdict[str, list[str]](list)
            for name in (name for name, where in self._stages.items() if where == stage):
                if TOKEN_GRADIENTS + name in sums and len(sums[TOKEN_GRADIENTS + name]) == tokens:
                    alike[collector.shared[name]].append(name)
            for owner, names in alike.items():
                add(sums, owner, names)

        some = batches(rows, batch_tokens(model.device), None, model.device)
        if not model.resident:
            relay = Relay(self._store(some), Turns(len(model.blocks)))
            walk_streamed(model, some, collector, relay, lambda stage: take(stage, sum(batch.tokens for batch in some)))
            return
        products = NarrowProducts(model.sites(None)) if self.dtype is Arithmetic.BFLOAT16 else nullcontext()
        for part in parts(some, HELD_TOKENS):
            with products:
                walk_resident(model, part, collector)
            for stage in reversed(model.stages):
                take(stage, sum(batch.tokens for batch in part))

    def _put(self, held: dict[str, torch.Tensor], name: str, value: torch.Tensor, place: slice, count: int) -> None:
        """Write columns (d, some) into what is held under a name, (d, count)."""
        if name not in held:
            size = len(value) * count
            held[name] = (room(size, self._folder) if value.device.type == "cpu" else value.new_empty(size)).view(-1, count)
        held[name][:, place] = value

    def _store(self, some: Sequence[Batch]) -> Store:
        levels, each = len(self._model.blocks) + 1, [4 * batch.tokens * self._model.hidden for batch in some]
        fits = sum(each) * levels < spare_bytes() // 4
        return open_store(None if fits else self._folder, each, levels)
