"""The tensor files of a factor set: one for each stage of the model, written as a stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from liborth_kernels.covariance import symmetric

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.tensors import as_bytes, as_tensor
from liborth_cli.checkpoint.writer import ShardWriter
from liborth_cli.curvature.collect import DIAGONAL, MOMENTS, TOKEN_GRADIENTS, TOKEN_INPUTS, TOKEN_WEIGHTS, A, G, Sums
from liborth_cli.curvature.eigen import eigenbasis
from liborth_cli.curvature.factors import VALUES, VECTORS
from liborth_cli.errors import BadInput

TOKENS = (TOKEN_INPUTS, TOKEN_GRADIENTS, TOKEN_WEIGHTS)
NAMES = {torch.float32: "F32", torch.float64: "F64"}


def final_name(kind: str, stage: str) -> str:
    """Return the name of a finished file: `factors.block-00003.safetensors`."""
    return f"{kind}.{f'block-{int(stage):05d}' if stage.isdigit() else stage}.safetensors"


def write(path: Path, tensors: Sums) -> dict[str, str | int]:
    """Write tensors in the order given.

    Returns:
        Name, size and sha256 of the file.
    """
    planned = [(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = ShardWriter(path, planned)
    for (name, dtype, shape), tensor in zip(planned, tensors.values(), strict=True):
        writer.begin(name, dtype, shape)
        writer.write(as_bytes(tensor))
    return writer.finish().to_json()


def read(path: Path, wanted: Iterable[str] | None = None) -> Sums:
    """Read tensors of one file, all of them when not said which."""
    with Checkpoint.open(path) as file:
        found = {}
        for name in list(file.tensors) if wanted is None else wanted:
            info = file.tensors[name]
            found[name] = as_tensor(file.read(name), info.dtype).reshape(info.shape)
        return found


def names(path: Path) -> list[str]:
    """List the tensors of one file."""
    with Checkpoint.open(path) as file:
        return list(file.tensors)


def add(path: Path, sums: Sums) -> Sums:
    """Add the sums in a file to these, and put the tokens in it before these; what only one side has is kept."""
    with Checkpoint.open(path) as file:
        for name, info in file.tensors.items():
            earlier = as_tensor(file.read(name), info.dtype).reshape(info.shape)
            if name in sums and name.startswith(TOKENS):
                sums[name] = torch.cat((earlier.to(sums[name].device), sums[name]))
            elif name in sums:
                sums[name] += earlier.to(sums[name].device)
            else:
                sums[name] = earlier
    return sums


def average(sums: Sums, tokens: Mapping[str, float], bases: bool) -> Sums:
    """Turn the sums of a stage into means, fill their lower triangles, and diagonalise them when asked.

    Args:
        sums: sums; what is left of them is the means.
        tokens: layer → how many tokens it saw.
        bases: also compute eigenbases.

    Raises:
        BadInput: when a factor is not finite.
    """
    result: Sums = {}
    for key in sorted(sums):
        kind, _, layer = key.partition("/")
        mean = sums.pop(key).cpu()
        if not key.startswith(TOKENS):
            mean /= tokens[layer]
            if mean.dim() > 1 and not key.startswith((DIAGONAL, MOMENTS)):
                for block in mean if mean.dim() == 3 else (mean,):
                    symmetric(block)
        if not bool(torch.isfinite(mean.sum())):
            raise BadInput(
                f"the {kind.replace('_', ' ')} of {layer!r} is not finite; the gradients overflow (try --dtype float32)"
            )
        result[key] = mean
        if bases and f"{kind}/" in (A, G):
            values, vectors = eigenbasis(mean)
            result[VALUES + key] = values
            if vectors.numel():
                result[VECTORS + key] = vectors.to(mean.dtype)
    return result
