"""The Triton kernel of `add_covariance` and `add_update_gram`: total += w·S Sᵀ, upper triangle only (BLAS SYRK).

Why a kernel: torch has no SYRK on a GPU. Strips of ordinary products do 9/16 of the full product; this does 1/2. It reads bf16
and fp16 as they are (every product of two is exact in float32), where torch makes a float32 copy and multiplies that on the
ordinary cores. S may be the difference of two matrices, formed tile by tile and never stored.

Each output tile is the work of one program that walks the long side in order: no atomics, no sums over programs, no tuning at
run time, so the same input gives the same bits. Sums are two-level: `CHUNK` columns at a time, then the chunks, which keeps
the error of 28,672 additions that of a few dozen (blocked summation; Higham, Accuracy and Stability, §4.2).
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton's types describe the function, and not how a kernel is launched.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liborth_kernels.dispatch import interpreted, on
from liborth_kernels.tiles import tiles

BLOCK = 128
"""Rows and columns of an output tile."""
DEPTH = {1: 64, 0: 32}
"""Columns of S read at a time: two-byte tiles, and float32 ones (which are twice as large, and two at a time)."""
CHUNK = 1024
"""Columns of S after which the running sum is set aside; a multiple of every depth."""
WARPS = {1: 4, 0: 8}
"""Of a program: for two-byte tiles, and float32 ones."""


@triton.jit
def _tile(new, old, rows, along, size, inner, steps, PAIR: tl.constexpr, WIDEN: tl.constexpr, EVEN: tl.constexpr):
    """Load S[rows, along], zero outside; steps: strides of `new` and `old` along size and inner."""
    here = new + rows.to(tl.int64)[:, None] * steps[0] + along.to(tl.int64)[None, :] * steps[1]
    there = old + rows.to(tl.int64)[:, None] * steps[2] + along.to(tl.int64)[None, :] * steps[3]
    inside = (rows[:, None] < size) & (along[None, :] < inner)
    values = tl.load(here) if EVEN else tl.load(here, mask=inside, other=0.0)
    if PAIR:
        if EVEN:
            values = values.to(tl.float32) - tl.load(there).to(tl.float32)
        else:
            values = values.to(tl.float32) - tl.load(there, mask=inside, other=0.0).to(tl.float32)
    elif WIDEN:
        values = values.to(tl.float32)
    return values


@triton.jit
def _syrk(
    total, new, old, order, size, inner, row_step, column_step, old_row_step, old_column_step, total_step, weight,
    PAIR: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add one tile of w·S Sᵀ to `total`."""
    tile = tl.program_id(0)
    rows = tl.load(order + 2 * tile) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.load(order + 2 * tile + 1) * BLOCK + tl.arange(0, BLOCK)
    steps = (row_step, column_step, old_row_step, old_column_step)
    sums = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for chunk in range(0, inner, CHUNK):
        part = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for start in range(chunk, min(chunk + CHUNK, inner), DEPTH):
            along = start + tl.arange(0, DEPTH)
            left = _tile(new, old, rows, along, size, inner, steps, PAIR, WIDEN, EVEN)
            right = _tile(new, old, columns, along, size, inner, steps, PAIR, WIDEN, EVEN)
            part = tl.dot(left, tl.trans(right), part, input_precision=PRECISION)
        sums += part
    place = total + rows.to(tl.int64)[:, None] * total_step + columns[None, :]
    upper = (rows[:, None] <= columns[None, :]) & (columns[None, :] < size)
    tl.store(place, tl.load(place, mask=upper, other=0.0) + weight * sums, mask=upper)


def syrk(total: torch.Tensor, new: torch.Tensor, old: torch.Tensor | None, weight: float, precision: str) -> None:
    """Add weight · S Sᵀ to the upper triangle of `total`, in place; nothing else of it is written.

    Args:
        total: running sum, (size, size), float32, rows contiguous.
        new: S, or what S is the difference of: (size, inner), bf16, fp16 or fp32, any strides.
        old: subtracted from `new` in float32, same shape; or None.
        weight: factor on the product.
        precision: of products of float32 tiles (`dispatch.Kernel`).
    """
    size, inner = new.shape
    if not size or not inner:
        return
    count = triton.cdiv(size, BLOCK)
    order = tiles(count, count, total.device, upper=True)
    narrow = old is None and new.element_size() == 2
    other = new if old is None else old
    with on(total.device):
        _syrk[(len(order),)](
            total, new, other, order, size, inner, *new.stride(), *other.stride(), total.stride(0), weight,
            PAIR=old is not None, WIDEN=interpreted(), PRECISION="ieee" if narrow or interpreted() else precision,
            EVEN=inner % DEPTH[narrow] == 0 and size % BLOCK == 0, BLOCK=BLOCK, DEPTH=DEPTH[narrow], CHUNK=CHUNK,
            num_warps=WARPS[narrow], num_stages=3,
        )  # fmt: skip
