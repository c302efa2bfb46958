"""What a split will cost, from headers and one short measurement."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from liborth_kernels.gram import gram

from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.pair import Item
from liborth_cli.methods import METHODS
from liborth_cli.methods.kronecker import DENSE_UP_TO
from liborth_cli.split.factors import FactorSource
from liborth_cli.split.matrix import SplitOptions

BASE_BYTES = 350_000_000
"""Resident memory of Python, torch and SciPy before any weight is read (measured, docs/benchmarks.md)."""
DISK_RATE = 1.0e9
"""Bytes a second assumed for reading and writing together; a warm cache is several times faster."""
PROBE = 768


@dataclass(frozen=True)
class Estimate:
    """Predicted cost.

    Attributes:
        disk_bytes: written at most.
        memory_bytes: resident at most.
        seconds: order of magnitude of the time.
    """

    disk_bytes: int
    memory_bytes: int
    seconds: float


def estimate(items: list[Item], options: SplitOptions, disk_bytes: int, read_bytes: int, factors: FactorSource) -> Estimate:
    """Predict disk, memory and time of a split.

    Args:
        items: the tensors whose update is decomposed.
        options: the split.
        disk_bytes: upper bound of what will be written.
        read_bytes: size of both inputs.
        factors: the factor sets.

    Returns:
        The prediction.
    """
    tokens = factors.tokens
    memory, work = 0, 0.0
    for item in items:
        matrices, rows, cols = item.grid
        width = 8 if DTYPES[item.tensor.dtype].bits == 64 else 4
        short, long = min(rows, cols), max(rows, cols)
        extra = 0
        if options.method == "svd":
            gram_width = 4 if options.amount.kind == "rank" else 8
            extra = 3 * gram_width * short * short
            work += matrices * (short * short * long + 6.0 * short**3)
        elif "retain" in METHODS[options.method].needs:
            widths = factors.widths(item.twin)
            widest = max(widths, default=0)
            # In float64: two covariances, a factorisation and a basis both ways; coordinates, scores, filter, result.
            extra = 8 * (5 * min(widest, DENSE_UP_TO) ** 2 + 3 * (widest > DENSE_UP_TO) * widest**2 + 4 * short * long)
            # Tokens: they and what is whitened of them, the kernel, its eigenvectors and their workspace, all float64.
            extra += 8 * (4 * tokens * (short + long) + 6 * tokens**2)
            # Joint bases are eigenproblems; few tokens need a Cholesky factorisation a side, solves, their own eigenproblem.
            for side in widths:
                full = tokens == 0 and factors.seen > side // 3
                work += matrices * (10.0 * min(side, DENSE_UP_TO) ** 3 if full else side**3 + tokens * side**2)
            work += matrices * 10.0 * tokens**3
        copies = 1 + (options.side == "top") + (options.method in ("magnitude", "random"))
        memory = max(memory, copies * width * rows * cols + extra)
    rate = _multiply_adds_per_second() if work else math.inf
    seconds = work / rate + (read_bytes + disk_bytes) / DISK_RATE + 2.0
    return Estimate(disk_bytes, BASE_BYTES + memory, seconds)


def _multiply_adds_per_second() -> float:
    """Time one Gram matrix; half of its products are skipped by symmetry and counted all the same."""
    u = torch.ones(PROBE, PROBE)
    gram(u)
    start = time.perf_counter()
    gram(u)
    return PROBE**3 / (time.perf_counter() - start)
