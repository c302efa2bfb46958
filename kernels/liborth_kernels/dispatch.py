"""Which code computes an op: torch's, which specifies it, or the Triton kernel beside it.

The process is told once what the user asked for (`use`); every op then asks `kernel_for`. Three rules:

- "auto" takes a kernel only where `KERNELS` names a measurement in which it beat torch, on a GPU, with Triton installed.
  Where Triton is missing it falls back to torch, and the choice says so.
- "triton" takes every kernel there is, or is refused. Products in float64 stay torch's: cuBLAS leaves nothing to gain.
- "torch" takes none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Kernel:
    """What is known of one op's Triton kernel.

    Attributes:
        precision: how a product of two float32 tiles is made of what tensor cores multiply; "" where it multiplies no tiles.
            "bf16x3" takes each number as two bf16 and makes three products: within 2⁻¹⁶ of |x||y|. "ieee", float32 on the
            ordinary cores, lost to torch; plain "tf32" (2⁻¹¹) is used nowhere. Tensor cores cut their sums off: a certificate
            that rests on such a product measures what was lost (linalg/truncated.py).
        proven: the measurement of docs/kernels.md in which it beat torch; "" leaves it out of "auto".
    """

    precision: str = ""
    proven: str = ""


KERNELS = {
    "add_covariance": Kernel("bf16x3", "2.1 times torch in float32, 9 to 11 times in bf16, H100, Triton 3.6"),
    "add_second_moments": Kernel("bf16x3", "1.3 to 1.5 times torch, H100, Triton 3.6"),
    "filter_coefficients": Kernel(proven="3.3 to 4.0 times torch, H100, Triton 3.6"),
    "rebuild_delta": Kernel(proven="2.3 to 4.5 times torch, H100, Triton 3.6"),
    "update_gram": Kernel("bf16x3", "2.1 to 2.2 times torch, H100, Triton 3.6"),
    "update_sketch": Kernel("bf16x3", "6.3 times torch, H200, Triton 3.6"),
}
"""Every op that has a kernel. A new kernel is the op's file, a `*_triton.py` beside it, and its line here."""

NARROW = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that kernels read. What is wider, or float8, is torch's."""

OLDEST = (3, 6)
"""Triton's version from which all kernels are known to compile and to agree with torch, on an H100."""


class KernelsUnavailable(RuntimeError):
    """Triton kernels were asked for and cannot run here; the message is one line for the user."""


@dataclass(frozen=True)
class Choice:
    """What was decided for one process.

    Attributes:
        ops: op → "triton" or "torch".
        note: what the user should hear, or "".
    """

    ops: dict[str, str]
    note: str = ""


def choose(asked: str, device: torch.device) -> Choice:
    """Decide for every op who computes it on a device.

    Args:
        asked: "auto", "triton" or "torch".
        device: where the tensors are.

    Returns:
        The decision.

    Raises:
        KernelsUnavailable: when "triton" was asked for and cannot run.
        ValueError: when `asked` is none of the three.
    """
    if asked not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels {asked!r}: auto, triton or torch")
    wanted = [op for op, kernel in KERNELS.items() if asked == "triton" or (asked == "auto" and kernel.proven)]
    if not wanted or (asked == "auto" and device.type != "cuda"):
        return Choice(dict.fromkeys(KERNELS, "torch"))
    missing = _missing(device)
    if missing and asked == "triton":
        raise KernelsUnavailable(f"Triton kernels {missing}")
    if missing:
        return Choice(dict.fromkeys(KERNELS, "torch"), f"torch computes everything: Triton kernels {missing}")
    return Choice({op: "triton" if op in wanted else "torch" for op in KERNELS})


_one_at_a_time = threading.Lock()
_choice = Choice(dict.fromkeys(KERNELS, "torch"))


def use(asked: str, device: torch.device) -> Choice:
    """Decide for this process (`choose`), and return the decision."""
    global _choice  # noqa: PLW0603  one process, one choice: an argument through every caller of every op would say the same
    _choice = choose(asked, device)
    return _choice


def kernel_for(op: str, *tensors: torch.Tensor) -> bool:
    """Tell whether an op's kernel computes on these tensors: it was chosen, and they lie where it can reach them."""
    return _choice.ops[op] == "triton" and all(t.is_cuda or interpreted() for t in tensors)


def interpreted() -> bool:
    """Tell whether Triton was told to interpret kernels on the CPU, which is for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Launch a kernel in this context.

    Triton launches on the current GPU and not where its arguments are. One at a time: the first launch compiles, and the
    interpreter replaces the functions of `triton.language` while a kernel runs. A GPU runs what was launched by itself.
    """
    with _one_at_a_time, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def _missing(device: torch.device) -> str:
    """Say what Triton lacks to run on a device, or return ""."""
    try:
        import triton
    except ImportError:
        return "need the triton package, and it is not installed"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"need triton {OLDEST[0]}.{OLDEST[1]} or later, not {triton.__version__}"
    if device.type != "cuda" and not interpreted():
        return "need an NVIDIA GPU (--device cuda); this run computes on the CPU"
    return ""
