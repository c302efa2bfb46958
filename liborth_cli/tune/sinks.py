"""Memory sinks: extra MLP neurons for what is private, beside a general stream (Ghosal et al. 2025, arXiv 2507.09937).

Every block's MLP gets k more neurons. Because they append to the intermediate dimension, base and neurons together are an
ordinary checkpoint of a larger `intermediate_size`, and without them the general model is there untouched. Their output
weights begin at zero, so training begins at the base. Each training sequence always meets the same subset of them, drawn
from a hash of what it says; the others are silent, and their gradient is zero.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from liborth_cli.checkpoint import delta
from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.private import find_memory
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput, PairMismatch, UsageError
from liborth_cli.manifest import TuneFacts
from liborth_cli.tune.data import PaddedBatch, content
from liborth_cli.tune.full import Lesson
from liborth_cli.tune.network import Network
from liborth_cli.tune.options import General, Learns, LoraOptions, SinkOptions
from liborth_cli.tune.streams import TwoStreams

NEURONS = "sinks."
"""What the names of the memory's parameters begin with."""


@dataclass(frozen=True)
class Shape:
    """How one family writes its MLP.

    Attributes:
        into: names of the layers into the neurons: gate and up, or one.
        out: name of the layer out of them.
        act: name of the activation.
        size: key of config.json that holds the number of neurons.
    """

    into: tuple[str, ...]
    out: str
    act: str
    size: str


SHAPES = (
    Shape(("gate_proj", "up_proj"), "down_proj", "act_fn", "intermediate_size"),
    Shape(("c_fc",), "c_proj", "act", "n_inner"),
)


class Sinks(nn.Module):
    """The extra neurons of one block.

    Attributes:
        into: weights into the neurons, each (k, hidden); gate first where there is one.
        bias: of each of them, (k,), or None.
        out: weights out of them, (hidden, k).
        router: a gate for each token, or None.
        awake: whether the neurons act at all.
        mask: which neurons each row of the batch meets, (rows, 1, k); None means all.
        gate: what the router said last, (rows, tokens, 1).
    """

    def __init__(self, hidden: int, count: int, parts: int, bias: bool, act: nn.Module, router: bool) -> None:
        """Make k = `count` silent neurons, with `parts` layers into them (2 with a gate) and the block's activation."""
        super().__init__()
        self.into = nn.ParameterList([nn.Parameter(torch.zeros(count, hidden)) for _ in range(parts)])
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(count)) for _ in range(parts if bias else 0)])
        self.out = nn.Parameter(torch.zeros(hidden, count))
        self.router = nn.Linear(hidden, 1) if router else None
        if self.router is not None:
            nn.init.zeros_(self.router.weight)
            nn.init.zeros_(self.router.bias)
        self._act = [act]  # in a list, so that it is not this module's own
        self.awake = True
        self.mask: torch.Tensor | None = None
        self.gate: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the neurons add to the MLP's output, shaped like `x`."""
        biases = list(self.bias) or [None] * len(self.into)
        parts = [nn.functional.linear(x, w, b) for w, b in zip(self.into, biases, strict=True)]
        hidden = self._act[0](parts[0])
        if len(parts) == 2:
            hidden = hidden * parts[1]
        if self.mask is not None:
            hidden = hidden * self.mask
        if self.router is not None:
            self.gate = torch.sigmoid(self.router(x))
            hidden = hidden * self.gate
        return nn.functional.linear(hidden, self.out)

    def initialise(self, generator: torch.Generator, deviation: float) -> None:
        """Draw the weights into the neurons; those out of them stay zero."""
        for weight in self.into:
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)


@dataclass(frozen=True)
class Place:
    """One block's MLP.

    Attributes:
        module: the MLP.
        prefix: its name in the model.
        shape: how the family writes it.
    """

    module: nn.Module
    prefix: str
    shape: Shape

    @property
    def down(self) -> Any:
        """The layer out of the neurons."""
        return getattr(self.module, self.shape.out)

    @property
    def weight(self) -> torch.Tensor:
        """The weights of that layer, beneath any low-rank update."""
        return getattr(self.down, "base_layer", self.down).weight

    def size(self) -> tuple[int, int]:
        """Return hidden width and number of neurons."""
        d_out, d_in = self.weight.T.shape if transposed(self.down) else self.weight.shape
        return int(d_out), int(d_in)

    def make(self, count: int, router: bool) -> Sinks:
        """Make silent neurons for this block."""
        first = getattr(self.module, self.shape.into[0])
        act = getattr(self.module, self.shape.act)
        made = Sinks(self.size()[0], count, len(self.shape.into), first.bias is not None, act, router)
        return made.to(self.weight.device)


