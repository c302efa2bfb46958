"""The memory delta: the bits that turn the general checkpoint back into the fine-tuned one.

For every tensor that a split changed, the memory file holds bits(W_f) XOR bits(W_g). XOR is exact for every dtype and
bit pattern, −0.0 and NaN payloads included, where a floating-point difference is not. Three kinds of entries:

    xor/<tensor>     the XOR, as integers of the tensor's width, in the tensor's shape
    whole/<tensor>   a tensor that only the fine-tuned checkpoint has and that was kept out of the general one
    frame/<file>     the exact header bytes of a fine-tuned shard (or its index), so that whole files come back identical

What `tune` adds to a model (neurons, whole rows and columns) is described in checkpoint/growth.py.

There is one memory shard for each general shard, and it names the sha256 of the file it belongs to.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from liborth_cli.checkpoint import growth, header, layout
from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.reader import Checkpoint, Shard, TensorInfo
from liborth_cli.checkpoint.writer import Written
from liborth_cli.errors import BadInput, PairMismatch

XOR, WHOLE, FRAME = "xor/", "whole/", "frame/"
VERSION = "memory/1"
MODE = 0o600


def metadata(shard: str, sha256: str = "0" * 64) -> dict[str, str]:
    """Return the `__metadata__` of the memory shard that belongs to one general file."""
    return {"format": "pt", "liborth": VERSION, "general": shard, "general_sha256": sha256}


def xor(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Combine two byte arrays (uint8, same length); applied twice it gives the first one back."""
    return np.bitwise_xor(a, b)


class Memory:
    """An open memory file (or set of shards).

    Attributes:
        checkpoint: its tensors.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Check that every shard is a memory shard of a version we know.

        Raises:
            BadInput: when it is something else.
        """
        self.checkpoint = checkpoint
        self._by_general: dict[str, Shard] = {}
        for shard in checkpoint.shards.values():
            if shard.metadata.get("liborth") != VERSION or not {"general", "general_sha256"} <= set(shard.metadata):
                raise BadInput(f"{shard.path}: not a memory file that this version of liborth can read")
            self._by_general[shard.metadata["general"]] = shard

    def check_fits(self, general: Checkpoint) -> None:
        """Compare names, shapes and widths with the general checkpoint's, from headers alone.

        Raises:
            PairMismatch: when the memory was made for another checkpoint.
        """
        strangers = set(self._by_general) - set(layout.keep(general))
        if strangers:
            raise PairMismatch(f"{self.checkpoint.path}: belongs to a file {min(strangers)!r} that is not here")
        for t in self.checkpoint.tensors.values():
            if t.name.startswith(XOR):
                mine = general.tensors.get(t.name.removeprefix(XOR))
                if mine is None or (mine.shape, DTYPES[mine.dtype].bit_view) != (t.shape, t.dtype):
                    raise PairMismatch(f"{self.checkpoint.path}: {t.name!r} does not fit the general checkpoint")
        for name, grown in self.grown.items():
            if name not in general.tensors or XOR + name in self.checkpoint.tensors:
                raise PairMismatch(f"{self.checkpoint.path}: {grown.entry.name!r} does not fit the general checkpoint")
            grown.widen(general.tensors[name])

    @cached_property
    def grown(self) -> dict[str, growth.Growth]:
        """Tensor name → the rows or columns that only the memory has."""
        return growth.find(self.checkpoint)

    def widen(self, tensor: TensorInfo) -> TensorInfo:
        """Return a tensor of the general checkpoint as it is with the memory in."""
        return self.grown[tensor.name].widen(tensor) if tensor.name in self.grown else tensor

    def withheld(self) -> dict[str, list[TensorInfo]]:
        """Return the tensors that only the memory holds, under their own names, by the general file they belong to."""
        found: dict[str, list[TensorInfo]] = {}
        for t in self.checkpoint.tensors.values():
            if t.name.startswith(WHOLE):
                general = self.checkpoint.shards[t.shard].metadata["general"]
                found.setdefault(general, []).append(replace(t, name=t.name.removeprefix(WHOLE)))
        return found

    def check_belongs(self, general: Written) -> None:
        """Compare a general file's hash with the one this memory was made with.

        Raises:
            PairMismatch: when it is not, to the bit, the same file.
        """
        mine = self._by_general.get(general.name)
        if mine and mine.metadata["general_sha256"] != general.sha256:
            raise PairMismatch(
                f"{mine.path}: does not belong to this {general.name}, or one of the two was changed since the split"
            )

    def frame(self, name: str) -> bytes | None:
        """Return the exact header (or index) bytes of a fine-tuned file, or None when they were not kept."""
        entry = FRAME + name
        return self.checkpoint.read(entry).tobytes() if entry in self.checkpoint.tensors else None


def exists(folder: Path) -> bool:
    """Tell whether a directory holds a memory."""
    return (folder / "memory.safetensors").is_file() or (folder / "memory.safetensors.index.json").is_file()


def shard_names(general: list[str]) -> dict[str, str]:
    """Name the memory shard of each general shard."""
    if len(general) == 1:
        return {general[0]: "memory.safetensors"}
    return {name: f"memory-{i:05d}-of-{len(general):05d}.safetensors" for i, name in enumerate(general, 1)}


def in_order_of(frame: bytes, tensors: list[TensorInfo], file: str) -> list[TensorInfo]:
    """Arrange tensors as the fine-tuned header did.

    Raises:
        PairMismatch: when the header names other tensors.
    """
    entries, _ = header.parse(frame[8:], sum(t.nbytes for t in tensors), f"the frame of {file}")
    by_name = {t.name: t for t in tensors}
    if {entry.name for entry in entries} != set(by_name):
        raise PairMismatch(f"{file}: the memory was made with other tensors")
    return [by_name[entry.name] for entry in entries]
