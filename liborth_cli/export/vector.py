"""A part of an update as plain differences, tensor by tensor: what task arithmetic adds and subtracts (arXiv 2212.04089).

In float32, or float64 where a checkpoint is. Added to the checkpoint it was subtracted from and rounded to that one's dtype it
gives the other end to the bit for 16-bit checkpoints; `differing` counts where it does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from liborth_cli.checkpoint import layout
from liborth_cli.checkpoint.dtypes import DTYPES, as_bytes, torch_dtype
from liborth_cli.checkpoint.files import Written, write_file
from liborth_cli.checkpoint.reader import TensorInfo
from liborth_cli.checkpoint.writer import ShardWriter
from liborth_cli.console import Console
from liborth_cli.export.difference import Difference


def write_vector(ends: Difference, folder: Path, console: Console) -> tuple[list[Written], int]:
    """Write new − old of every tensor that is plain numbers, in the files of `new`.

    Args:
        ends: what is subtracted from what.
        folder: where the files go.
        console: where progress goes.

    Returns:
        The files, and how many elements do not come back to the bit when it is added.
    """
    mode, written, differing = 0o600 if ends.private else 0o644, [], 0
    plan = {file.replace("model", "task_vector"): list(_plain(tensors)) for file, tensors in layout.keep(ends.new).items()}
    total = sum(t.nbytes for tensors in plan.values() for t in tensors)
    with console.progress("task vector", total) as progress:
        for file, tensors in plan.items():
            writer = ShardWriter(folder / file, [(t.name, _wide(t), t.shape) for t in tensors], mode=mode)
            for tensor in tensors:
                wide = torch_dtype(_wide(tensor))
                update, old = ends.update(tensor.name).to(wide), ends.old.load(ends.partner[tensor.name].name)
                back = (old.to(wide).view(tensor.shape) + update).to(torch_dtype(tensor.dtype))
                differing += int((back.view(-1) != ends.new.load(tensor.name).view(-1)).sum())
                writer.begin(tensor.name, _wide(tensor), tensor.shape)
                writer.write(as_bytes(update.contiguous().view(-1)))
                progress.advance(tensor.nbytes)
            written.append(writer.finish())
    if len(plan) > 1:
        names = {file: [t.name for t in tensors] for file, tensors in plan.items()}
        written.append(write_file(folder / "task_vector.safetensors.index.json", layout.index(names, total), mode))
    return written, differing


def _plain(tensors: Iterable[TensorInfo]) -> Iterable[TensorInfo]:
    return (t for t in tensors if DTYPES[t.dtype].editable)


def _wide(tensor: TensorInfo) -> str:
    return "F64" if tensor.dtype == "F64" else "F32"
