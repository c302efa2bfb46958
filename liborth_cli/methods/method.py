"""The interface every method implements: a basis, a score, and which amounts it understands.

A basis turns an update U into coordinates; a score ranks the coordinates; a selection (selection.py) turns an amount into
how much of each coordinate to keep; the basis rebuilds a weight from what is kept. What is kept is the *leading part*.
Which part is memory is no property of a method: `memory_side` says "tail" (the leading part is skill) or "top".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Amount:
    """How much to keep.

    Attributes:
        kind: a key of `selection.AMOUNTS`.
        value: the number that goes with it; None where the kind needs none.
    """

    kind: str
    value: float | None = None

    def __str__(self) -> str:
        """Render as on the command line, without dashes."""
        return self.kind if self.value is None else f"{self.kind} {self.value:g}"


@dataclass
class Layer:
    """One matrix, as a method sees it.

    Attributes:
        name: where it comes from, for messages.
        update: U = W_f − W_r, (d_out, d_in), float32 or float64, finite; a basis may overwrite it when rebuilding.
        energy: ‖U‖².
        generator: seeded from the run's seed and the tensor's name.
        tolerance: the excess tail energy a truncated decomposition may have; 0 asks for an exact one.
    """

    name: str
    update: torch.Tensor
    energy: float
    generator: torch.Generator
    tolerance: float = 1e-4


class Basis(Protocol):
    """Coordinates of one update.

    Attributes:
        coefficients: C, any shape; their squares sum to the energy they hold.
        facts: what to write about this decomposition into the manifest.
    """

    coefficients: torch.Tensor
    facts: dict[str, Any]

    def rebuild(self, keep: torch.Tensor | float) -> torch.Tensor:
        """Return Σ keep·C over the basis, (d_out, d_in); may reuse the update's storage.

        Args:
            keep: factor for each coefficient, in [0, 1], broadcastable to `coefficients`.
        """
        ...


class Method(Protocol):
    """A way to divide an update. Implementations are frozen dataclasses, one a file.

    Attributes:
        summary: one line for --help.
        amounts: the kinds of amount it understands; the first is the default when it needs no number.
    """

    @property
    def summary(self) -> str: ...  # noqa: D102

    @property
    def amounts(self) -> tuple[str, ...]: ...  # noqa: D102

    def basis(self, layer: Layer, amount: Amount) -> Basis:
        """Decompose the layer's update; `amount` tells how many coordinates will be wanted."""
        ...

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Rank the coordinates: non-negative, the leading ones highest, same shape as `basis.coefficients`."""
        ...


@dataclass
class ElementBasis:
    """The coordinates are the matrix's own elements.

    Attributes:
        coefficients: the update itself, (d_out, d_in).
        facts: nothing to add.
    """

    coefficients: torch.Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    def rebuild(self, keep: torch.Tensor | float) -> torch.Tensor:
        """Scale the elements in place."""
        return self.coefficients.mul_(keep)
