"""Bytes (numpy) to numbers (torch) and back, without copying. The only place where the two meet."""

from __future__ import annotations

import numpy as np
import torch

from liborth_cli.checkpoint.dtypes import DTYPES


def as_tensor(data: np.ndarray, dtype: str) -> torch.Tensor:
    """View bytes (uint8, 1-D) as a flat tensor of a safetensors dtype that torch knows."""
    return torch.from_numpy(data).view(torch_dtype(dtype))


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """View a tensor's storage as bytes (uint8, 1-D); copies only what lies on another device or is strided."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def torch_dtype(dtype: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype; KeyError or AttributeError where torch has none."""
    return getattr(torch, DTYPES[dtype].torch or dtype)
