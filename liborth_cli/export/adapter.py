"""A part of an update as a LoRA adapter that PEFT, Transformers and vLLM load as it is: ΔW ≈ B·A, with alpha = r.

The rank is one that vLLM accepts (its `--max-lora-rank` takes a few sizes only), the smallest of them that holds all of the
update but a negligible share; B and A are the leading singular directions, so no adapter of this rank holds more (Eckart and
Young). Norms, biases and tables have no place in what all three load. `whole` puts norms and tables beside the factors, as
PEFT's `modules_to_save`, which vLLM refuses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from liborth_cli.checkpoint.dtypes import DTYPES, as_bytes
from liborth_cli.checkpoint.files import Written, write_file
from liborth_cli.checkpoint.writer import ShardWriter
from liborth_cli.console import Console
from liborth_cli.errors import BadInput, UsageError, VerificationFailed
from liborth_cli.export.difference import Difference
from liborth_cli.linalg.eigen import singular_values
from liborth_cli.linalg.truncated import leading_subspace
from liborth_cli.stream.build import build, match_names

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank can be (config/lora.py), but for 1."""
NEGLIGIBLE = 1e-8
"""Share of ‖U‖² that may be left out when the rank is chosen: 1e-4 of the norm."""
PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Layer:
    """A linear layer that an adapter can change.

    Attributes:
        module: its name in the model.
        tensor: its weight in the checkpoint.
        flipped: whether the weight lies as (d_in, d_out), as in GPT-2.
        d_out, d_in: its shape.
    """

    module: str
    tensor: str
    flipped: bool
    d_out: int
    d_in: int


@dataclass
class Modules:
    """Where the tensors of a checkpoint have their place in PEFT's model.

    Attributes:
        linear: layers that can have factors.
        whole: tensor → the parameters that it is, of norms and tables, which can be carried whole.
    """

    linear: list[Layer] = field(default_factory=list)
    whole: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterFacts:
    """What was written.

    Attributes:
        rank: of every layer.
        layers: how many linear layers are changed.
        lost: share of ‖U‖² of all changed tensors that the adapter does not hold.
        left: changed tensors that it does not hold at all.
        whole: tensors that it carries whole.
    """

    rank: int
    layers: int
    lost: float
    left: tuple[str, ...]
    whole: tuple[str, ...]

    @property
    def max_lora_rank(self) -> int:
        """The smallest --max-lora-rank of vLLM that takes it."""
        return next((rank for rank in RANKS if rank >= self.rank), self.rank)


def find_modules(ends: Difference) -> Modules:
    """Find the layers of the model that `old` is, from its configuration alone.

    Raises:
        BadInput: when Transformers does not know the model.
    """
    model = build(ends.old, torch.float32)
    pieces, _ = match_names(model, ends.old)
    partner = {old.name: name for name, old in ends.partner.items()}
    ties = {name: group for group in _ties(model) for name in group}
    modules, found = dict(model.named_modules()), Modules()
    for parameter, parts in pieces.items():
        name, attribute = parameter.rpartition(".")[::2]
        module, alone = modules[name], len(parts) == 1 and parts[0].matrix is None
        if not alone or parts[0].tensor.name not in partner:
            continue
        tensor = partner[parts[0].tensor.name]
        kind = type(module).__name__
        if attribute == "weight" and kind in ("Linear", "Conv1D") and parameter not in ties:
            rows, columns = parts[0].tensor.shape
            flipped = kind == "Conv1D"
            found.linear.append(Layer(name, tensor, flipped, *((columns, rows) if flipped else (rows, columns))))
        elif kind != "Linear" and not list(module.children()) and len(list(module.parameters())) == 1:
            found.whole[tensor] = tuple(sorted(ties.get(parameter, {parameter})))
    if not found.linear:
        raise BadInput(f"{ends.old.path}: {type(model).__name__} has no linear layer that an adapter could change")
    return found


