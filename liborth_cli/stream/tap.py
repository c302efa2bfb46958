"""Stand between a model and its products with weights: watch every one of them, or do them in bfloat16.

A hook on `nn.Linear` misses the experts of a mixture and every router, which call `F.linear` on a parameter. A function mode
sees all of them: the weight's address says which matrix it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from liborth_cli.stream.build import Piece

MATMULS = frozenset({torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__})


@dataclass(frozen=True)
class Site:
    """One weight matrix in memory.

    Attributes:
        parameter: name of the parameter; the head's own name when it is tied to the embedding.
        matrix: which matrix of a three-dimensional parameter, or None.
        d_out: outputs.
        d_in: inputs.
        transposed: whether memory and file hold it as (d_in, d_out).
        pieces: the stored tensors it is made of, with their first output each.
        kind: "linear", "embedding" or "head".
    """

    parameter: str
    matrix: int | None
    d_out: int
    d_in: int
    transposed: bool
    pieces: tuple[Piece, ...]
    kind: str = "linear"

    def outputs(self, piece: Piece) -> slice:
        """Return which of the outputs a stored tensor makes."""
        rows = self.d_out if self.matrix is None else piece.tensor.shape[-2]
        return slice(piece.row, piece.row + rows)


class Observer(Protocol):
    """Learns what goes into and comes out of each weight matrix."""

    def linear(self, site: Site, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Take note of outputs = inputs · Wᵀ; `inputs` (…, d_in), `outputs` (…, d_out) and part of a graph."""
        ...

    def embedding(self, site: Site, ids: torch.Tensor, outputs: torch.Tensor) -> None:
        """Take note of a table look-up; `ids` (…), `outputs` (…, d_out)."""
        ...


class Tap(TorchFunctionMode):
    """While active, tells `observer` of every use of the matrices in `sites`."""

    def __init__(self, sites: Mapping[tuple[int, str], Site], observer: Observer) -> None:
        """Watch the matrices at these addresses.

        Args:
            sites: (address of the first element, "linear" or "embedding") → what lies there.
            observer: who is told.
        """
        super().__init__()
        self._sites, self._observer = sites, observer

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the function, then tell."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.linear:
            self._linear(args, kwargs, ("input", 0), ("weight", 1), result)
        elif func is torch.addmm:
            self._linear(args, kwargs, ("mat1", 1), ("mat2", 2), result)
        elif func in MATMULS:
            self._linear(args, kwargs, ("input", 0), ("other", 1), result)
        elif func is F.embedding:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            site = self._sites.get((weight.data_ptr(), "embedding"))
            if site is not None:
                if torch.is_grad_enabled() and not result.requires_grad:
                    result.requires_grad_()
                self._observer.embedding(site, args[0] if args else kwargs["input"], result)
        return result

    def _linear(self, args: tuple, kwargs: dict, x: tuple[str, int], w: tuple[str, int], result: torch.Tensor) -> None:
        inputs, weight = (args[place] if len(args) > place else kwargs[name] for name, place in (x, w))
        site = self._sites.get((weight.data_ptr(), "linear"))
        if site is not None and weight.dim() == 2 and result.shape[-1] == site.d_out:
            self._observer.linear(site, inputs, result)


PRODUCTS = MATMULS | {F.linear, torch.addmm, torch.mm, torch.bmm}
NORMS = frozenset({F.layer_norm, F.rms_norm, F.group_norm})
"""Kernels that take their weight in the dtype of the hidden state only."""


class WeightsInHalf(TorchFunctionMode):
    """While active, products with bfloat16 weights are bfloat16 and give float32; everything else is float32."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run a function with its arguments in the right dtype."""
        kwargs = kwargs or {}
        if func in PRODUCTS and any(_is_half(value) for value in (*args, *kwargs.values())):
            return _in_half(func, args, kwargs)
        if func in NORMS:
            args, kwargs = _in(torch.float32, args, kwargs)
        result = func(*args, **kwargs)
        return result.float() if func is F.embedding and _is_half(result) else result


class NarrowProducts(TorchFunctionMode):
    """While active, products with the matrices in `sites` are bfloat16 and give float32, whatever the matrices are kept in.

    For models that train: their weights are float32, and are cast for each product.
    """

    def __init__(self, sites: Mapping[tuple[int, str], Site]) -> None:
        """Take the matrices at these addresses."""
        super().__init__()
        self._sites = sites

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run a function with its arguments in the right dtype."""
        kwargs = kwargs or {}
        if func in PRODUCTS and any(self._holds(value) for value in (*args, *kwargs.values())):
            return _in_half(func, args, kwargs)
        return func(*args, **kwargs)

    def _holds(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dim() == 2 and (value.data_ptr(), "linear") in self._sites


@contextmanager
def arithmetic(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Run a model whose weights have this dtype: what a row's gradients are must not depend on the rows beside it.

    On a GPU attention is made of plain products: its memory-efficient kernel cuts the keys up by how many rows there are, and
    adds the gradients of the pieces up in whatever order they are done.
    """
    with (
        WeightsInHalf() if dtype == torch.bfloat16 else nullcontext(),
        sdpa_kernel(SDPBackend.MATH) if device.type != "cpu" else nullcontext(),
    ):
        yield


def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of hidden states of a model whose weights have this dtype."""
    return torch.promote_types(dtype, torch.float32)


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


def _in_half(product: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """Multiply in bfloat16; the result is float32."""
    args, kwargs = _in(torch.bfloat16, args, kwargs)
    return product(*args, **kwargs).float()


def _in(dtype: torch.dtype, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Cast every floating tensor among arguments."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}
