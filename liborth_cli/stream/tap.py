"""Watch every use of a weight matrix, whatever module it happens in, without touching the model's code.

A hook on `nn.Linear` misses the experts of a mixture and every router, which call `F.linear` on a parameter. A function mode
sees all of them: the weight's address says which matrix it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from liborth_cli.stream.names import Piece

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
