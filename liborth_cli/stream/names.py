"""Which stored tensors make up which parameter in memory, by Transformers' own conversion rules.

Most names are the same on both sides. Base-model checkpoints lack a prefix, tied heads are stored once, and since
version 5 the experts of a mixture lie in one three-dimensional parameter while the file holds one matrix for each.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.errors import BadInput, UsageError


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
        raise BadInput(f"{checkpoint.path}: parameter {target!r} is made of stored tensors by {steps}, which is not understood")
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
