"""The kernel of all forget tokens over all layers, in the metric of the retain data, from one streamed walk; and a step by it.

A token t changes matrix l by the rank-one g_t a_tᵀ. With G_l = M Mᵀ and A_l = L Lᵀ the damped retain factors of the matrix,
g̃ = M⁻¹g and ã = L⁻¹a,

    K_st = Σ_l (g̃_s·g̃_t)(ã_s·ã_t)                  how moving for token s moves the loss of token t
    D_l = M⁻ᵀ(Σ_t α_t g̃_t ã_tᵀ)L⁻¹                 the move that costs the retain data least for what it does to the tokens

D changes the losses by Kα to first order and costs ½αᵀKα nats a retain token in K-FAC's metric (arXiv 1503.05671). So a step
towards residuals r is α = (K + μI)⁻¹r: Gauss–Newton among tokens, as WIN-U's Woodbury step (arXiv 2604.13438), iterated as
K-FADE's uphill steps are (arXiv 2602.10568). K adds up over layers in one backward walk with one block of weights in memory;
what the step needs of every token and matrix waits in private scratch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from liborth_cli.curvature.collect import Chosen, FactorCollector
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.factors import TOKEN_GRADIENTS, TOKEN_INPUTS
from liborth_cli.curvature.plan import CurvatureOptions
from liborth_cli.curvature.selection import Target
from liborth_cli.machine import spare_bytes
from liborth_cli.methods.memo import Memo
from liborth_cli.methods.whitening import Whitening, mean_scale, unit
from liborth_cli.recall.moves import Moves, dot, room
from liborth_cli.stream.batches import Batch, batches
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.relay import Relay, Turns
from liborth_cli.stream.sizes import batch_tokens
from liborth_cli.stream.store import Store, open_store
from liborth_cli.stream.texts import Row
from liborth_cli.stream.walk import walk_streamed

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

    def inputs(self, name: str, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return L⁻¹aᵀ and A⁻¹aᵀ, (d_in, tokens), float64, of a matrix's inputs a (tokens, d_in)."""
        return self._both("input", self.factors.layers[name].input, name, a)

    def gradients(self, name: str, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return M⁻¹gᵀ and G⁻¹gᵀ, (d_out, tokens), float64, of its output gradients g (tokens, d_out)."""
        return self._both("gradient", name, name, g)

    def _both(self, side: str, key: str, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def make() -> tuple[Whitening, float]:
            found = self.factors.layer(name)
            covariance = found.input_covariance if side == "input" else found.gradient_covariance
            return Whitening.of_unit(unit(covariance).to(self.device), self.damping, name), mean_scale(covariance)

        lower, scale = self.memo.get((side, key), make, lambda made: made[0].lower.nbytes)
        white = lower.whiten(x.to(self.device).double().T)
        return white * scale**0.5, lower.unwhiten(white) * scale


@dataclass
class Slope:
    """The mean gradient R of the loss of some retain rows, and the natural one.

    Attributes:
        gradient: R.
        natural: N = G⁻¹RA⁻¹.
    """

    gradient: Moves
    natural: Moves


@dataclass
class Felt:
    """What some tokens feel of some matrices, at one point.

    Attributes:
        kernel: K, (tokens, tokens), float64.
        inputs: matrix → A⁻¹a of its tokens, (d_in, tokens), float32; shared by matrices with the same input.
        gradients: matrix → G⁻¹g, (d_out, tokens), float32.
        targets: matrix → which stored tensor it belongs to.
    """

    kernel: torch.Tensor
    inputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    targets: dict[str, Target]

    def solve(self, residuals: torch.Tensor, ridge: float, slopes: Sequence[Slope] = ()) -> tuple[torch.Tensor, torch.Tensor]:
        """Return α = (K − C S⁻¹Cᵀ + μ·tr K/T·I)⁻¹ r, (tokens,), and θ = S⁻¹Cᵀα, (slopes,), where S_ij = ⟨R_i, N_j⟩.

        Args:
            residuals: r, (tokens,): by how much each token's loss should rise.
            ridge: μ.
            slopes: along which the step must not go.
        """
        damped = self.kernel.clone()
        damped.diagonal().add_(ridge * float(self.kernel.trace()) / len(damped))
        if not slopes:
            return _solved(damped, residuals), damped.new_zeros(0)
        climbs = torch.stack([self._along(slope.gradient) for slope in slopes], 1)
        square = damped.new_tensor([[dot(one.gradient, other.natural) for other in slopes] for one in slopes])
        square.diagonal().mul_(1 + ALIKE)
        share = torch.linalg.solve(square, climbs.T)
        alpha = _solved(damped - climbs @ share, residuals)
        return alpha, share @ alpha

    def _along(self, gradient: Moves) -> torch.Tensor:
        """Return c_t = ⟨R, the step of token t alone⟩, (tokens,), float64."""
        total = torch.zeros(len(self.kernel), dtype=torch.float64, device=self.kernel.device)
        for name, target in self.targets.items():
            r = gradient.of(target).to(self.inputs[name])
            total += ((r.T @ self.gradients[name]) * self.inputs[name]).sum(0)
        return total

    def cost(self, alpha: torch.Tensor) -> float:
        """Return what K-FAC predicts a step to cost, ½αᵀKα, in nats a retain token."""
        return 0.5 * float(alpha @ self.kernel @ alpha)

    def fill(self, step: Moves, alpha: torch.Tensor, theta: Sequence[float] = (), slopes: Sequence[Slope] = ()) -> None:
        """Write the step of these coefficients (tokens,) over what `step` held, less ΣθN; one matrix at a time."""
        step.flat.zero_()
        for share, slope in zip(theta, slopes, strict=True):
            step.flat.add_(slope.natural.flat, alpha=-float(share))
        for name, target in self.targets.items():
            gradients = self.gradients[name] * alpha.to(self.gradients[name])
            update = gradients @ self.inputs[name].T
            place = step.of(target)
            place.add_(update.to(place.device))


def _solved(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_solve(vector.to(matrix)[:, None], torch.linalg.cholesky(matrix))[:, 0]


class KernelWalk:
    """Walks rows through a model and learns what their tokens feel.

    Attributes:
        chosen: stage → sites and their matrices.
        targets: the matrices by name.
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
        self.targets = {t.name: t for sites in chosen.values() for _, targets in sites for t in targets}
        self._stages = {t.name: stage for stage, sites in chosen.items() for _, targets in sites for t in targets}

    def walk(self, rows: Sequence[Row]) -> Felt:
        """Return what the loss-carrying tokens of some rows feel.

        Args:
            rows: longest first, each counting once, so that tokens come in the order of the rows.
        """
        keep = torch.from_numpy(np.concatenate([row.keep for row in rows]))
        count = int(keep.sum())
        found = Felt(torch.zeros(count, count, dtype=torch.float64, device=self._model.device), {}, {}, {})
        self._walk(rows, lambda sums, owner, names: self._add(found, sums, keep, owner, names))
        return found

    def climb(self, rows: Sequence[Row], slope: Slope, memory: float = 0.0) -> None:
        """Measure the slope of some retain rows' loss.

        Args:
            rows: as for `walk`.
            slope: to be filled.
            memory: share of what it held that stays in the mean.
        """
        share = (1 - memory) / sum(int(row.keep.sum()) for row in rows)
        slope.gradient.flat.mul_(memory)
        slope.natural.flat.mul_(memory)

        def add(sums: dict[str, torch.Tensor], owner: str, names: Sequence[str]) -> None:
            a = sums[TOKEN_INPUTS + owner]
            for name in names:
                g = sums[TOKEN_GRADIENTS + name]
                r = g.T @ a * share
                # Rows of R go through A⁻¹, its columns then through G⁻¹: as many as the matrix has, not as there are tokens.
                n = self._metric.gradients(name, self._metric.inputs(names[0], r)[1])[1].to(g)
                slope.gradient.of(self.targets[name]).add_(r)
                slope.natural.of(self.targets[name]).add_(n)

        self._walk(rows, add)

    def _walk(self, rows: Sequence[Row], add: Callable[[dict[str, torch.Tensor], str, Sequence[str]], None]) -> None:
        """Walk, and hand over the sums of the matrices that share an input, those that see every token."""
        tokens = sum(row.tokens for row in rows)
        collector = FactorCollector(self.chosen, self._model.device, CurvatureOptions(per_token=True))

        def take(stage: str) -> None:
            sums = collector.take(stage)
            alike = defaultdict[str, list[str]](list)
            for name in (name for name, where in self._stages.items() if where == stage):
                if TOKEN_GRADIENTS + name in sums and len(sums[TOKEN_GRADIENTS + name]) == tokens:
                    alike[collector.shared[name]].append(name)
            for owner, names in alike.items():
                add(sums, owner, names)

        some = batches(rows, batch_tokens(self._model.device), None, self._model.device)
        walk_streamed(self._model, some, collector, Relay(self._store(some), Turns(len(self._model.blocks))), take)

    def _add(self, found: Felt, sums: dict[str, torch.Tensor], keep: torch.Tensor, owner: str, names: Sequence[str]) -> None:
        """Add the matrices that share one input."""
        white, plain = self._metric.inputs(names[0], sums[TOKEN_INPUTS + owner][keep])
        kept, gram = self._put(plain), torch.zeros_like(found.kernel)
        for name in names:
            g, outputs = self._metric.gradients(name, sums[TOKEN_GRADIENTS + name][keep])
            gram.addmm_(g.T, g)
            found.inputs[name], found.gradients[name], found.targets[name] = kept, self._put(outputs), self.targets[name]
        found.kernel.addcmul_(white.T @ white, gram)

    def _put(self, value: torch.Tensor) -> torch.Tensor:
        if value.device.type != "cpu":
            return value.float()
        place = room(value.numel(), self._folder).view(value.shape)
        return place.copy_(value)

    def _store(self, some: Sequence[Batch]) -> Store:
        levels, each = len(self._model.blocks) + 1, [4 * batch.tokens * self._model.hidden for batch in some]
        fits = sum(each) * levels < spare_bytes() // 4
        return open_store(None if fits else self._folder, each, levels)
