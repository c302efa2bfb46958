"""Linear modules that do their own products on a GPU, and tell of them: nothing stands between a model and all its other calls.

The modes of `tap` see every call of torch, which is how a weight that is used outside a module is found; each time they cost
more than a small kernel. And a product in bfloat16 under them is six passes over memory: its sides are cast, what comes out is
cast back, forward and on the way back, and whoever watches casts them again. Here a tensor is cast once, for every product that
takes it and for whoever watches, and a product of bfloat16 numbers comes out in float32.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from liborth_cli.stream.tap import Observer, Site

WIDE_PRODUCTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
"""Whether torch gives a product of bfloat16 matrices in float32."""


class Uses:
    """An observer that counts how often each matrix is used."""

    def __init__(self) -> None:
        """Nothing has been used."""
        self.seen: Counter[Site] = Counter()

    def linear(self, site: Site, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Count."""
        self.seen[site] += 1

    def embedding(self, site: Site, ids: torch.Tensor, outputs: torch.Tensor) -> None:
        """Count."""
        self.seen[site] += 1


class Unseen:
    """What an observer is given for the outputs of a product: they are never looked at, and their gradient is."""

    requires_grad = True

    def __init__(self) -> None:
        """Nobody asks for the gradient yet."""
        self.hooks: list[Callable[[torch.Tensor], object]] = []

    def register_hook(self, hook: Callable[[torch.Tensor], object]) -> None:
        """Have a function called with the gradient."""
        self.hooks.append(hook)


class Direct:
    """The linear modules of one block."""

    def __init__(self, modules: Mapping[torch.nn.Linear, Site]) -> None:
        """Take modules, each with the matrix that it holds."""
        self._modules = dict(modules)
        self._cast: tuple[weakref.ref[torch.Tensor], torch.Tensor] | None = None

    @classmethod
    def of(cls, block: torch.nn.Module, sites: Mapping[tuple[int, str], Site], uses: Uses) -> Direct | None:
        """Take over a block all of whose matrices are those of linear modules, each used once; None for any other.

        Args:
            block: with its weights loaded.
            sites: the matrices by their addresses.
            uses: what the modes saw when the block was run.
        """
        found = {}
        for module in block.modules():
            wide = [value for value in module._parameters.values() if value is not None and value.dim() > 1]
            if not wide:
                continue
            site = sites.get((wide[0].data_ptr(), "linear"))
            if type(module) is not torch.nn.Linear or site is None or uses.seen[site] != 1:
                return None
            found[module] = site
        return cls(found) if found and uses.seen.total() == len(found) else None

    @contextmanager
    def telling(self, observer: Observer | None) -> Iterator[None]:
        """Run the block without any mode; an observer is told of every product."""
        for module, site in self._modules.items():
            vars(module)["forward"] = partial(self._product, module, site, observer)
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self._cast = None
            for module in self._modules:
                del module.forward

    def _product(self, module: torch.nn.Linear, site: Site, observer: Observer | None, inputs: torch.Tensor) -> torch.Tensor:
        taken = self._as(inputs, module.weight.dtype)
        outcome = None
        if observer is not None and torch.is_grad_enabled():
            outcome = Unseen()
            observer.linear(site, taken, outcome)  # type: ignore[arg-type]
        return _Product.apply(inputs, taken, module.weight, module.bias, outcome)  # type: ignore[return-value]

    def _as(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Cast a tensor, or return what it was cast to the last time."""
        if x.dtype == dtype:
            return x
        if self._cast is None or self._cast[0]() is not x:
            self._cast = weakref.ref(x), x.detach().to(dtype)
        return self._cast[1]


class _Product(torch.autograd.Function):
    """x Wᵀ + b for a W that asks for no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, taken: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, outcome: Unseen | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.outcome, ctx.shape = outcome, x.shape
        found = _times(taken.reshape(-1, taken.shape[-1]), weight.T)
        if bias is not None:
            found += bias
        return found.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        rows = gradients[0].reshape(-1, len(weight)).to(weight.dtype)
        if ctx.outcome is not None:
            for hook in ctx.outcome.hooks:
                hook(rows)
        return _times(rows, weight).view(ctx.shape), None, None, None, None


def _times(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply; bfloat16 numbers give float32."""
    if rows.dtype != torch.bfloat16:
        return rows @ matrix
    if rows.is_cuda and WIDE_PRODUCTS:
        return torch.mm(rows, matrix, out_dtype=torch.float32)
    return (rows @ matrix).float()
