"""`interpolate` for bf16, fp32 and fp64 bits in NumPy: the same bits as the torch op, without importing torch.

Importing torch takes longer than blending a gigabyte (docs/log.md), and this is all that `excise` computes. It goes block by
block so that everything stays in the second-level cache: the third is shared with whoever else computes on the machine.
"""

from __future__ import annotations

import numpy as np

NATIVE = {"F32": np.float32, "F64": np.float64}
BF16_MAX = np.uint32(0x7F7F0000).view(np.float32)
SUPPORTED = ("BF16", *NATIVE)
BLOCK = 1 << 17
"""Elements blended at a time: half a megabyte each of float32 on the way."""


def interpolate(general: np.ndarray, finetuned: np.ndarray, beta: float, dtype: str) -> np.ndarray:
    """Compute round(W_g + β·(W_f − W_g)), saturating.

    Args:
        general: bits of W_g, uint8, (n·width,).
        finetuned: bits of W_f, uint8, same length.
        beta: how much of the memory part to add.
        dtype: "BF16" (arithmetic in float32), "F32" or "F64" (in float64).

    Returns:
        Bits of the result, uint8, same length.
    """
    blend, kind = (_blend_bf16, np.uint16) if dtype == "BF16" else (_blend_native, NATIVE[dtype])
    result = np.empty_like(general)
    w_g, w_f, out = (bits.view(kind) for bits in (general, finetuned, result))
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, len(out), BLOCK):
            block = slice(first, first + BLOCK)
            blend(w_g[block], w_f[block], out[block], beta)
    return result


def _blend_bf16(general: np.ndarray, finetuned: np.ndarray, result: np.ndarray, beta: float) -> None:
    start, end = (bits.astype(np.uint32) for bits in (general, finetuned))
    start <<= 16
    end <<= 16
    w_g, w = start.view(np.float32), end.view(np.float32)
    w -= w_g
    w *= np.float32(beta)
    w += w_g
    np.clip(w, -BF16_MAX, BF16_MAX, out=w)
    # Round to nearest, ties to even, by carrying into the upper half of the bits.
    carry = np.right_shift(end, 16, out=start)
    carry &= 1
    carry += 0x7FFF
    carry += end
    carry >>= 16
    np.copyto(result, carry, casting="unsafe")


def _blend_native(general: np.ndarray, finetuned: np.ndarray, result: np.ndarray, beta: float) -> None:
    w_g = general.astype(np.float64)
    w = finetuned - w_g
    w *= beta
    w += w_g
    limit = float(np.finfo(general.dtype).max)
    np.copyto(result, np.clip(w, -limit, limit, out=w), casting="unsafe")
