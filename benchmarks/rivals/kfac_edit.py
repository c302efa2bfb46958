"""The published K-FAC edit: keep of every weight matrix only its coefficients in the directions of highest retain curvature.

Merullo et al. 2025, arXiv 2510.24256. With the eigenvectors of A = Q_A·Λ_A·Q_Aᵀ and G = Q_G·Λ_G·Q_Gᵀ, measured on
text that must stay, the weight itself, not its update, is C = Q_Gᵀ·W·Q_A; coefficients are ranked by λ_G,i·λ_A,j,
those that hold a share of the summed curvature stay, and all below is memory. No forget data, no reference. It is
what `liborth split --one-checkpoint --method kfac --mass M` does to a checkpoint; `--method kfac` with a reference
cuts the update in its place.

Chosen here: the published edit takes the gate and up projections of a few late layers (23 to 25 of OLMo-2's 32),
found for one model by search, so there are two versions: layers at that depth, and all layers' projections. The dose
is the share of curvature that goes.
"""

from __future__ import annotations

import torch

from benchmarks.rivals.factors import linear_layers, retain_factors
from benchmarks.surgery.job import Job, Rival

FIRST, LAST = 23 / 32, 25 / 32


def late(job: Job) -> None:
    """Edit gate and up projections at the published depth."""
    count = len(job.model.model.layers)
    numbers = range(round(FIRST * count), max(round(FIRST * count), round(LAST * count)) + 1)
    _edit(job, [f"layers.{n}.mlp.{kind}_proj" for n in numbers for kind in ("gate", "up")])


def everywhere(job: Job) -> None:
    """Edit gate and up projections of all layers."""
    _edit(job, ["mlp.gate_proj", "mlp.up_proj"])


def _edit(job: Job, endings: list[str]) -> None:
    layers = {name: layer for name, layer in linear_layers(job.model).items() if name.endswith(tuple(endings))}
    factors = retain_factors(job.model, job.retain, job.seed)
    for name, layer in layers.items():
        inputs, q_inputs = torch.linalg.eigh(factors[name].inputs)
        gradients, q_gradients = torch.linalg.eigh(factors[name].gradients)
        curvature = gradients[:, None] * inputs[None]
        values, order = curvature.flatten().sort(descending=True)
        kept = torch.zeros_like(values, dtype=torch.bool)
        kept[order] = values.cumsum(0) - values < (1 - job.dose) * values.sum()
        with torch.no_grad():
            coefficients = q_gradients.T @ layer.weight.double() @ q_inputs
            edited = q_gradients @ (coefficients * kept.view_as(coefficients)) @ q_inputs.T
            layer.weight.copy_(edited.to(layer.weight.dtype))


DOSES = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.2, 0.4)
RIVAL = Rival("K-FAC edit", "2510.24256", DOSES, late)
EVERYWHERE = Rival("K-FAC edit, all layers", "2510.24256", DOSES, everywhere)
