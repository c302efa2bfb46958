"""RepSelect, after CIR: one forget gradient without what it shares with everything else.

arXiv 2606.17168 and 2509.11816 ("Collapse of Irrelevant Representations"). Of every matrix the forget gradient is a
sum of products g·aᵀ. On both sides the leading directions of the forget data, which are what all text has in common,
are shrunk, and the rest is whitened by the retain covariances: D' = S_G·(Σ g·aᵀ)·S_A with S_A = A_r⁻¹·P_A, and P_A =
Σ q qᵀ / (1 + λ/λ̄) over the eigenvectors of the forget inputs' covariance; likewise S_G. The hard variant projects
out the leading retain directions on both sides in place of whitening, a quarter of the width (1,024 of 4,096 did best
in the paper).

Known to us from abstracts and reports, so chosen here: the loss is the cross-entropy of the completions; one step;
all linear layers; the dose is ‖ΔW‖ / ‖W‖ over all edited matrices together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.rivals.factors import Tokens, apply, linear_layers, retain_factors, solve, sums, tokens_of
from benchmarks.surgery.job import Job, Rival

CUT = 0.25


def soft(job: Job) -> None:
    """Take one step of relative length `job.dose`, whitened by the retain covariances."""
    _step(job, solve)


def hard(job: Job) -> None:
    """Take one step of relative length `job.dose`, without the leading retain directions."""
    _step(job, _without_leading)


def _step(job: Job, spare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    factors, gradients = retain_factors(job.model, job.retain, job.seed), dict[str, torch.Tensor]()

    def watched() -> Iterator[dict[str, Tokens]]:
        for batch in tokens_of(job.model, job.forget):
            for name, one in batch.items():
                gradients[name] = gradients.get(name, 0.0) + (one.gradients.T @ one.inputs).double()
            yield batch

    steps = {}
    for name, forget in sums(watched()).items():
        shrunk = _shrunk(forget.gradients, gradients[name])
        shrunk = _shrunk(forget.inputs, shrunk.T).T
        spared = spare(factors[name].gradients, shrunk)
        steps[name] = spare(factors[name].inputs, spared.T).T
    length = sum(float(d.square().sum()) for d in steps.values()) ** 0.5
    layers = linear_layers(job.model)
    weights = sum(float(layers[name].weight.detach().double().square().sum()) for name in steps) ** 0.5
    apply(job.model, steps, job.dose * weights / max(length, 1e-300))


def _shrunk(covariance: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Shrink each eigendirection of a covariance by 1 / (1 + λ / mean λ)."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = 1 / (1 + values.clamp(min=0) / values.mean().clamp(min=1e-300))
    return vectors @ (kept[:, None] * (vectors.T @ columns))


def _without_leading(covariance: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Project the leading `CUT` of the eigendirections out."""
    _, vectors = torch.linalg.eigh(covariance)
    leading = vectors[:, len(vectors) - round(CUT * len(vectors)) :]
    return columns - leading @ (leading.T @ columns)


DOSES = (1e-3, 4e-3, 1e-2, 3e-2, 6e-2, 0.12, 0.25)
RIVAL = Rival("RepSelect", "2606.17168", DOSES, soft)
HARD = Rival("RepSelect, hard cut", "2606.17168", DOSES, hard)
