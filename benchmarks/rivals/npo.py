"""Negative preference optimisation with a retain loss (NPO-RT).

Zhang, Lin, Bai and Mei 2024, arXiv 2404.05868, equation 3: with π₀ the model as it was, minimise −(2/β) log σ(−β
log(π(y|x) / π₀(y|x))) on the forget rows, whose gradient fades as a row becomes unlikely, and the loss of retain rows
beside it. β = 0.1 as in the paper; log π of a row is the sum over its completion.

Chosen here: weight 1 for both losses, 60 steps; the dose is the learning rate.
"""

from __future__ import annotations

import copy

import torch
from torch.nn import functional

from benchmarks.rivals.training import batches, device_of, mean_loss, row_losses, train, whole
from benchmarks.surgery.job import Job, Rival

BETA, STEPS = 0.1, 60


def run(job: Job) -> None:
    """Train at the learning rate `job.dose`."""
    device, before = device_of(job.model), copy.deepcopy(job.model)
    forget, retain = batches(job.forget, device, job.seed), batches(whole(job.retain), device, job.seed + 1)

    def loss() -> torch.Tensor:
        batch = next(forget)
        with torch.no_grad():
            old, _ = row_losses(before, batch)
        new, _ = row_losses(job.model, batch)
        return -(2 / BETA) * functional.logsigmoid(BETA * (new - old)).mean() + mean_loss(job.model, next(retain))

    train(job.model, job.dose, STEPS, loss)


RIVAL = Rival("NPO", "2404.05868", (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4), run)
