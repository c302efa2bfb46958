"""Build a Transformers model without memory for its weights."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import torch

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput

Places = dict[str, list[tuple[str, torch.nn.Module, str]]]
"""First name of a parameter or persistent buffer → (name, module, attribute) of every place it is held in."""


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
        raise BadInput(f"{checkpoint.path}: a quantised checkpoint; curvature needs the one it was made from")
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = _from_config(config, dtype)
    except (ValueError, KeyError, OSError, AttributeError, TypeError, ImportError, json.JSONDecodeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{checkpoint.path}: model_type {kind!r} cannot be built: {reason}") from None
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
    owners = []
    for module in model.modules():
        lost = [n for n, b in module._buffers.items() if b is not None and b.is_meta and (id(module), n) not in stored]
        for name in lost:
            old = module._buffers[name]
            value = float("nan") if old.is_floating_point() else 0
            module._buffers[name] = torch.full(old.shape, value, dtype=old.dtype, device=device)
        owners += [(module, lost)] if lost else []
    for module, names in owners:
        model._init_weights(module)
        for name in names:
            buffer = module._buffers[name]
            if buffer.is_floating_point() and bool(torch.isnan(buffer).any()):
                raise BadInput(
                    f"{type(model).__name__}: does not say how to compute its buffer {name!r}; this family is unknown"
                )