def write_adapter(
    ends: Difference, folder: Path, rank: int | None, whole: bool, console: Console
) -> tuple[list[Written], AdapterFacts]:
    """Write the factors and their configuration.

    Args:
        ends: what is subtracted from what.
        folder: where the two files go.
        rank: of every layer; None takes the smallest of `RANKS` that holds the update.
        whole: carry changed norms and tables whole.
        console: where progress goes.

    Returns:
        The files, and what they hold.

    Raises:
        VerificationFailed: when no rank that vLLM takes holds the update.
    """
    found = find_modules(ends)
    changed = {n for n in ends.new.tensors if DTYPES[ends.new.tensors[n].dtype].editable and not ends.same(n)}
    kinds = {layer.module.rpartition(".")[2] for layer in found.linear if layer.tensor in changed}
    layers = [layer for layer in found.linear if layer.module.rpartition(".")[2] in kinds]
    if not layers:
        raise UsageError(f"{ends.new.path}: no linear layer differs from {ends.old.path}: there is nothing to export")
    if len({layer.flipped for layer in layers}) > 1:
        raise BadInput(f"{ends.old.path}: has weights both ways round, and an adapter's configuration says one way for all")
    held = _carried(changed, found.whole) if whole else {}
    rank = rank or _smallest_rank(ends, layers, console)
    mode = 0o600 if ends.private else 0o644
    planned = [(f"{PREFIX}{layer.module}.lora_{side}.weight", "F32", shape) for layer in layers for side, shape in (
        ("A", (rank, layer.d_in)), ("B", (layer.d_out, rank)))]  # fmt: skip
    planned += [(PREFIX + name, "F32", ends.new.tensors[tensor].shape) for tensor, names in held.items() for name in names]
    writer = ShardWriter(folder / WEIGHTS, planned, mode=mode)
    lost = total = 0.0
    with console.progress("adapter", len(layers), "matrices") as progress:
        for layer in layers:
            u = _update(ends, layer)
            down, up = _factors(u, rank)
            total += float(u.square().sum())
            lost += float((u - up @ down).square_().sum())
            for side, factor in (("A", down), ("B", up)):
                writer.begin(f"{PREFIX}{layer.module}.lora_{side}.weight", "F32", tuple(factor.shape))
                writer.write(as_bytes(factor.float().contiguous().view(-1)))
            progress.advance(1)
    for tensor, names in held.items():
        value = as_bytes(ends.new.load(tensor).float().view(-1))
        for name in names:  # a tied table is stored under each of its names, as PEFT wants it
            writer.begin(PREFIX + name, "F32", ends.new.tensors[tensor].shape)
            writer.write(value)
    left = sorted(changed - {layer.tensor for layer in layers} - held.keys())
    missing = sum(float(ends.update(name).square().sum()) for name in left)
    facts = AdapterFacts(rank, len(layers), _share(lost + missing, total + missing), tuple(left), tuple(sorted(held)))
    config = write_file(folder / CONFIG, _config(ends, layers, facts, held), mode)
    return [writer.finish(), config], facts


def _ties(model: Any) -> Iterator[set[str]]:
    """Yield the names of each parameter that has several places."""
    places: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), set()).add(name)
    yield from (names for names in places.values() if len(names) > 1)


def _carried(changed: set[str], able: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Return the tensors to carry whole: all of a kind of which one is changed, as PEFT chooses modules by their last name."""
    kinds = {_kind(able[name][0]) for name in changed if name in able}
    return {tensor: parameters for tensor, parameters in able.items() if _kind(parameters[0]) in kinds}


def _kind(parameter: str) -> str:
    """Return the last name of the module that a parameter belongs to."""
    return parameter.split(".")[-2]


def _smallest_rank(ends: Difference, layers: list[Layer], console: Console) -> int:
    """Return the smallest of `RANKS` at which all layers together lose a negligible share of ‖U‖²."""
    tails, total = torch.zeros(len(RANKS), dtype=torch.float64), 0.0
    with console.progress("rank", len(layers), "matrices") as progress:
        for layer in layers:
            energies = singular_values(ends.update(layer.tensor)).double().square()
            tails += torch.stack([energies[rank:].sum() for rank in RANKS])
            total += float(energies.sum())
            progress.advance(1)
    for rank, tail in zip(RANKS, tails.tolist(), strict=True):
        if _share(tail, total) <= NEGLIGIBLE:
            return rank
    raise VerificationFailed(
        f"rank {RANKS[-1]}, the largest that vLLM takes, holds {1 - _share(tails[-1].item(), total):.1%} of the update's ‖U‖²; "
        "`--to task-vector` holds all of it, --rank N --lossy writes the adapter all the same"
    )


def _update(ends: Difference, layer: Layer) -> torch.Tensor:
    """Return a layer's update as (d_out, d_in), float64."""
    u = ends.update(layer.tensor)
    return u.T.contiguous() if layer.flipped else u


def _factors(u: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, d_in) and B (d_out, r), float64, of the leading part of U (d_out, d_in); zeros fill up to the rank."""
    a, b = u.new_zeros(rank, u.shape[1]), u.new_zeros(u.shape[0], rank)
    energy = float(u.square().sum())
    kept = min(rank, *u.shape)
    if energy > 0:
        tall = u.shape[0] > u.shape[1]
        found = leading_subspace(u, kept, energy, torch.Generator().manual_seed(0))
        product = found.thin(tall)
        scale = found.values.clamp(min=torch.finfo(torch.float32).tiny).sqrt()  # both factors are made of one size
        left, right = product.left, product.right
        left, right = (left / scale, right * scale) if tall else (left * scale, right / scale)
        b[:, :kept], a[:kept] = left, right.T
    return a, b


def _config(ends: Difference, layers: list[Layer], facts: AdapterFacts, held: dict[str, tuple[str, ...]]) -> bytes:
    """Render adapter_config.json."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": ends.base.title,
        "revision": ends.base.commit,
        "r": facts.rank,
        "lora_alpha": facts.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": layers[0].flipped,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "target_modules": sorted({layer.module.rpartition(".")[2] for layer in layers}),
        "ensure_weight_tying": any(len(parameters) > 1 for parameters in held.values()),
        "modules_to_save": sorted({_kind(parameters[0]) for parameters in held.values()}) or None,
    }
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _share(part: float, whole: float) -> float:
    return part / whole if whole and not math.isnan(whole) else 0.0
