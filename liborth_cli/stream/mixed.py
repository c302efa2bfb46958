"""bfloat16 where it pays: products with weights. What lies between them, the residual stream above all, stays float32.

A model that is bfloat16 throughout rounds its hidden state after every block, forward and back; that was most of the error
of its gradients (docs/log.md). The products are most of the time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from liborth_cli.stream.tap import MATMULS

PRODUCTS = MATMULS | {F.linear, torch.addmm, torch.mm, torch.bmm}
NORMS = frozenset({F.layer_norm, F.rms_norm, F.group_norm})
"""Kernels that take their weight in the dtype of the hidden state only."""


class WeightsInHalf(TorchFunctionMode):
    """While active, products with bfloat16 weights are bfloat16 and give float32; everything else is float32."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run a function with its arguments in the right dtype."""
        kwargs = kwargs or {}
        if func in PRODUCTS and any(_is_half(value) for value in (*args, *kwargs.values())):
            args, kwargs = _in(torch.bfloat16, args, kwargs)
            return func(*args, **kwargs).float()
        if func in NORMS:
            args, kwargs = _in(torch.float32, args, kwargs)
        result = func(*args, **kwargs)
        return result.float() if func is F.embedding and _is_half(result) else result


def arithmetic(dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return a context in which a model whose weights have this dtype runs."""
    return WeightsInHalf() if dtype == torch.bfloat16 else nullcontext()


def between(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of hidden states of a model whose weights have this dtype."""
    return torch.promote_types(dtype, torch.float32)


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


def _in(dtype: torch.dtype, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Cast every floating tensor among arguments."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}
