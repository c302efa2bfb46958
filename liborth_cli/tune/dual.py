"""`--method sinks`: train the general stream and the memory stream side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from liborth_cli.errors import UsageError
from liborth_cli.tune.data import Batch, content
from liborth_cli.tune.lora import Adapters, LoraOptions
from liborth_cli.tune.method import Method
from liborth_cli.tune.network import Network
from liborth_cli.tune.sinks import find_mlps, hook, squared_cosine, subset, to_growth, transposed, wider_config


@dataclass(frozen=True)
class SinkOptions:
    """What the memory stream is.

    Attributes:
        count: neurons a block; None takes a quarter of the base's.
        active: share of them that a sequence meets; 1 shares all of them between all sequences.
        general: "frozen", "lora" or "train": what the general stream may learn.
        general_rate: what the learning rate is multiplied by in the general stream.
        orthogonality: weight of the squared cosine between the streams' gradients.
        router: learn a gate for each token and block.
        router_cost: price of an open gate, in nats a token.
        seed: of the subsets and the first weights.
    """

    count: int | None = None
    active: float = 0.25
    general: str = "train"
    general_rate: float = 1.0
    orthogonality: float = 0.0
    router: bool = False
    router_cost: float = 0.01
    seed: int = 0


class DualStream(Method):
    """The general stream, and neurons that are kept apart.

    Attributes:
        sinks: of every block.
    """

    name = "sinks"

    def __init__(self, network: Network, options: SinkOptions, lora: LoraOptions) -> None:
        """Add silent neurons.

        Raises:
            UsageError: when the model's MLPs are not understood, or options contradict each other.
        """
        self.network, self.options = network, options
        if options.orthogonality and options.general == "frozen":
            raise UsageError("--orthogonality compares the gradients of two streams; with --general frozen there is one")
        self._places = find_mlps(network.model)
        hidden, neurons = self._places[0].size()
        self.count = options.count or max(neurons // 4, 1)
        self.active = max(round(options.active * self.count), 1)
        self.config = wider_config(network.checkpoint.config, self._places[0], self.count)
        generator = torch.Generator().manual_seed(options.seed)
        deviation = float(getattr(network.model.config.get_text_config(), "initializer_range", None) or hidden**-0.5)
        self.sinks = [place.make(self.count, options.router) for place in self._places]
        for place, sinks in zip(self._places, self.sinks, strict=True):
            sinks.initialise(generator, deviation)
            hook(place, sinks)
        self._adapters = Adapters(network, lora) if options.general == "lora" else None
        self._masks: dict[bytes, torch.Tensor] = {}
        if options.orthogonality:
            for place in self._places:
                self._general_out(place).requires_grad_(True)
        super().__init__(network)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the sinks' parameters, and the general stream's where it may learn."""
        found = {f"sinks.{i}.{name}": p for i, sinks in enumerate(self.sinks) for name, p in sinks.named_parameters()}
        if self._adapters is not None:
            return found | self._adapters.parameters
        return found | (self.network.trainable() if self.options.general == "train" else {})

    def rate_factor(self, name: str) -> float:
        """Slow the general stream down."""
        return 1.0 if name.startswith("sinks.") else self.options.general_rate

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run both streams; in training every row meets its own neurons, in evaluation none: the general model is judged."""
        training = self.network.model.training
        self._silence(batch, training)
        weight = self.options.orthogonality if training else 0.0
        if weight and torch.is_grad_enabled():
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                loss = self._cross_entropy(batch)
            penalties = {"orthogonality": weight * self._cosine(loss)}
        else:
            loss, penalties = self._cross_entropy(batch), {}
        if self.options.router and training:
            gates = torch.stack([s.gate.float().mean() for s in self.sinks if s.gate is not None])
            penalties["router"] = self.options.router_cost * gates.mean()
        return loss, penalties

    def finish(self) -> None:
        """Merge what the general stream learnt."""
        if self._adapters is not None:
            self._adapters.merge()

    def added(self) -> dict[str, tuple[str, torch.Tensor]]:
        """Return stored name → (kind of growth, values) of all neurons."""
        by_parameter = {place.parameter: stored for stored, place in self.network.stored.items()}
        found = {}
        for place, sinks in zip(self._places, self.sinks, strict=True):
            for name, entry in to_growth(place, sinks).items():
                # peft renames the layers that it wraps; the network knows them under their own names.
                found[by_parameter[name]] = entry
        return found

    def router(self) -> dict[str, torch.Tensor]:
        """Return the gates' weights by name."""
        gates = {f"{i}": s.router for i, s in enumerate(self.sinks) if s.router is not None}
        return {f"{i}.{name}": p.detach() for i, gate in gates.items() for name, p in gate.named_parameters()}

    def facts(self) -> dict[str, Any]:
        """Say what was added."""
        return {"neurons": self.count, "active": self.active, **self.config}

    def _silence(self, batch: Batch, training: bool) -> None:
        """Tell every block which neurons each row meets."""
        if not training:
            masks = torch.zeros(len(batch.rows), len(self.sinks), self.count)
        elif self.active == self.count:
            masks = torch.ones(len(batch.rows), len(self.sinks), self.count)
        else:
            masks = torch.stack([self._mask(content(row)) for row in batch.rows])
        for i, sinks in enumerate(self.sinks):
            sinks.mask = masks[:, i, None].to(sinks.out.device)

    def _mask(self, digest: bytes) -> torch.Tensor:
        if digest not in self._masks:
            self._masks[digest] = subset(digest, len(self.sinks), self.count, self.active, self.options.seed)
        return self._masks[digest]

    def _general_out(self, place: Any) -> torch.Tensor:
        layer = place.down
        return getattr(layer, "base_layer", layer).weight

    def _cosine(self, loss: torch.Tensor) -> torch.Tensor:
        general = [self._general_out(place) for place in self._places]
        memory = [sinks.out for sinks in self.sinks]
        gradients = torch.autograd.grad(loss, [*general, *memory], create_graph=True)
        cosines = []
        for place, mine, other in zip(self._places, gradients, gradients[len(general) :], strict=False):
            cosines.append(squared_cosine(mine.T if transposed(place.down) else mine, other))
        return torch.stack(cosines).mean()
