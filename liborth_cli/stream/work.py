"""Work of models in multiply-adds, and how many this machine does in a second: what `--dry-run` makes times of.

A time so found assumes what it was measured with: free cores, and products as quick as one square one. Reading weights is
counted at `DISK_RATE`; attention's own products, norms and the losses of labels are not.
"""

from __future__ import annotations

import functools
import time

import torch

from liborth_cli.stream.model import TAIL, BlockModel

DISK_RATE = 1.0e9
"""Bytes a second assumed for reading and writing together; a warm cache is several times faster."""
PROBE, DEVICE_PROBE = 768, 4096
"""Side of the product that is timed, here and on a GPU."""
BACK, AGAIN = 1, 1
"""Products with every weight on the way back, beside the one forward; and where a block is computed once more."""

UPDATED, SCORED = 200, 800
"""AdamW's update of a weight, and a score that is compared with another model's, there and back: as long as so many
multiply-adds in float32 (measured on one core: 3.8 and 15 ns beside 55 billion a second). Neither is faster in bfloat16."""


@functools.cache
def rate(device: torch.device, dtype: str = "float32") -> float:
    """Time one product, and return multiply-adds a second.

    Args:
        device: where.
        dtype: of the numbers; bfloat16 is several times faster where a processor has instructions for it, and slower elsewhere.
    """
    side = _side(device)
    a, seconds = torch.ones(side, side, dtype=getattr(torch, dtype), device=device), []
    for _ in range(3):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return side**3 / min(seconds)


def multiplied(model: BlockModel) -> int:
    """Return how many weights a token is multiplied with on its way forward: all but the embedding's."""
    return sum(model.stage_elements(stage) for stage in [*map(str, range(len(model.blocks))), TAIL])


def updating(model: BlockModel, steps: float) -> float:
    """Return the seconds that so many updates of all weights take."""
    return steps * UPDATED * multiplied(model) / rate(model.device)


def comparing(model: BlockModel, tokens: float) -> float:
    """Return the seconds that it takes to compare what two models say at so many tokens, and to go back from there."""
    return tokens * SCORED * model.vocabulary / rate(model.device)


def reading(model: BlockModel, passes: int) -> float:
    """Return the seconds that it takes to read all weights so often."""
    return passes * model.nbytes / DISK_RATE


def said(device: torch.device, dtype: str = "float32") -> str:
    """Say what a time assumes: the rate in float32, and in the dtype of products with weights where that is another."""
    speed = f"{rate(device) / 1e9:,.0f} billion multiply-adds a second"
    if dtype != "float32":
        speed += f" in float32, {rate(device, dtype) / 1e9:,.0f} in {dtype}"
    narrow = f"with matrices far below {_side(device)} rows it takes several times longer"
    return f"at {speed}, measured here now, and {DISK_RATE / 1e9:.0f} GB/s of disk; {narrow}"


def _side(device: torch.device) -> int:
    return PROBE if device.type == "cpu" else DEVICE_PROBE
