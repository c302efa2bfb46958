"""RMU: steer what one layer says of forget text towards a fixed random direction, and hold what it says of retain text.

Li et al. 2024, "The WMDP Benchmark", arXiv 2403.03218, section 4: with M the residual stream after layer ℓ, u a
random unit vector and c a number, minimise ‖M(x_f) − c·u‖² + α‖M(x_r) − M₀(x_r)‖², each a mean over tokens and
coordinates, learning only the down projections of layers ℓ−2, ℓ−1 and ℓ. Their ℓ is 7 of 32 layers, their α 1200, 150
steps at 5e-5 and width 4096.

Chosen here: ℓ at the same depth; u uniform in the unit cube before it is normed, as in their program; the rate scales
with 1/width; 80 steps; the dose is c in units of the mean norm of M₀ on the forget rows, where their 6.5 is a number
for one model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from benchmarks.rivals.training import IGNORED, WIDTH, batches, device_of, train, whole
from benchmarks.surgery.job import Job, Rival

ALPHA, STEPS, DEPTH = 1200.0, 80, 7 / 32
RATE = 5e-5 * 4096 / WIDTH


def run(job: Job) -> None:
    """Steer with c = `job.dose` times the norm of what is there."""
    device, before = device_of(job.model), copy.deepcopy(job.model)
    layers = job.model.model.layers
    layer = min(round(DEPTH * len(layers)), len(layers) - 2)
    draw = torch.Generator().manual_seed(job.seed)
    direction = torch.rand(job.model.config.hidden_size, generator=draw).to(device)
    forget, retain = batches(job.forget, device, job.seed), batches(whole(job.retain), device, job.seed + 1)
    with torch.no_grad():
        norm = _after(before, next(forget), layer).norm(dim=-1).mean()
    target = job.dose * norm * direction / direction.norm()

    def loss() -> torch.Tensor:
        some = next(retain)
        with torch.no_grad():
            old = _after(before, some, layer)
        held = (_after(job.model, some, layer) - old).square().mean()
        return (_after(job.model, next(forget), layer) - target).square().mean() + ALPHA * held

    train(job.model, RATE, STEPS, loss, [one.mlp.down_proj.weight for one in layers[max(0, layer - 2) : layer + 1]])


def _after(model: Any, batch: tuple[torch.Tensor, torch.Tensor], layer: int) -> torch.Tensor:
    """Return the residual stream after a layer at every token of the rows that is not padding, (tokens, width)."""
    ids, labels = batch
    hidden = model.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[layer + 1]
    last = (labels != IGNORED).int().flip(1).argmax(1, keepdim=True)
    return hidden[torch.arange(ids.shape[1], device=ids.device)[None] < ids.shape[1] - last]


RIVAL = Rival("RMU", "2403.03218", (0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 16.0), run)
