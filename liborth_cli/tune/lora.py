"""Low-rank updates, by peft: `--method lora`, and a general stream that moves only a little."""

from __future__ import annotations

from typing import Any

import torch

from liborth_cli.errors import UsageError, first_line
from liborth_cli.manifest import TuneFacts
from liborth_cli.tune.full import Full
from liborth_cli.tune.low_rank import linear_layers
from liborth_cli.tune.network import Network
from liborth_cli.tune.options import LoraOptions


class Adapters:
    """peft's low-rank layers inside a network's model.

    Attributes:
        parameters: what is trained, by name.
    """

    def __init__(self, network: Network, options: LoraOptions) -> None:
        """Put the layers in.

        Raises:
            UsageError: when peft is missing, or refuses the targets.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UsageError("LoRA needs peft: pip install 'liborth[lora]', or pip install peft") from None
        self._network = network
        config = LoraConfig(
            r=options.rank,
            lora_alpha=int(options.alpha or 2 * options.rank),
            target_modules=[*(options.targets or sorted(linear_layers(network.model)))],
            fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in network.model.modules()),
        )
        try:
            inject_adapter_in_model(config, network.model)
        except (ValueError, TypeError) as error:
            raise UsageError(f"peft refuses: {first_line(error)}") from None
        network.model.requires_grad_(False)
        self.parameters: dict[str, torch.nn.Parameter] = {
            name: p for name, p in network.model.named_parameters() if ".lora_" in name
        }
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the updates to the weights they belong to."""
        from peft.tuners.tuners_utils import BaseTunerLayer  # pyright: ignore[reportMissingImports]

        for module in self._network.model.modules():
            if isinstance(module, BaseTunerLayer):
                layer: Any = module
                weight = layer.get_base_layer().weight
                weight.data += layer.get_delta_weight("default").to(weight.dtype)


class Lora(Full):
    """Every linear layer gets a low-rank update, merged at the end."""

    def __init__(self, network: Network, options: LoraOptions) -> None:
        """Put the low-rank layers in."""
        self._adapters = Adapters(network, options)
        super().__init__(network.model, self._adapters.parameters)

    def finish(self) -> None:
        """Merge."""
        self._adapters.merge()

    def facts(self) -> TuneFacts:
        """Say how many numbers were trained."""
        return TuneFacts(trained=sum(p.numel() for p in self.parameters.values()))
