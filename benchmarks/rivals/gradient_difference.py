"""Gradient difference: up on the forget loss, down on the retain loss.

Liu, Liu and Stone 2022, "Continual Learning and Private Unlearning", as TOFU has it (Maini et al. 2024, arXiv
2401.06121): minimise retain loss − forget loss, one batch of each a step.

Chosen here: 30 steps; the dose is the learning rate; the forget loss counts on completions, the retain loss on whole
rows.
"""

from __future__ import annotations

from benchmarks.rivals.training import batches, device_of, mean_loss, train, whole
from benchmarks.surgery.job import Job, Rival

STEPS = 30


def run(job: Job) -> None:
    """Train at the learning rate `job.dose`."""
    device = device_of(job.model)
    forget, retain = batches(job.forget, device, job.seed), batches(whole(job.retain), device, job.seed + 1)
    train(job.model, job.dose, STEPS, lambda: mean_loss(job.model, next(retain)) - mean_loss(job.model, next(forget)))


RIVAL = Rival("gradient difference", "2401.06121", (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4), run)
