"""Low-rank updates beside the linear layers of a model that is used in other ways too: its modules stay as they are built.

An attacker who lacks the memory to train all weights trains these (Hu et al. 2022, arXiv 2106.09685). `--method lora` has peft
rebuild the model; here hooks add what is learnt, and go again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from liborth_cli.tune.full import Full

SCALE = 2.0
"""α / r: what B·A is multiplied by."""


def linear_layers(model: Any) -> dict[str, torch.nn.Module]:
    """Return the linear layers of a model of Transformers by name, its head left out."""
    head = model.get_output_embeddings()
    kinds = [(name, m) for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    return {name: module for name, module in kinds if module is not head}


class LowRank(Full):
    """Trains W + SCALE·B·A for every linear layer, A drawn at random and B zero; the model answers with it from the start."""

    def __init__(self, model: Any, rank: int, seed: int) -> None:
        """Draw the updates.

        Args:
            model: of Transformers, its weights in memory; they ask for no gradient.
            rank: of the updates; of narrower layers their shorter side.
            seed: of what is drawn.
        """
        self._layers = linear_layers(model)
        draw = torch.Generator().manual_seed(seed)
        factors = {name: _factors(layer, rank, draw) for name, layer in self._layers.items()}
        super().__init__(model, {f"{name}.{side}": part for name, both in factors.items() for side, part in both.items()})
        self._hooks = [layer.register_forward_hook(self._adding(name)) for name, layer in self._layers.items()]

    @torch.no_grad()
    def finish(self) -> None:
        """Add the updates to the weights, and leave the layers as they were."""
        for hook in self._hooks:
            hook.remove()
        for name, layer in self._layers.items():
            weight = _weight(layer)
            update = self.parameters[f"{name}.B"] @ self.parameters[f"{name}.A"]
            weight.data.add_(update if _is_plain(layer) else update.T, alpha=SCALE)

    def _adding(self, name: str) -> Any:
        down, up = self.parameters[f"{name}.A"], self.parameters[f"{name}.B"]

        def add(_: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
            return out + SCALE * (given[0] @ down.T) @ up.T

        return add


def trained(model: Any, rank: int, seed: int) -> Full:
    """Return what trains a model that is in memory: all of its weights, or low-rank updates of a rank that is not 0."""
    model.requires_grad_(False)
    return LowRank(model, rank, seed) if rank else Full(model, dict(model.named_parameters()))


def _factors(layer: torch.nn.Module, rank: int, draw: torch.Generator) -> Mapping[str, torch.nn.Parameter]:
    """Return A, (r, d_in), and B, (d_out, r), in float32."""
    weight = _weight(layer)
    d_out, d_in = weight.shape if _is_plain(layer) else weight.shape[::-1]
    r = min(rank, d_out, d_in)
    down = torch.empty(r, d_in).uniform_(-1, 1, generator=draw).mul_(d_in**-0.5)  # as a linear layer of torch begins
    return {
        "A": torch.nn.Parameter(down.to(weight.device)),
        "B": torch.nn.Parameter(torch.zeros(d_out, r, device=weight.device)),
    }


def _weight(layer: torch.nn.Module) -> torch.Tensor:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _is_plain(layer: torch.nn.Module) -> bool:
    """Tell whether a layer's weight is stored (d_out, d_in), as of a Linear; a Conv1D of GPT-2 has the other."""
    return type(layer).__name__ == "Linear"
