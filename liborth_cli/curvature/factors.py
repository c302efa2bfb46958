"""Factor sets on disk: what their tensors are called, and how the sums of a stage become means in a file.

A set is one tensor file for each stage of the model, an index and a manifest, which only their owner can read: what a layer is
given, and what it should have said, tells of the rows. `FactorSet` (factor_set.py) reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from liborth_kernels.covariance import symmetric

from liborth_cli import manifest
from liborth_cli.checkpoint import layout
from liborth_cli.checkpoint.dtypes import name_of
from liborth_cli.checkpoint.files import write_file
from liborth_cli.checkpoint.reader import Checkpoint, pieces
from liborth_cli.checkpoint.writer import ShardWriter
from liborth_cli.curvature.layer import eigenbasis
from liborth_cli.curvature.triangles import PACKED, pack
from liborth_cli.errors import BadInput
from liborth_cli.stream.host import Carrier

STEM = "factors"
INPUT_COVARIANCE, GRADIENT_COVARIANCE = "input_covariance/", "gradient_covariance/"
INPUT_MOMENT, GRADIENT_MOMENT, SECOND_MOMENTS = "input_moment/", "gradient_moment/", "second_moments/"
DIAGONAL, VALUES, VECTORS = "diagonal/", "eigenvalues/", "eigenvectors/"
TOKEN_INPUTS, TOKEN_GRADIENTS, TOKEN_WEIGHTS = "token_inputs/", "token_gradients/", "token_weights/"
"""What the tensors of a factor file are called: one of these and the layer's name. Token weights go with the inputs."""
SYMMETRIC = (INPUT_COVARIANCE, GRADIENT_COVARIANCE, INPUT_MOMENT, GRADIENT_MOMENT)
TOKENS = (TOKEN_INPUTS, TOKEN_GRADIENTS, TOKEN_WEIGHTS)

Sums = dict[str, torch.Tensor]
FILE_MODE = 0o600
README = b"""# PRIVATE: do not publish, do not upload, do not copy to a shared place

These factors tell of single rows of the data they were taken on: inputs kept token by token are the text. Keep this directory
where only you can read it, and delete it when the split that needs it is made.
"""
GUARDS = {"README.md": README, ".gitignore": b"*\n"}
"""Files of a private set beside its factors."""


def final_name(kind: str, stage: str) -> str:
    """Return the name of a finished file: `factors.block-00003.safetensors`."""
    return f"{kind}.{f'block-{int(stage):05d}' if stage.isdigit() else stage}.safetensors"


def write(path: Path, tensors: Sums, carrier: Carrier | None = None, earlier: Sequence[Path] = ()) -> manifest.File:
    """Write tensors in the order given, readable by the owner alone.

    Args:
        path: the file.
        tensors: wherever they are.
        carrier: brings those that are on a GPU; None where none is.
        earlier: files of rows that come before those of the same name here, and are never in memory.
    """
    carrier = carrier or Carrier(torch.device("cpu"))
    with ExitStack() as stack:
        before = [stack.enter_context(Checkpoint.open(file)) for file in earlier]
        # An expert may see no token of the last rows.
        gone = {name: torch.empty(0, *info.shape[1:]) for file in before for name, info in file.tensors.items()}
        tensors = gone | tensors
        planned = [(name, name_of(tensor.dtype), _joined(name, tensor, before)) for name, tensor in tensors.items()]
        writer = ShardWriter(path, planned, mode=FILE_MODE)
        for (name, dtype, shape), tensor in zip(planned, tensors.values(), strict=True):
            writer.begin(name, dtype, shape)
            for file in before:
                if name in file.tensors:
                    for start, stop in pieces(0, math.prod(file.tensors[name].shape)):
                        writer.write(file.read_elements(name, start, stop))
            for piece in carrier.pieces(tensor):
                writer.write(piece)
    return manifest.File.of(writer.finish())


def _joined(name: str, tensor: torch.Tensor, before: Sequence[Checkpoint]) -> tuple[int, ...]:
    """Return the shape of a tensor with the rows of its name that earlier files hold."""
    rows = sum(file.tensors[name].shape[0] for file in before if name in file.tensors)
    return (rows + tensor.shape[0], *tensor.shape[1:])


def read(path: Path, wanted: Iterable[str] | None = None) -> Sums:
    """Read tensors of one file, all of them when not said which."""
    with Checkpoint.open(path) as file:
        return {name: file.load(name) for name in (file.tensors if wanted is None else wanted)}


def add(path: Path, sums: Sums) -> Sums:
    """Add the sums in a file to these, a piece at a time; what only one side has is kept."""
    with Checkpoint.open(path) as file:
        for name, info in file.tensors.items():
            if name not in sums:
                sums[name] = file.load(name)
                continue
            total = sums[name].view(-1)
            for start, stop in pieces(0, math.prod(info.shape)):
                total[start:stop] += file.load_elements(name, start, stop).to(total.device)
    return sums


def rows_of(sums: Sums) -> Sums:
    """Take the tokens out of the sums of a stage.

    Raises:
        BadInput: when one is not finite.
    """
    rows = {key: sums.pop(key) for key in sorted(sums) if key.startswith(TOKENS)}
    for key, tensor in rows.items():
        _check_finite(key, tensor)
    return rows


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
        mean = sums.pop(key)
        if not key.startswith(TOKENS):
            mean /= tokens[layer]
            if mean.dim() > 1 and not key.startswith((DIAGONAL, SECOND_MOMENTS)):
                for block in mean if mean.dim() == 3 else (mean,):
                    symmetric(block)
        _check_finite(key, mean)
        result[key] = mean
        if bases and f"{kind}/" in (INPUT_COVARIANCE, GRADIENT_COVARIANCE):
            values, vectors = eigenbasis(mean.cpu())
            result[VALUES + key] = values
            if vectors.numel():
                result[VECTORS + key] = vectors.to(mean.dtype)
    return result


def _check_finite(key: str, tensor: torch.Tensor) -> None:
    kind, _, layer = key.partition("/")
    if not bool(torch.isfinite(tensor.sum())):
        raise BadInput(f"the {kind.replace('_', ' ')} of {layer!r} is not finite; the gradients overflow (try --dtype float32)")


def packed(means: Sums) -> Sums:
    """Turn the symmetric ones of some means into their upper triangles, one after the other; `means` is used up."""
    result: Sums = {}
    for key in list(means):
        mean = means.pop(key)
        square = mean.dim() > 1 and key.startswith(SYMMETRIC)
        result[PACKED + key if square else key] = pack(mean) if square else mean
    return result


def finish(folder: Path, outputs: Sequence[manifest.File], described: manifest.Curvature) -> manifest.Curvature:
    """Complete a set: its index, what guards a private one, and the list of its files.

    Args:
        folder: where its tensor files are; whatever else is there goes.
        outputs: its tensor files.
        described: what was computed, without `outputs`.

    Returns:
        The manifest with all of them.
    """
    kept, names = {file.name for file in outputs}, dict[str, list[str]]()
    for stray in folder.iterdir():
        if stray.name not in kept:
            stray.unlink()
    for file in outputs:
        with Checkpoint.open(folder / file.name) as opened:
            names[file.name] = list(opened.tensors)
    more = {f"{STEM}.safetensors.index.json": layout.index(names, sum(file.size for file in outputs))}
    more |= GUARDS if described.private else {}
    written = [manifest.File.of(write_file(folder / name, data, FILE_MODE)) for name, data in more.items()]
    every = sorted([*outputs, *written], key=lambda file: file.name)
    return described.model_copy(update={"outputs": every})