def transposed(layer: nn.Module) -> bool:
    """Tell whether a layer holds its weight as (d_in, d_out)."""
    return type(getattr(layer, "base_layer", layer)).__name__ == "Conv1D"


def find_mlps(model: Any) -> list[Place]:
    """Find the MLP of every block.

    Raises:
        UsageError: when the family's MLPs are not understood; names the family.
    """
    found = []
    for name, module in model.named_modules():
        fitting = [s for s in SHAPES if all(hasattr(module, part) for part in (*s.into, s.out, s.act))]
        found += [Place(module, name, shape) for shape in fitting]
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if len(found) != count or len({place.size() for place in found}) != 1:
        raise UsageError(
            f"{type(model).__name__}: --method sinks needs one MLP like Llama's or GPT-2's in each of {count} blocks, "
            f"all of one size, and {len(found)} are here"
        )
    return found


def wider_config(checkpoint: Checkpoint, place: Place, count: int) -> dict[str, int]:
    """Return what config.json says differently when `count` neurons are added to every block.

    Raises:
        UsageError: when the configuration does not hold the size at its top level.
    """
    (_, neurons), config = place.size(), checkpoint.config
    if config.get(place.shape.size, neurons) not in (neurons, None) or "text_config" in config:
        raise UsageError(f"config.json does not say {place.shape.size} {neurons} at its top level; --method sinks needs that")
    return {place.shape.size: neurons + count}


def hook(place: Place, sinks: Sinks) -> Any:
    """Add the neurons' output to the MLP's; return the handle that takes it away again."""
    return place.module.register_forward_hook(lambda _module, args, output: output + sinks(args[0]) if sinks.awake else output)


