"""Which layers of a checkpoint are quantised. Codes, scales and zero points mean nothing apart: a layer passes through whole.

One rule for every scheme (GPTQ, AWQ, compressed-tensors, bitsandbytes, HQQ, AQLM, ModelOpt, MXFP4, MLX, block-scaled fp8):
a layer is quantised when it holds a matrix of integer or sub-byte codes, or one of 8-bit floats beside a scale; then all its
tensors are. What `quantization_config` leaves out (`modules_to_not_convert`) is plain floats without codes, and is divided.
"""

from __future__ import annotations

import re
from collections import defaultdict

from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo

CODES = frozenset(("U8", "I8", "U16", "I16", "U32", "I32", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"))
SETTINGS = ("quantization_config", "quantization", "compression_config")
BUFFERS = re.compile(
    r"(^|\.)(inv_freq|masked_bias|attn_mask|causal_mask|position_ids|token_type_ids|relative_position_index|freqs_cis|"
    r"rotary_emb\.\w+|rope\.freqs|_float_tensor|(attn|attention|self_attn)\.bias)$"
)
"""Tensors that models compute anew and later versions of Transformers do not store; see `is_buffer`."""
SUBMODULES = re.compile(r"\.(weight|(res_|outlier_)?centroids)\..*$")
"""What may follow a layer's name beside a single word: bitsandbytes' and quanto's parts of a weight, VPTQ's tables."""
CACHE_SCALES = re.compile(r"[._](scale|scales|zero_point|amax)$")


def is_buffer(tensor: TensorInfo) -> bool:
    """Tell whether a tensor is a mask, a table of frequencies or the like, which no one trains."""
    found = BUFFERS.search(tensor.name)
    if found is None or not found[2].endswith(".bias"):
        return found is not None
    return len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1) and tensor.shape[2] == tensor.shape[3]


def scheme(checkpoint: Checkpoint) -> str | None:
    """Name the scheme config.json speaks of, or return None."""
    for config in (checkpoint.config, checkpoint.config.get("text_config")):
        for key in SETTINGS:
            settings = config.get(key) if isinstance(config, dict) else None
            if isinstance(settings, dict):
                return str(settings.get("quant_method") or ("mlx" if key == "quantization" else "quantised"))[:40]
    return None


def quantised(checkpoint: Checkpoint) -> dict[str, str]:
    """Find the quantised layers, from headers and config.json; those whose numbers the checkpoint decodes are none.

    Returns:
        Tensor name → the layer it is part of, for every tensor of a quantised layer.
    """
    layers: dict[str, list[TensorInfo]] = defaultdict(list)
    decoded = {*checkpoint.scales, *checkpoint.scales.values()}
    for tensor in checkpoint.tensors.values():
        if tensor.name not in decoded:
            layers[_layer(tensor.name)].append(tensor)
    declared = scheme(checkpoint) is not None
    found = {t.name: layer for layer, group in layers.items() if _has_codes(group, declared) for t in group}
    if found or declared:
        found |= {n: _layer(n) for n, t in checkpoint.tensors.items() if len(t.shape) < 2 and CACHE_SCALES.search(n)}
    return found


def _layer(name: str) -> str:
    whole = SUBMODULES.sub("", name)
    return whole if whole != name else name.rpartition(".")[0] or name


def _has_codes(group: list[TensorInfo], declared: bool) -> bool:
    scaled = any("scale" in t.name.rpartition(".")[2].lower() for t in group)
    for t in group:
        if len(t.shape) < 2 or is_buffer(t):
            continue
        if t.dtype in CODES or (declared and t.dtype in ("I64", "U64")):
            return True
        if DTYPES[t.dtype].bits == 8 and DTYPES[t.dtype].editable and scaled:
            return True
    return False
