"""`--method sinks`: train the general stream and the memory stream side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from liborth_cli.errors import UsageError
from liborth_cli.tune.data import Batch, content
from liborth_cli.tune.lora import Adapters, LoraOptions
from liborth_cli.tune.method import LOSS, Lesson, Method
from liborth_cli.tune.network import Network
from liborth_cli.tune.route import Example, Learns, Stream
from liborth_cli.tune.sinks import find_mlps, hook, squared_cosine, subset, to_growth, transposed, wider_config

NEURONS = "sinks."
"""What the names of the memory's parameters begin with."""


@dataclass(frozen=True)
class SinkOptions:
    """What the memory stream is.

    Attributes:
        count: neurons a block; None takes a quarter of the base's.
        active: share of them that a sequence meets; 1 shares all of them between all sequences. None takes a quarter where
            every row trains both streams, and all where rows are divided between the two.
        learns: "all", "repeats" or "private": what the memory learns. None takes "repeats", and "all" beside a frozen stream.
        rehearse: share of the general stream's rows that the neurons read too, so that they know what to leave alone.
        general: "frozen", "lora" or "train": what the general stream may learn.
        general_rate: what the learning rate is multiplied by in the general stream.
        orthogonality: weight of the squared cosine between the streams' gradients.
        router: learn a gate for each token and block.
        router_cost: price in nats a token of a gate that is open, or, where rows are divided, of one that errs. None takes 0.01
            for the first and 1 for the second: at a hundredth gates hardly learn what is private (docs/log.md).
        seed: of the subsets and the first weights.
    """

    count: int | None = None
    active: float | None = None
    learns: str | None = None
    rehearse: float = 0.25
    general: str = "train"
    general_rate: float = 1.0
    orthogonality: float = 0.0
    router: bool = False
    router_cost: float | None = None
    seed: int = 0

    @property
    def learnt(self) -> Learns:
        """What the memory learns, with the default filled in."""
        return Learns(self.learns or ("all" if self.general == "frozen" else "repeats"))

    @property
    def gate_price(self) -> float:
        """What a gate costs, with the default filled in."""
        return (0.01 if self.learnt == Learns.ALL else 1.0) if self.router_cost is None else self.router_cost


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
        if options.general == "frozen" and options.learnt is not Learns.ALL:
            raise UsageError("with --general frozen only the memory learns, so it learns everything: --memory-learns all")
        self._places = find_mlps(network.model)
        hidden, neurons = self._places[0].size()
        self.count = options.count or max(neurons // 4, 1)
        share = options.active or (0.25 if options.learnt is Learns.ALL else 1.0)
        self.active = max(round(share * self.count), 1)
        self.config = wider_config(network.checkpoint.config, self._places[0], self.count)
        generator = torch.Generator().manual_seed(options.seed)
        deviation = hidden**-0.5  # of order one after the layer: they have a run to learn in, not a pre-training (0031)
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
        return self._memory() | self._general()

    def clipped(self) -> list[dict[str, torch.nn.Parameter]]:
        """Clip the streams apart where each has its own rows: nothing of the memory's gradient reaches the general stream."""
        return [self.parameters()] if self.options.learnt is Learns.ALL else [self._general(), self._memory()]

    def rate_factor(self, name: str) -> float:
        """Slow the general stream down."""
        return 1.0 if name.startswith(NEURONS) else self.options.general_rate

    def lessons(self, rows: Sequence[Example], number: int) -> list[Lesson]:
        """Divide a batch: the general stream reads its rows without any neurons; the neurons read theirs, and some of these."""
        if self.options.learnt is Learns.ALL:
            return [Lesson(LOSS, rows, self.parameters())]
        mine, other = ([row for row in rows if row.stream is s] for s in (Stream.GENERAL, Stream.MEMORY))
        again = mine[: math.ceil(self.options.rehearse * len(mine))]
        lessons = [Lesson("general", mine, self._general()), Lesson("memory", other, self._memory())]
        lessons += [Lesson("rehearsed", again, self._memory(), own=False)]
        return [lesson for lesson in lessons if lesson.rows]

    def loss(self, batch: Batch, lesson: Lesson | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run the streams that a lesson is for; held-out rows are the general stream's alone."""
        name = lesson.name if lesson is not None else "general"
        awake = name != "general"
        self._wake(batch, awake)
        weight = self.options.orthogonality if awake else 0.0
        if weight and torch.is_grad_enabled():
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                loss = self._cross_entropy(batch)
            penalties = {"orthogonality": weight * self._cosine(loss)}
        else:
            loss, penalties = self._cross_entropy(batch), {}
        if self.options.router and awake:
            penalties["router"] = self.options.gate_price * self._gate_error(private=name == "memory")
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

    def _memory(self) -> dict[str, torch.nn.Parameter]:
        return {f"{NEURONS}{i}.{name}": p for i, sinks in enumerate(self.sinks) for name, p in sinks.named_parameters()}

    def _general(self) -> dict[str, torch.nn.Parameter]:
        if self._adapters is not None:
            return self._adapters.parameters
        return self.network.trainable() if self.options.general == "train" else {}

    def _wake(self, batch: Batch, awake: bool) -> None:
        """Tell every block which neurons each row meets, if any."""
        masks = None
        if awake and self.active < self.count:
            masks = torch.stack([self._mask(content(row)) for row in batch.rows])
        for i, sinks in enumerate(self.sinks):
            sinks.awake = awake
            sinks.mask = None if masks is None else masks[:, i, None].to(sinks.out.device)

    def _gate_error(self, private: bool) -> torch.Tensor:
        """Return how far the gates are open, or, where rows are divided, −log of what they give to the right answer."""
        gates = torch.stack([s.gate.float().flatten() for s in self.sinks if s.gate is not None])
        if self.options.learnt is Learns.ALL:
            return gates.mean()
        return -(gates if private else 1 - gates).clamp(min=1e-7).log().mean()

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
