"""Which tensor goes into which file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.errors import UsageError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
INDEX = "model.safetensors.index.json"


def parse_size(text: str) -> int:
    """Read "5GB", "500MiB" or "1000000" as bytes.

    Raises:
        UsageError: when it is none of these, or not positive.
    """
    found = re.fullmatch(r"([0-9.]+)\s*([kmgt]?i?)b?", text.strip().lower())
    try:
        size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    except (ValueError, KeyError):
        size = 0
    if size <= 0:
        raise UsageError(f"{text!r} is not a size; write for example 5GB or 500MiB")
    return size


def keep(checkpoint: Checkpoint) -> dict[str, list[TensorInfo]]:
    """Return the checkpoint's own layout: file name → tensors in the order of their data.

    A single file without an index is called model.safetensors, whatever it was called, so that it loads.
    """
    files: dict[str, list[TensorInfo]] = {}
    for tensor in checkpoint.tensors.values():
        files.setdefault(tensor.shard, []).append(tensor)
    if checkpoint.index is None:
        return {"model.safetensors": list(checkpoint.tensors.values())}
    return files


def has_index(files: Mapping[str, object], kept: Checkpoint | None = None) -> bool:
    """Tell whether an output has an index: of several files always, of one where the layout `kept` had one."""
    return len(files) > 1 or (kept is not None and kept.index is not None)


def reshard(tensors: Iterable[TensorInfo], max_bytes: int) -> dict[str, list[TensorInfo]]:
    """Distribute tensors over files of at most `max_bytes` (a larger tensor gets its own), as Transformers would."""
    from huggingface_hub import split_state_dict_into_shards_factory

    by_name = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    return {file: [by_name[name] for name in names] for file, names in split.filename_to_tensors.items()}


def index(files: dict[str, list[str]], total: int) -> bytes:
    """Return the text of an index file.

    Args:
        files: file name → tensor names.
        total: bytes of all tensors.
    """
    weight_map = {name: file for file, names in files.items() for name in names}
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
