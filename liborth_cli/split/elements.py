"""Elements of a stored tensor, in pieces that fit the cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.checkpoint.tensors import as_tensor

DEVICE_PIECE = 1 << 24
"""The same on a GPU, where a piece is a transfer and a few launches."""
PIECE = 1 << 18
"""Elements handled at a time in elementwise work: small enough for the cache, large enough for the call."""


def pieces(first: int, last: int, piece: int = PIECE) -> Iterator[tuple[int, int]]:
    """Cut a range of elements into pieces."""
    for start in range(first, last, piece):
        yield start, min(start + piece, last)


def read_elements(side: Checkpoint, tensor: TensorInfo, start: int, stop: int) -> np.ndarray:
    """Read the bits of elements [start, stop) of a tensor, uint8."""
    width = DTYPES[tensor.dtype].bits // 8
    return side.read(tensor.name, start * width, stop * width)


def load_elements(side: Checkpoint, tensor: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Read elements [start, stop) of a tensor, flat."""
    return as_tensor(read_elements(side, tensor, start, stop), tensor.dtype)
