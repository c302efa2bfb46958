"""The Triton kernel of `update_sketch`: U·X with U = W_f − W_r formed tile by tile and never stored.

Why a kernel: with up to a hundred columns the work is limited by memory. From two bf16 weights torch moves 12 bytes an element
(read both, write U in float32, read it again), this moves 4.

A program owns some rows and all columns of X that fit, and walks U's columns in order, in two-level sums (`syrk_triton`).
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton's types describe the function, and not how a kernel is launched.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liborth_kernels.dispatch import interpreted, on

ROWS = 64
"""Rows of U that a program works on."""
DEPTH = 32
"""Columns of U read at a time."""
CHUNK = 1024
"""Columns of U after which the running sum is set aside."""
WIDEST = 128
"""Columns of X that a program works on; for more, U is read again."""
WARPS = 8
"""Of a program; with four the sums do not fit the registers (tests/kernels/test_compile.py)."""


@triton.jit
def _sketch(
    out, new, old, x, m, n, k, new_row, new_column, old_row, old_column, x_row, x_column,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write ROWS x COLUMNS of U·X."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide_rows, wide_columns = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for chunk in range(0, n, CHUNK):
        part = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(chunk, min(chunk + CHUNK, n), DEPTH):
            along = start + tl.arange(0, DEPTH)
            wide = along.to(tl.int64)
            inside = (rows[:, None] < m) & (along[None, :] < n)
            u = tl.load(new + wide_rows * new_row + wide[None, :] * new_column, mask=inside, other=0.0).to(tl.float32)
            u -= tl.load(old + wide_rows * old_row + wide[None, :] * old_column, mask=inside, other=0.0).to(tl.float32)
            inside = (along[:, None] < n) & (columns[None, :] < k)
            right = tl.load(x + wide[:, None] * x_row + wide_columns * x_column, mask=inside, other=0.0)
            part = tl.dot(u, right, part, input_precision=PRECISION)
        sums += part
    tl.store(out + wide_rows * k + wide_columns, sums, mask=(rows[:, None] < m) & (columns[None, :] < k))


def sketch(new: torch.Tensor, old: torch.Tensor, x: torch.Tensor, precision: str) -> torch.Tensor:
    """Return (new − old)·x.

    Args:
        new: W_f, (m, n), bf16, fp16 or fp32, any strides.
        old: W_r, same shape.
        x: X, (n, k), float32, any strides.
        precision: of the products (`dispatch.Kernel`).

    Returns:
        (m, k), float32.
    """
    (m, n), k = new.shape, x.shape[1]
    out = torch.empty(m, k, dtype=torch.float32, device=new.device)
    if not out.numel():
        return out
    columns = min(max(triton.next_power_of_2(k), 16), WIDEST)
    with on(new.device):
        _sketch[(triton.cdiv(m, ROWS), triton.cdiv(k, columns))](
            out, new, old, x, m, n, k, *new.stride(), *old.stride(), *x.stride(),
            PRECISION="ieee" if interpreted() else precision, ROWS=ROWS, COLUMNS=columns, DEPTH=DEPTH, CHUNK=CHUNK,
            num_warps=WARPS, num_stages=3,
        )  # fmt: skip
    return out
