"""SimNPO: negative preference optimisation without a reference model, by the mean loss of a row.

Fan et al. 2024, arXiv 2410.07163: minimise −(2/β) log σ(−(β/|y|) log π(y|x) − γ) on the forget rows. β = 4.5, γ = 0
and a weight of 0.125 beside the retain loss, as its authors set them for TOFU's forget10.

Chosen here: 60 steps; the dose is the learning rate.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from benchmarks.rivals.training import batches, device_of, mean_loss, row_losses, train, whole
from benchmarks.surgery.job import Job, Rival

BETA, GAMMA, WEIGHT, STEPS = 4.5, 0.0, 0.125, 60


def run(job: Job) -> None:
    """Train at the learning rate `job.dose`."""
    device = device_of(job.model)
    forget, retain = batches(job.forget, device, job.seed), batches(whole(job.retain), device, job.seed + 1)

    def loss() -> torch.Tensor:
        losses, tokens = row_losses(job.model, next(forget))
        pushed = -(2 / BETA) * functional.logsigmoid(BETA * losses / tokens - GAMMA).mean()
        return WEIGHT * pushed + mean_loss(job.model, next(retain))

    train(job.model, job.dose, STEPS, loss)


RIVAL = Rival("SimNPO", "2410.07163", (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4), run)
