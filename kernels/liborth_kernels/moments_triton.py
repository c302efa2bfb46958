"""The Triton kernel of `add_second_moments`: total += w·(G∘G)ᵀ(A∘A).

Why a kernel: torch stores both squares in float32 and multiplies them on the ordinary cores. Here they are made in registers
and the product is made of bf16 products on the tensor cores (`dispatch.Kernel`). That is safe where it would not be for a
covariance: every term is non-negative, so nothing cancels and the error of an entry stays relative to that entry, about 2⁻¹⁶.

Each output tile is one program's work, tokens in order, sums in two levels (`syrk_triton`): the same bits every time.
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
DEPTH = 32
"""Tokens read at a time."""
CHUNK = 1024
"""Tokens after which the running sum is set aside."""


@triton.jit
def _squares(values, tokens, places, count, width, token_step, place_step):
    """Load values[tokens, places], zero outside, and square it in float32."""
    inside = (tokens[:, None] < count) & (places[None, :] < width)
    where = tokens.to(tl.int64)[:, None] * token_step + places.to(tl.int64)[None, :] * place_step
    x = tl.load(values + where, mask=inside, other=0.0).to(tl.float32)
    return x * x


@triton.jit
def _second_moments(
    total, gradients, inputs, order, count, d_out, d_in, g_token, g_place, a_token, a_place, total_step, weight,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add one tile of w·(G∘G)ᵀ(A∘A) to `total`."""
    tile = tl.program_id(0)
    rows = tl.load(order + 2 * tile) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.load(order + 2 * tile + 1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for chunk in range(0, count, CHUNK):
        part = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for start in range(chunk, min(chunk + CHUNK, count), DEPTH):
            tokens = start + tl.arange(0, DEPTH)
            g = _squares(gradients, tokens, rows, count, d_out, g_token, g_place)
            a = _squares(inputs, tokens, columns, count, d_in, a_token, a_place)
            part = tl.dot(tl.trans(g), a, part, input_precision=PRECISION)
        sums += part
    place = total + rows.to(tl.int64)[:, None] * total_step + columns[None, :]
    inside = (rows[:, None] < d_out) & (columns[None, :] < d_in)
    tl.store(place, tl.load(place, mask=inside, other=0.0) + weight * sums, mask=inside)


def second_moments(total: torch.Tensor, gradients: torch.Tensor, inputs: torch.Tensor, weight: float, precision: str) -> None:
    """Add weight · (G∘G)ᵀ(A∘A) to `total`, in place.

    Args:
        total: running sum, (d_out, d_in), float32, rows contiguous.
        gradients: g of every token, (n, d_out), bf16, fp16 or fp32, any strides.
        inputs: a of every token, (n, d_in), likewise.
        weight: how often every token counts.
        precision: of the products (`dispatch.Kernel`).
    """
    count, d_out = gradients.shape
    d_in = inputs.shape[1]
    if not count or not total.numel():
        return
    order = tiles(triton.cdiv(d_out, BLOCK), triton.cdiv(d_in, BLOCK), total.device)
    with on(total.device):
        _second_moments[(len(order),)](
            total, gradients, inputs, order, count, d_out, d_in, *gradients.stride(), *inputs.stride(), total.stride(0), weight,
            PRECISION="ieee" if interpreted() else precision, BLOCK=BLOCK, DEPTH=DEPTH, CHUNK=CHUNK, num_warps=8, num_stages=3,
        )  # fmt: skip