def subset(digest: bytes, blocks: int, count: int, active: int, seed: int) -> torch.Tensor:
    """Draw the neurons that one sequence meets, (blocks, count), 0 or 1; the same for the same text, always.

    Args:
        digest: hash of what the sequence says.
        blocks: in the model.
        count: neurons in each, of which the sequence meets `active`.
        active: see `count`.
        seed: of the run.
    """
    key = hashlib.sha256(digest + f"/{seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    chosen = torch.rand((blocks, count), generator=generator).argsort(1)[:, :active]
    return torch.zeros(blocks, count).scatter_(1, chosen, 1.0)


def squared_cosine(general: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Return ‖∇W_genᵀ ∇W_mem‖² / (‖∇W_gen‖² ‖∇W_mem‖²), in [0, 1].

    Args:
        general: gradient of the weights out of the general neurons, (hidden, n).
        memory: gradient of the weights out of the sinks, (hidden, k).
    """
    tiny = torch.finfo(general.dtype).tiny
    return (general.T @ memory).square().sum() / (general.square().sum() * memory.square().sum()).clamp(min=tiny)


class DualStream(TwoStreams):
    """The general stream, and neurons that are kept apart.

    Attributes:
        sinks: of every block.
    """

    def __init__(self, network: Network, options: SinkOptions, lora: LoraOptions) -> None:
        """Add silent neurons.

        Raises:
            UsageError: when the model's MLPs are not understood, or options contradict each other.
        """
        if options.orthogonality and options.general is General.FROZEN:
            raise UsageError("--orthogonality compares the gradients of two streams; with --general frozen there is one")
        if options.general is General.FROZEN and options.learnt is not Learns.ALL:
            raise UsageError("with --general frozen only the memory learns, so it learns everything: --memory-learns all")
        self._places = find_mlps(network.model)
        hidden, neurons = self._places[0].size()
        self.count = options.count or max(neurons // 4, 1)
        share = options.active or (0.25 if options.learnt is Learns.ALL else 1.0)
        self.active = max(round(share * self.count), 1)
        self.config = wider_config(network.checkpoint, self._places[0], self.count)
        generator = torch.Generator().manual_seed(options.seed)
        deviation = hidden**-0.5  # of order one after the layer: they have a run to learn in, not a pre-training (0031)
        self.sinks = [place.make(self.count, options.router) for place in self._places]
        for place, sinks in zip(self._places, self.sinks, strict=True):
            sinks.initialise(generator, deviation)
            hook(place, sinks)
        self._masks: dict[bytes, torch.Tensor] = {}
        memory = {f"{NEURONS}{i}.{name}": p for i, sinks in enumerate(self.sinks) for name, p in sinks.named_parameters()}
        super().__init__(network, options, lora, memory)
        if options.orthogonality:
            for place in self._places:
                place.weight.requires_grad_(True)

    def loss(self, batch: PaddedBatch, lesson: Lesson | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run the streams that a lesson is for; held-out rows are the general stream's alone."""
        awake = self.awake(lesson)
        self._wake(batch, awake)
        weight = self.options.orthogonality if awake else 0.0
        if weight and torch.is_grad_enabled():
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                loss = self._cross_entropy(batch)
            penalties = {"orthogonality": weight * self._cosine(loss)}
        else:
            loss, penalties = self._cross_entropy(batch), {}
        if self.options.router and awake:
            penalties["router"] = self.options.gate_price * self._gate_error(
                private=lesson is not None and lesson.name == "memory"
            )
        return loss, penalties

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
        return {f"{delta.ROUTER}{i}.{name}": p.detach() for i, gate in gates.items() for name, p in gate.named_parameters()}

    def facts(self) -> TuneFacts:
        """Say what was added."""
        return TuneFacts.model_validate({"neurons": self.count, "active": self.active, **self.config})

    def _wake(self, batch: PaddedBatch, awake: bool) -> None:
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

    def _cosine(self, loss: torch.Tensor) -> torch.Tensor:
        general = [place.weight for place in self._places]
        memory = [sinks.out for sinks in self.sinks]
        gradients = torch.autograd.grad(loss, [*general, *memory], create_graph=True)
        cosines = []
        for place, mine, other in zip(self._places, gradients, gradients[len(general) :], strict=False):
            cosines.append(squared_cosine(mine.T if transposed(place.down) else mine, other))
        return torch.stack(cosines).mean()


def to_growth(place: Place, sinks: Sinks) -> dict[str, tuple[str, torch.Tensor]]:
    """Return parameter name → (kind of growth, a view of the values as the file holds them) of one block."""
    entries: dict[str, tuple[str, torch.Tensor]] = {}
    for number, name in enumerate(place.shape.into):
        layer, weight = getattr(place.module, name), sinks.into[number].detach()
        flipped = transposed(layer)
        entries[f"{place.prefix}.{name}.weight"] = (delta.COLUMNS, weight.T) if flipped else (delta.ROWS, weight)
        if len(sinks.bias):
            entries[f"{place.prefix}.{name}.bias"] = (delta.ROWS, sinks.bias[number].detach())
    out, key = sinks.out.detach(), f"{place.prefix}.{place.shape.out}.weight"
    entries[key] = (delta.SCALED_ROWS, out.T) if transposed(place.down) else (delta.SCALED_COLUMNS, out)
    return entries


def attach(model: Any, memory: str | Path, beta: float = 1.0) -> list[Sinks]:
    """Put the neurons of a memory file into a general model that Transformers has loaded, router included.

        model = AutoModelForCausalLM.from_pretrained("out")
        liborth_cli.tune.sinks.attach(model, "out")

    Args:
        model: the general model.
        memory: the memory file, the directory it lies in, or the output that it belongs to.
        beta: what the neurons' output is multiplied by.

    Returns:
        The neurons of every block; they act until `detach`.

    Raises:
        BadInput: when the file is not a memory, or holds no neurons.
        PairMismatch: when the neurons are another model's.
    """
    with Checkpoint.open(find_memory(Path(memory)) or Path(memory), stem="memory") as file:
        grown = Memory(file).grown
        if not grown:
            raise BadInput(f"{memory}: this memory holds no neurons")
        if not math.isfinite(beta):
            raise UsageError("beta takes a finite number")
        short = {name.removeprefix(model.base_model_prefix + "."): growth for name, growth in grown.items()}
        router = delta.holds(file, delta.ROUTER)
        attached = []
        for number, place in enumerate(find_mlps(model)):
            found = {}
            for key in to_growth(place, place.make(1, router=False)):
                growth = grown.get(key) or short.get(key.removeprefix(model.base_model_prefix + "."))
                if growth is None:
                    raise PairMismatch(f"{memory}: has no neurons for {key!r}; they belong to another model")
                found[key] = growth
            count = max(growth.entry.shape[-1 if growth.axis else 0] for growth in found.values() if growth.entry.shape)
            sinks = place.make(count, router).to(model.device, model.dtype)
            for key, (_, values) in to_growth(place, sinks).items():
                entry, scaled = found[key].entry, found[key].scaled
                if entry.shape != tuple(values.shape):
                    raise PairMismatch(f"{memory}: {entry.name!r} does not fit this model")
                values.copy_(file.load(entry.name).to(model.dtype) * (beta if scaled else 1.0))
            if sinks.router is not None:
                for name, parameter in sinks.router.named_parameters():
                    parameter.data.copy_(file.load(f"{delta.ROUTER}{number}.{name}"))
            vars(sinks)["handle"] = hook(place, sinks.requires_grad_(False))
            attached.append(sinks)
        return attached


def detach(attached: list[Sinks]) -> None:
    """Take neurons that `attach` put in out again; the model is then the general one."""
    for sinks in attached:
        vars(sinks)["handle"].remove()
