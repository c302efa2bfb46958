"""A weight that moves within few directions: W + U C Vᵀ at C = 0, whose products with inputs take U, C and V one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils._pytree import tree_map

Bases = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Parameter → U (matrices, d_out, k) and V (matrices, d_in, k), orthonormal columns."""


class Thin(torch.Tensor):
    """What stands in for a weight, (d_out, d_in), or a stack of them; wherever it is no weight of a plain product, W + U C Vᵀ.

    Attributes:
        core: C, (matrices, k, k).
    """

    core: torch.Tensor
    _weight: torch.Tensor
    _basis: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, weight: torch.Tensor, basis: tuple[torch.Tensor, torch.Tensor]) -> Thin:
        """Let a weight move within a basis; the core is a leaf that asks for its gradient."""
        u, v = basis
        found = weight.detach().as_subclass(cls)
        found._weight, found._basis = weight.detach(), basis
        found.core = torch.zeros(len(u), u.shape[2], v.shape[2], dtype=weight.dtype, device=weight.device, requires_grad=True)
        return found

    @cached_property
    def whole(self) -> torch.Tensor:
        """W + U C Vᵀ, shaped as W."""
        u, v = self._basis
        return self._weight + (u @ self.core @ v.mT).view_as(self._weight)

    def times(self, inputs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return inputs (…, d_in) · (W + U C Vᵀ)ᵀ, without forming U C Vᵀ; W is one matrix."""
        (u,), (v,) = self._basis
        return F.linear(inputs, self._weight, bias) + F.linear(F.linear(inputs @ v, self.core[0]), u)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what is asked with W + U C Vᵀ."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear and len(args) > 1 and isinstance(args[1], Thin) and args[1].dim() == 2:
                return args[1].times(args[0], *args[2:], **(kwargs or {}))
            given, named = (tree_map(lambda one: one.whole if isinstance(one, Thin) else one, g) for g in (args, kwargs or {}))
            return func(*given, **named)
