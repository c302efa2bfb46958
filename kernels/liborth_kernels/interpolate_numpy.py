"""`interpolate` for bf16, fp32 and fp64 bits in NumPy: the same bits as the torch op, without importing torch.

Importing torch takes longer than blending a gigabyte (docs/log.md), and this is all that `excise` computes.
"""

from __future__ import annotations

import numpy as np

NATIVE = {"F32": np.float32, "F64": np.float64}
BF16_MAX = np.uint32(0x7F7F0000).view(np.float32)
SUPPORTED = ("BF16", *NATIVE)


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
    if dtype == "BF16":
        start, end = _widen(general), _widen(finetuned)
        with np.errstate(over="ignore", invalid="ignore"):
            end -= start
            end *= np.float32(beta)
            end += start
        return _round_bf16(np.clip(end, -BF16_MAX, BF16_MAX, out=end)).view(np.uint8)
    kind = NATIVE[dtype]
    start = general.view(kind).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        end = finetuned.view(kind) - start
        end *= beta
        end += start
    limit = float(np.finfo(kind).max)
    return np.clip(end, -limit, limit, out=end).astype(kind).view(np.uint8)


def _widen(bits: np.ndarray) -> np.ndarray:
    wide = bits.view(np.uint16).astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _round_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bf16, ties to even, by carrying into the upper half of the bits."""
    bits = x.view(np.uint32)
    carry = bits >> 16
    carry &= 1
    carry += 0x7FFF
    carry += bits
    carry >>= 16
    return carry.astype(np.uint16)
