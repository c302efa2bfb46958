"""A Transformers model without memory for its weights, and which stored tensors make up which of its parameters.

Most names are the same on both sides. Base-model checkpoints lack a prefix, tied heads are stored once, and since
Transformers 5 the experts of a mixture lie in one three-dimensional parameter while the file holds one matrix for each.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from liborth_cli.checkpoint.blockscaled import decoded
from liborth_cli.checkpoint.config import check_bounds
from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.pair import has_own_head
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.errors import BadInput, Stopped, UsageError, first_line
from liborth_cli.stream.weights import Weights

Places = dict[str, list[tuple[str, torch.nn.Module, str]]]
"""First name of a parameter or persistent buffer → (name, module, attribute) of every place it is held in."""
MAX_BUFFER_BYTES = 4 << 30


def build(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Build the model a checkpoint's config.json describes, on the meta device, without its code.

    Args:
        checkpoint: where the configuration is.
        dtype: of the model's arithmetic.

    Returns:
        The model, in evaluation mode, asking for no gradient of any weight.

    Raises:
        BadInput: when it is not a causal language model that Transformers knows, or is quantised.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not checkpoint.config:
        raise BadInput(f"{checkpoint.path}: no config.json, which curvature needs to run the model")
    kind = checkpoint.config.get("model_type")
    if "quantization_config" in checkpoint.config:
        more = ", or `split --requantise`" if decoded(checkpoint).scales else ""
        raise BadInput(f"{checkpoint.path}: a quantised checkpoint; curvature needs the one it was made from{more}")
    check_bounds(checkpoint)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        vars(config).pop("quantization_config", None)  # the numbers come decoded (checkpoint/blockscaled.py)
        if has_own_head(checkpoint):  # as Transformers does: what is stored apart and differs is not tied
            for part in (config, config.get_text_config(decoder=True)):
                part.tie_word_embeddings = False
        with torch.device("meta"):
            model = _from_config(config, dtype)
    except Stopped:
        raise
    except Exception as error:  # a configuration is a program's input: whatever it makes fail is its fault
        raise BadInput(f"{checkpoint.path}: model_type {kind!r} cannot be built: {first_line(error, 1000)}") from None
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise BadInput(
            f"{checkpoint.path}: model_type {kind!r} reads in both directions; curvature needs a causal language model"
        )
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval().requires_grad_(False)


def _from_config(config: Any, dtype: torch.dtype) -> Any:
    """Prefer fused attention; a family without it says so by raising ValueError, and gets the plain one."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype, trust_remote_code=False)
    except ValueError:
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype, trust_remote_code=False)


def places(model: Any) -> Places:
    """Return first name → (name, module, attribute) of every place a parameter or persistent buffer is held in."""
    groups: dict[int, list[tuple[str, torch.nn.Module, str]]] = defaultdict(list)
    persistent = set(model.state_dict(keep_vars=True))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, value in [*module._parameters.items(), *module._buffers.items()]:
            name = f"{prefix}.{attribute}" if prefix else attribute
            if value is not None and (attribute in module._parameters or name in persistent):
                groups[id(value)].append((name, module, attribute))
    return {group[0][0]: group for group in groups.values()}


