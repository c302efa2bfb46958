"""Symmetric factors on disk: their upper triangles, row after row, in half of the bytes.

LAPACK calls this packed storage; torch and safetensors have no such type, so a packed matrix is a vector under its own name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from liborth_kernels.covariance import symmetric

from liborth_cli.checkpoint.reader import Checkpoint, Shard

PACKED = "upper/"
"""What the name of a packed matrix begins with."""
BAND = 1024
"""Rows copied at a time: picking elements out takes sixteen bytes for each."""


@dataclass(frozen=True)
class Whole:
    """A stored tensor as whoever reads it gets it.

    Attributes:
        shape: of the whole matrix.
        shard: the file it is in.
    """

    shape: tuple[int, ...]
    shard: str


class Unpacked:
    """The files of a factor set; what is packed in them is read whole.

    Attributes:
        files: the files.
        tensors: all tensors under the names that they had before they were packed.
    """

    def __init__(self, files: Checkpoint) -> None:
        """Look at the headers."""
        self.files, self.tensors = files, dict[str, Whole]()
        for name, info in files.tensors.items():
            packed = name.startswith(PACKED)
            self.tensors[name.removeprefix(PACKED)] = Whole(whole_shape(info.shape) if packed else info.shape, info.shard)

    @property
    def shards(self) -> dict[str, Shard]:
        """The files by name."""
        return self.files.shards

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        return self.files.load(name) if name in self.files.tensors else unpack(self.files.load(PACKED + name))

    def close(self) -> None:
        """Close all files."""
        self.files.close()


def pack(whole: torch.Tensor) -> torch.Tensor:
    """Return the upper triangles of symmetric matrices, (d, d) or (blocks, d, d), as (d(d+1)/2,) or (blocks, d(d+1)/2)."""
    size = whole.shape[-1]
    packed, start = whole.new_empty((*whole.shape[:-2], size * (size + 1) // 2)), 0
    for block, upper in _bands(whole):
        part = block[..., upper]
        packed[..., start : start + part.shape[-1]] = part
        start += part.shape[-1]
    return packed


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Return the symmetric matrices of upper triangles; the inverse of `pack`, to the bit."""
    whole, start = packed.new_zeros(whole_shape(tuple(packed.shape))), 0
    for block, upper in _bands(whole):
        count = int(upper.sum())
        block[..., upper] = packed[..., start : start + count]
        start += count
    for block in whole if whole.dim() == 3 else (whole,):
        symmetric(block)
    return whole


def whole_shape(packed: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of what was packed."""
    size = round((2 * packed[-1]) ** 0.5 - 0.5)
    while size * (size + 1) // 2 < packed[-1]:
        size += 1
    return (*packed[:-1], size, size)


def _bands(whole: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield bands of rows from their first diagonal entry on, and masks of what of them lies in the upper triangle."""
    for start in range(0, whole.shape[-1], BAND):
        band = whole[..., start : start + BAND, start:]
        yield band, torch.ones(band.shape[-2:], dtype=torch.bool, device=whole.device).triu_()
