"""What each safetensors dtype is, and how its bytes (numpy) become numbers (torch) and back, without copying.

torch is imported where it is needed: commands that move bytes only start without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """One row of the safetensors dtype table.

    Attributes:
        bits: width of one element.
        torch: name of the torch dtype, or None where torch has none.
        editable: True for plain floating point, which arithmetic can be done on.
        bit_view: the integer dtype (safetensors name) that holds the same bits.
    """

    bits: int
    torch: str | None
    editable: bool = False
    bit_view: str = "U8"


DTYPES = {
    "BOOL": DType(8, "bool"),
    "F4": DType(4, None),
    "F6_E2M3": DType(6, None),
    "F6_E3M2": DType(6, None),
    "U8": DType(8, "uint8"),
    "I8": DType(8, "int8"),
    "F8_E5M2": DType(8, "float8_e5m2", True, "I8"),
    "F8_E4M3": DType(8, "float8_e4m3fn", True, "I8"),
    "F8_E8M0": DType(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": DType(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": DType(8, "float8_e5m2fnuz"),
    "I16": DType(16, "int16"),
    "U16": DType(16, "uint16"),
    "F16": DType(16, "float16", True, "I16"),
    "BF16": DType(16, "bfloat16", True, "I16"),
    "I32": DType(32, "int32"),
    "U32": DType(32, "uint32"),
    "F32": DType(32, "float32", True, "I32"),
    "C64": DType(64, "complex64"),
    "F64": DType(64, "float64", True, "I64"),
    "I64": DType(64, "int64"),
    "U64": DType(64, "uint64"),
}
"""safetensors name → description, in the order in which safetensors lays tensors out (last first)."""

_NAMES = {known.torch: name for name, known in DTYPES.items() if known.torch is not None}
WIDE = frozenset({"F32", "F64"})
"""Dtypes whose arithmetic is done in float64; all narrower ones in float32."""


def torch_dtype(dtype: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype; KeyError or AttributeError where torch has none."""
    import torch

    return getattr(torch, DTYPES[dtype].torch or dtype)


def name_of(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype; KeyError where there is none."""
    return _NAMES[str(dtype).removeprefix("torch.")]


def as_tensor(data: np.ndarray, dtype: str) -> torch.Tensor:
    """View bytes (uint8, 1-D) as a flat tensor of a safetensors dtype that torch knows."""
    import torch

    return torch.from_numpy(data).view(torch_dtype(dtype))


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """View a tensor's storage as bytes (uint8, 1-D); copies only what lies on another device or is strided."""
    import torch

    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
