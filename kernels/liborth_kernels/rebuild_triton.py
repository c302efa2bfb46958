"""The Triton kernel of `rebuild_delta`: W_r + α·U_s, rounded, and its XOR with W_f, in one pass.

Why a kernel: in bf16 this reads 8 bytes an element and writes 4; torch's five operations move 40. It starts where the products
of the rebuild end (`filter_triton` says why not earlier).

It promises bits. The sum is one fused multiply-add, in float32 for bf16 and fp16 and in float64 for fp32, as torch's own on the
CPU. bf16 is rounded here, on the bits, because that is the same everywhere: hardware, compiler and interpreter.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton's types describe the function, and not how a kernel is launched.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liborth_kernels.dispatch import on

BLOCK = 1024
"""Elements of one program."""
BITS = {2: torch.int16, 4: torch.int32}


@triton.jit
def _bf16_bits(x):
    """Round float32 to the nearest bf16, ties to even, by carrying into the upper half of the bits; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.int16, bitcast=True)  # noqa: PLR0124


@triton.jit
def _rebuild(general, delta, reference, finetuned, skill, size, factors, BF16: tl.constexpr, BLOCK: tl.constexpr):
    """Rebuild BLOCK elements; general, finetuned and delta are integers, factors holds alpha and the largest finite value."""
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = here < size
    wide = factors.dtype.element_ty
    alpha, limit = tl.load(factors), tl.load(factors + 1)
    start = tl.load(reference + here, mask=inside, other=0.0).to(wide)
    step = tl.load(skill + here, mask=inside, other=0.0).to(wide)
    x = tl.fma(step, alpha + tl.zeros_like(step), start)
    x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))
    if BF16:
        bits = _bf16_bits(x)
    elif general.dtype.element_ty == tl.int16:
        bits = x.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    tl.store(general + here, bits, mask=inside)
    tl.store(delta + here, bits ^ tl.load(finetuned + here, mask=inside, other=0), mask=inside)


def rebuilt(
    reference: torch.Tensor, finetuned: torch.Tensor, skill: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W_g and bits(W_f) XOR bits(W_g).

    Args:
        reference: W_r, bf16, fp16 or fp32, any shape.
        finetuned: W_f, likewise; the result has its dtype.
        skill: U_s, float32, same shape.
        alpha: factor on the skill part.
    """
    kind = BITS[finetuned.element_size()]
    old, new, part = (t.contiguous() for t in (reference, finetuned, skill))
    general = torch.empty_like(new)
    delta = torch.empty_like(new, dtype=kind)
    wide = torch.float64 if new.dtype == torch.float32 else torch.float32
    # Python numbers would reach the kernel as float32.
    factors = torch.tensor([alpha, torch.finfo(new.dtype).max], dtype=wide, device=new.device)
    if new.numel():
        with on(new.device):
            _rebuild[(triton.cdiv(new.numel(), BLOCK),)](
                general.view(kind), delta, old, new.view(kind), part, new.numel(), factors,
                BF16=new.dtype == torch.bfloat16, BLOCK=BLOCK,
            )  # fmt: skip
    return general, delta
