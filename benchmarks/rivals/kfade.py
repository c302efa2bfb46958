"""K-FADE: a few uphill Gauss-Newton steps on the forget loss, in the K-FAC metric of the retain data.

arXiv 2602.10568. With damped retain factors A and G of every matrix and D the gradient of the mean forget loss, a
step is η·G⁻¹·D·A⁻¹: the steepest ascent for a given predicted loss of retain behaviour ½ tr(G·ΔW·A·ΔWᵀ).

Known to us from its abstract and from reports of it, so the rest is chosen here: five steps, the forget gradient
measured anew at each, the factors once; every step is scaled so that its predicted cost is dose / 5 nats a retain
token; all linear layers.
"""

from __future__ import annotations

from benchmarks.rivals.factors import apply, retain_cost, retain_factors, solve, tokens_of
from benchmarks.surgery.job import Job, Rival

STEPS = 5


def run(job: Job) -> None:
    """Climb, at a predicted retain cost of `job.dose` nats a token in all."""
    factors = retain_factors(job.model, job.retain, job.seed)
    for _ in range(STEPS):
        uphill = {}
        for batch in tokens_of(job.model, job.forget):
            for name, one in batch.items():
                uphill[name] = uphill.get(name, 0.0) + (one.gradients.T @ one.inputs).double()
        steps = {n: solve(factors[n].inputs, solve(factors[n].gradients, d).T).T for n, d in uphill.items()}
        cost = retain_cost(factors, steps)
        if cost > 0:
            apply(job.model, steps, (job.dose / STEPS / cost) ** 0.5)


RIVAL = Rival("K-FADE", "2602.10568", (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), run)
