"""How much of what plain training does lies in the directions that `ogd` would protect: what protecting costs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

MASSES = (0.5, 0.7, 0.9, 0.97, 0.99)


def table(base: Path, full: Path, factors: Path) -> str:
    """Render the share of the directions of all matrices, and of the energy of plain training's update, at every mass.

    Args:
        base: checkpoint before training.
        full: after plain training.
        factors: of the base on public text.
    """
    held = {name: value for file in sorted(factors.glob("*.safetensors")) for name, value in load_file(file).items()}
    layers = json.loads((factors / "liborth.manifest.json").read_text())["layers"]
    old, new = load_file(base / "model.safetensors"), load_file(full / "model.safetensors")
    lines = ["| `--protect` | directions protected | of plain training's update, energy in them |", "|---|---|---|"]
    for mass in MASSES:
        inside = whole = kept = directions = 0.0
        for name, layer in layers.items():
            a, g = held.get(f"input_covariance/{layer['input']}"), held.get(f"gradient_covariance/{name}")
            if (
                a is None
                or g is None
                or g.dim() != 2
                or layer["tensor"] not in old
                or old[layer["tensor"]].shape != (len(g), len(a))
            ):
                continue  # embeddings and tied heads are frozen
            update = new[layer["tensor"]].double() - old[layer["tensor"]].double()
            inputs, outputs = _leading(a, mass), _leading(g, mass)
            inside += float((outputs.T @ update @ inputs).square().sum())
            whole += float(update.square().sum())
            kept += inputs.shape[1] * outputs.shape[1]
            directions += update.numel()
        lines.append(f"| {mass:g} | {kept / directions:.1%} | {inside / whole:.1%} |")
    return "\n".join(lines)


def _leading(covariance: torch.Tensor, mass: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(covariance.double())
    order = values.argsort(descending=True)
    count = int((values[order].cumsum(0) < mass * values.sum()).sum()) + 1
    return vectors[:, order[:count]]
