"""The Triton kernel of `update_sketch`: U·X with U = W_f − W_r formed tile by tile and never stored.

Why a kernel: with up to a hundred columns the work is limited by memory. From two bf16 weights torch moves 12 bytes an element
(read both, write U in float32, read it again), this moves 4.

That limit is only in sight when the product costs nothing: on the ordinary cores 80 columns take three times as long as the
loads, padded to 128 five times. So X is cut once into two bf16 parts, and every tile of U likewise in registers, and the three
products that matter are tensor cores'. Columns come in two tiles, 64 + 16 for 80.

A program owns some rows and all columns of X that fit, and walks U's columns in order, in two-level sums (`syrk_triton`).
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton's types describe the function, and not how a kernel is launched.)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from liborth_kernels.dispatch import interpreted, on


class Tile(NamedTuple):
    """How much a program works on: rows of U, columns of U read at a time, warps, tiles on their way."""

    rows: int = 64
    depth: int = 32
    warps: int = 4
    stages: int = 3


TILE = Tile()
CHUNK = 256
"""Columns of U after which the running sum is set aside: tensor cores cut it off at every step."""
WIDEST = 128
"""Columns of X that a program works on; for more, U is read again."""
PARTS = 2
"""bf16 numbers that stand for a float32 one: with two |u||x| is met to 2⁻¹⁶. A third costs a third more and was no more exact
on an H200: what tensor cores cut off their sums is more than it adds."""


@triton.jit
def _sketch(
    out, new, old, x, m, n, k, new_row, new_column, old_row, old_column, x_part, x_row,
    PARTS: tl.constexpr, WIDEN: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write ROWS x (LEFT + RIGHT) of U·X."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * (LEFT + RIGHT)
    left = tl.arange(0, LEFT)[None, :] + first
    right = tl.arange(0, RIGHT if RIGHT else 16)[None, :] + first + LEFT
    left_sums = tl.zeros((ROWS, LEFT), dtype=tl.float32)
    right_sums = tl.zeros((ROWS, RIGHT if RIGHT else 16), dtype=tl.float32)
    for chunk in range(0, n, CHUNK):
        left_part = tl.zeros((ROWS, LEFT), dtype=tl.float32)
        right_part = tl.zeros((ROWS, RIGHT if RIGHT else 16), dtype=tl.float32)
        for start in range(chunk, min(chunk + CHUNK, n), DEPTH):
            along = (start + tl.arange(0, DEPTH)).to(tl.int64)
            here = new + rows.to(tl.int64)[:, None] * new_row + along[None, :] * new_column
            there = old + rows.to(tl.int64)[:, None] * old_row + along[None, :] * old_column
            if EVEN:
                u = tl.load(here).to(tl.float32) - tl.load(there).to(tl.float32)
            else:
                inside = (rows[:, None] < m) & (along[None, :] < n)
                u = tl.load(here, mask=inside, other=0.0).to(tl.float32)
                u -= tl.load(there, mask=inside, other=0.0).to(tl.float32)
            # X's rows are padded with zeros to whole tiles.
            place = x + along[:, None] * x_row
            for j in tl.static_range(PARTS):
                rest = u
                left_x = tl.load(place + j * x_part + left)
                if RIGHT:
                    right_x = tl.load(place + j * x_part + right)
                for _ in tl.static_range(PARTS - j):
                    part = rest.to(tl.bfloat16)
                    rest -= part.to(tl.float32)
                    if WIDEN:
                        left_part = tl.dot(part.to(tl.float32), left_x.to(tl.float32), left_part, input_precision="ieee")
                    else:
                        left_part = tl.dot(part, left_x, left_part)
                    if RIGHT and WIDEN:
                        right_part = tl.dot(part.to(tl.float32), right_x.to(tl.float32), right_part, input_precision="ieee")
                    elif RIGHT:
                        right_part = tl.dot(part, right_x, right_part)
        left_sums += left_part
        right_sums += right_part
    wide = rows.to(tl.int64)[:, None] * k
    tl.store(out + wide + left, left_sums, mask=(rows[:, None] < m) & (left < k))
    if RIGHT:
        tl.store(out + wide + right, right_sums, mask=(rows[:, None] < m) & (right < k))


def sketch(new: torch.Tensor, old: torch.Tensor, x: torch.Tensor, parts: int = PARTS, tile: Tile | None = None) -> torch.Tensor:
    """Return (new − old)·x.

    Args:
        new: W_f, (m, n), bf16, fp16 or fp32, any strides.
        old: W_r, same shape.
        x: X, (n, k), float32, any strides.
        parts: bf16 numbers that stand for a float32 one.
        tile: how much a program works on; None for `TILE`.

    Returns:
        (m, k), float32.
    """
    tile = tile or TILE
    (m, n), k = new.shape, x.shape[1]
    out = torch.empty(m, k, dtype=torch.float32, device=new.device)
    if not out.numel():
        return out
    left, right = _columns(min(k, WIDEST))
    groups = triton.cdiv(k, left + right)
    cut = _cut(x, parts, triton.cdiv(n, tile.depth) * tile.depth, groups * (left + right))
    with on(new.device):
        _sketch[(triton.cdiv(m, tile.rows), groups)](
            out, new, old, cut, m, n, k, *new.stride(), *old.stride(), cut.stride(0), cut.stride(1),
            PARTS=parts, WIDEN=interpreted(), EVEN=n % tile.depth == 0 and m % tile.rows == 0,
            ROWS=tile.rows, LEFT=left, RIGHT=right, DEPTH=tile.depth, CHUNK=CHUNK, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def _columns(k: int) -> tuple[int, int]:
    """Cover k columns with one tile or two, each a power of two from 16 on; the second may be missing."""
    widths = [16, 32, 64, 128]
    pairs = [(left, right) for left in widths for right in (0, *widths) if right < left and left + right <= WIDEST]
    return min((pair for pair in pairs if sum(pair) >= k), key=lambda pair: (sum(pair), pair[1]))


def _cut(x: torch.Tensor, parts: int, rows: int, columns: int) -> torch.Tensor:
    """Return X as a sum of bf16 matrices, (parts, rows, columns), with zeros beyond its own."""
    out = torch.zeros(parts, rows, columns, dtype=torch.bfloat16, device=x.device)
    left = x
    for part in out:
        mine = part[: x.shape[0], : x.shape[1]]
        mine.copy_(left)
        left = left - mine.to(x.dtype)
    return out
