"""WIN-U: one Newton step to the model without the forget rows, by the Woodbury identity on their Gauss-Newton matrix.

arXiv 2604.13438. At a minimum of the loss of all rows, the minimum without the forget rows lies, to second order, at
ρ·(H − ρ·F)⁻¹·D, with H the curvature of all rows, F = Σ_t j_t j_tᵀ the Gauss-Newton matrix of the forget tokens and D
their gradient. With H⁻¹ cheap, Woodbury needs only the tokens' kernel K = JᵀH⁻¹J: (H − ρF)⁻¹J = H⁻¹J·(1 − ρK)⁻¹.

Known to us from its abstract, so chosen here: H is the damped K-FAC matrix of the retain rows, one block a matrix;
j_t = g_t·a_tᵀ at every position of the forget rows, for the losses of the real completions, so that D = Σ j_t; the
dose is ρ in units of the one at which the step becomes infinite, 1 / the largest eigenvalue of K: a memorised row
weighs next to nothing at ρ = 1. At most `MOST` positions, from all over.
"""

from __future__ import annotations

import torch

from benchmarks.rivals.factors import Tokens, apply, retain_factors, solve, tokens_of
from benchmarks.surgery.job import Job, Rival

MOST = 4096


def run(job: Job) -> None:
    """Take the step for ρ = `job.dose` / the largest eigenvalue of the kernel."""
    factors, parts = retain_factors(job.model, job.retain, job.seed), dict[str, list[Tokens]]()
    every = max(1, -(-sum(len(row.ids) for row in job.forget) // MOST))
    for batch in tokens_of(job.model, job.forget):
        for name, one in batch.items():
            parts.setdefault(name, []).append(Tokens(one.inputs[::every], one.gradients[::every]))
    kernel, left = None, dict[str, tuple[torch.Tensor, torch.Tensor]]()
    for name, some in parts.items():
        a, g = (torch.cat([getattr(one, side) for one in some]).double() for side in ("inputs", "gradients"))
        spared = solve(factors[name].inputs, a.T), solve(factors[name].gradients, g.T)
        left[name] = spared
        here = (a @ spared[0]) * (g @ spared[1])
        kernel = here if kernel is None else kernel + here
    assert kernel is not None
    values, vectors = torch.linalg.eigh(kernel)
    relative = job.dose / values[-1].clamp(min=1e-300)
    weights = vectors @ ((vectors.T @ torch.ones_like(values)) * relative / (1 - relative * values.clamp(min=0)))
    apply(job.model, {name: (g * weights) @ a.T for name, (a, g) in left.items()})


RIVAL = Rival("WIN-U", "2604.13438", (0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9), run)