@contextmanager
def standing_in(held: Places, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Have other tensors stand in for parameters, in every place that holds them.

    Args:
        held: places of the model's parameters.
        values: first name → what every module that holds the parameter finds in its place.
    """
    before = {name: [module._parameters[attribute] for _, module, attribute in held[name]] for name in values}
    try:
        for name, value in values.items():
            for _, module, attribute in held[name]:
                # Not a Parameter: a dual number, or a leaf that asks for its gradient.
                module._parameters[attribute] = value  # type: ignore[assignment]
        yield
    finally:
        for name, old in before.items():
            for (_, module, attribute), value in zip(held[name], old, strict=True):
                module._parameters[attribute] = value


def make_buffers_real(model: Any, held: Places, device: torch.device) -> None:
    """Compute the buffers no checkpoint stores (rotary frequencies, scales), by the model's own initialisation.

    Args:
        model: on the meta device.
        held: what `places` found: these come from the checkpoint.
        device: where the buffers go.

    Raises:
        BadInput: when the family does not say how to compute one.
    """
    stored = {(id(module), attribute) for group in held.values() for _, module, attribute in group}
    owners, total = [], 0
    for module in model.modules():
        lost = [n for n, b in module._buffers.items() if b is not None and b.is_meta and (id(module), n) not in stored]
        for name in lost:
            old = module._buffers[name]
            total += old.nbytes
            if total > MAX_BUFFER_BYTES:
                raise BadInput(f"{type(model).__name__}: config.json asks for more than {MAX_BUFFER_BYTES >> 30} GB of buffers")
            value = float("nan") if old.is_floating_point() else 0
            module._buffers[name] = torch.full(old.shape, value, dtype=old.dtype, device=device)
        owners += [(module, lost)] if lost else []
    for module, names in owners:
        try:
            model._init_weights(module)
        except Exception as error:
            raise BadInput(
                f"{type(model).__name__}: does not say how to compute its buffer {names[0]!r} "
                f"({type(error).__name__}); this family is unknown"
            ) from None
        for name in names:
            buffer = module._buffers[name]
            if buffer.is_floating_point() and bool(torch.isnan(buffer).any()):
                raise BadInput(
                    f"{type(model).__name__}: does not say how to compute its buffer {name!r}; this family is unknown"
                )


def find_blocks(model: Any) -> list[torch.nn.Module]:
    """Return the one list of blocks; raise BadInput when there is none, or more."""
    kinds = set(model._no_split_modules or ())
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and type(module[0]).__name__ in kinds
    ]
    if len(lists) != 1:
        raise BadInput(
            f"{type(model).__name__}: no single list of {count} blocks found in it; liborth does not know this family"
        )
    return list(lists[0])


@dataclass(frozen=True)
class Piece:
    """One stored tensor and the place it takes in a parameter.

    Attributes:
        tensor: the stored tensor.
        parameter: name of the parameter in memory.
        matrix: which matrix of a three-dimensional parameter, or None when it is all of the parameter.
        row: first row of that matrix which this tensor fills.
    """

    tensor: TensorInfo
    parameter: str
    matrix: int | None = None
    row: int = 0

    def within(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the view of the parameter that the stored tensor fills."""
        return parameter if self.matrix is None else parameter[self.matrix][self.row : self.row + self.tensor.shape[-2]]


def assemble(out: torch.Tensor, pieces: Sequence[Piece], weights: Weights) -> None:
    """Fill a parameter, contiguous, with the stored tensors it is made of."""
    for piece in pieces:
        weights.read_into(piece.within(out).view(-1), piece.tensor)


def match_names(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, list[Piece]], list[str]]:
    """Find the stored tensors of every parameter and persistent buffer of a model on the meta device.

    Args:
        model: a Transformers model; tied parameters are the same object.
        checkpoint: its weights.

    Returns:
        Parameter name → its pieces in order, and the stored names that nothing in the model asks for.

    Raises:
        UsageError: when Transformers is too old.
        BadInput: when a parameter has no stored tensor, or a conversion is one that is not understood; names it.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:
        raise UsageError("curvature needs transformers 5 or newer, which says how stored names map to its models") from None

    wanted = {**dict(model.named_parameters(remove_duplicate=False)), **_persistent_buffers(model)}
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    state: dict[str, Any] = dict(wanted)
    found: dict[str, list[tuple[int, list[int], TensorInfo]]] = defaultdict(list)
    by_target: dict[str, Any] = {}
    unused = []
    for name, info in checkpoint.tensors.items():
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in wanted:
            unused.append(name)
            continue
        order, numbers = 0, []
        if pattern is not None:
            rule = next(c for c in converters if pattern in c.source_patterns)
            by_target[target] = rule
            order = list(rule.source_patterns).index(pattern)
            numbers = [int(n) for n in re.findall(r"\d+", name)]
        found[target].append((order, numbers, info))
    aliases = _aliases(model)
    result: dict[str, list[Piece]] = {}
    for target, value in wanted.items():
        group = next((found[alias] for alias in aliases.get(target, [target]) if alias in found), None)
        if group is None:
            raise BadInput(
                f"{checkpoint.path}: no tensor for {target!r} of {type(model).__name__}; is the config.json its own?"
            )
        group.sort(key=lambda entry: entry[:2])
        result[target] = _pieces(target, tuple(value.shape), group, by_target.get(target), checkpoint)
    return result, unused


def _pieces(
    target: str, shape: tuple[int, ...], group: list[tuple[int, list[int], TensorInfo]], rule: Any, checkpoint: Checkpoint
) -> list[Piece]:
    for _, _, info in group:
        if not DTYPES[info.dtype].editable and len(info.shape) > 1:
            raise BadInput(f"{checkpoint.path}: tensor {info.name!r} is stored as {info.dtype}; curvature needs plain floats")
    if rule is None:
        info = group[0][2]
        if len(group) > 1 or info.shape != shape:
            raise BadInput(
                f"{checkpoint.path}: tensor {info.name!r} is {list(info.shape)} and the config asks for {list(shape)}; "
                "config.json and the weights do not belong together"
            )
        return [Piece(info, target)]
    operations = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
    if operations not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        steps = ", ".join(name for name, _ in operations)
        kind = checkpoint.config.get("model_type")
        raise BadInput(
            f"{checkpoint.path}: model_type {kind!r} makes parameter {target!r} of stored tensors by {steps}, which is not "
            "understood"
        )
    parts: dict[int, list[TensorInfo]] = defaultdict(list)
    for order, _, info in group:
        parts[order].append(info)
    pieces = []
    for matrix in range(shape[0]):
        row = 0
        for infos in parts.values():
            if len(infos) != shape[0]:
                raise BadInput(f"{checkpoint.path}: parameter {target!r} wants {shape[0]} experts, {len(infos)} are stored")
            pieces.append(Piece(infos[matrix], target, matrix, row))
            row += infos[matrix].shape[0]
        if row != shape[1]:
            raise BadInput(
                f"{checkpoint.path}: the stored parts of {target!r} have {row} rows and the model asks for {shape[1]}"
            )
    return pieces


def _aliases(model: Any) -> dict[str, list[str]]:
    """Return, for every tied parameter, all its names."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return {name: group for group in groups.values() for name in group}


def _persistent_buffers(model: Any) -> dict[str, Any]:
    kept = set(model.state_dict(keep_vars=True))
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}
