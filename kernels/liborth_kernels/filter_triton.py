"""The Triton kernel of `filter_coefficients`: read C and ρ, write C·λρ/(1 + λρ), once.

Filter and rebuild cannot be one kernel. Between them stand two products with whole bases (d_out² d_in + d_out d_in²
multiplications in float64), which need every filtered coefficient before the first element of the weight is known; cuBLAS does
them as well as they can be done. What can be fused is what touches each element once: the filter before the products (here;
torch makes four temporaries of the size of the matrix, 96 bytes an element against 24), and after them the sum with the
reference, the rounding and the XOR (`rebuild_triton`).
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


@triton.jit
def _filter(out, coefficients, ratios, size, strength, HARD: tl.constexpr, BLOCK: tl.constexpr):
    """Filter BLOCK coefficients."""
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = here < size
    c = tl.load(coefficients + here, mask=inside, other=0.0)
    pull = tl.load(ratios + here, mask=inside, other=0.0) * tl.load(strength)
    kept = tl.where(pull >= 1, c, 0.0) if HARD else c * (pull / (1 + pull))
    tl.store(out + here, kept, mask=inside)


def filtered(coefficients: torch.Tensor, ratios: torch.Tensor, strength: float, hard: bool) -> torch.Tensor:
    """Return C·λρ/(1 + λρ), or C where λρ ≥ 1 and 0 elsewhere.

    Args:
        coefficients: C, float64, any shape.
        ratios: ρ, float64, same shape.
        strength: λ.
        hard: cut in place of the filter.
    """
    c, rho = coefficients.contiguous(), ratios.contiguous()
    out = torch.empty_like(c)
    # A Python number would reach the kernel as float32.
    factor = torch.tensor([strength], dtype=torch.float64, device=c.device)
    if c.numel():
        with on(c.device):
            _filter[(triton.cdiv(c.numel(), BLOCK),)](out, c, rho, c.numel(), factor, HARD=hard, BLOCK=BLOCK)
    return out
