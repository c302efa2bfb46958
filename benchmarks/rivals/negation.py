"""Task-vector negation: learn the forget rows once more, and take what that changed away, times the dose.

Ilharco et al. 2023, "Editing Models with Task Arithmetic", arXiv 2212.04089, section 3.1: θ − λ·(θ_forget − θ_start),
with θ_forget fine-tuned on the forget rows alone from θ_start.

Chosen here: θ_start is the reference where there is one, as in the paper, and the model itself otherwise; 60 steps at
1e-4.
"""

from __future__ import annotations

import copy

import torch

from benchmarks.rivals.training import batches, device_of, mean_loss, train
from benchmarks.surgery.job import Job, Rival

STEPS, RATE = 60, 1e-4


def run(job: Job) -> None:
    """Subtract `job.dose` times the task vector of the forget rows."""
    start = job.model if job.reference is None else job.reference
    learnt = copy.deepcopy(start)
    rows = batches(job.forget, device_of(learnt), job.seed)
    train(learnt, RATE, STEPS, lambda: mean_loss(learnt, next(rows)))
    with torch.no_grad():
        triples = zip(job.model.parameters(), learnt.parameters(), start.parameters(), strict=True)
        for value, after, before in triples:
            value.sub_(after - before, alpha=job.dose)


RIVAL = Rival("task-vector negation", "2212.04089", (0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5), run)
