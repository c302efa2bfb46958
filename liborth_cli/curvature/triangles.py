"""Symmetric factors on disk: their upper triangles, row after row, in half of the bytes.

LAPACK calls this packed storage; torch and safetensors have no such type, so a packed matrix is a vector under its own name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from liborth_kernels.covariance import symmetric
from liborth_kernels.rebuild import BITS

from liborth_cli.checkpoint.reader import Checkpoint, Shard

PACKED = "upper/"
"""What the name of a packed matrix begins with."""


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
    """Return the upper triangles of symmetric matrices, (d, d) or (blocks, d, d), as (d(d+1)/2,) or (blocks, d(d+1)/2).

    On a GPU by a mask: thousands of rows cut in Python hold up every other thread for longer than the copy takes.
    """
    size = whole.shape[-1]
    if whole.device.type == "cpu":
        return torch.cat([whole[..., row, row:] for row in range(size)], -1)
    upper = torch.ones(size, size, dtype=torch.bool, device=whole.device).triu_()
    return whole.masked_select(upper).view(*whole.shape[:-2], -1)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Return the symmetric matrices of upper triangles, on the CPU; the inverse of `pack`, to the bit."""
    whole = torch.empty(whole_shape(tuple(packed.shape)), dtype=packed.dtype)
    size, bits = whole.shape[-1], BITS[packed.element_size()]
    blocks = whole.view(bits).view(-1, size, size)
    for block, triangle in zip(blocks, packed.view(bits).view(len(blocks), -1).numpy(), strict=True):
        # Row after row: a mask of the triangle takes twelve times as long, most of it to find where it is true.
        rows, start = block.numpy(), 0
        for row in range(size):
            rows[row, row:] = triangle[start : start + size - row]
            start += size - row
        symmetric(block)
    return whole


def whole_shape(packed: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of what was packed."""
    size = round((2 * packed[-1]) ** 0.5 - 0.5)
    while size * (size + 1) // 2 < packed[-1]:
        size += 1
    return (*packed[:-1], size, size)
