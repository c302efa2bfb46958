"""In which order the tiles of a product are computed.

A GPU works on about a hundred tiles at a time. Tiles that are worked on together should need the same rows and columns, so
that these come from the cache: groups of a few rows of tiles, column by column. The list is made here and read by the kernels;
each tile is computed whole by one program, so the order never changes a bit.
"""

from __future__ import annotations

import functools

import torch

GROUP = 8
"""Rows of tiles in a group."""


@functools.lru_cache(maxsize=64)
def tiles(rows: int, columns: int, device: torch.device, upper: bool = False) -> torch.Tensor:
    """List the tiles of a grid.

    Args:
        rows: of tiles.
        columns: of tiles.
        device: where the list is kept.
        upper: only those on and above the diagonal.

    Returns:
        Row and column of every tile, (count, 2), int32.
    """
    order = [
        (row, column)
        for first in range(0, rows, GROUP)
        for column in range(columns)
        for row in range(first, min(first + GROUP, rows))
        if not upper or column >= row
    ]
    found = torch.tensor(order, dtype=torch.int32).reshape(-1, 2).to(device)
    if found.is_cuda:
        torch.cuda.current_stream(device).synchronize()  # every stream will read it
    return found
