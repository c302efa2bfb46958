"""The interface every method implements: a basis, a score, and which amounts it understands.

A basis turns an update U into coordinates; a score ranks the coordinates; a selection (selection.py) turns an amount into
how much of each coordinate to keep; the basis rebuilds a weight from what is kept. What is kept is the *leading part*.
Which part is memory is no property of a method: `memory_side` says "tail" (the leading part is skill) or "top".
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from liborth_kernels.filter import filter_coefficients

from liborth_cli.errors import BadInput
from liborth_cli.linalg.rows import ThinProduct
from liborth_cli.methods.memo import Memo


@dataclass(frozen=True)
class Amount:
    """How much to keep.

    Attributes:
        kind: a key of `selection.AMOUNTS`.
        value: the number that goes with it; None where the kind needs none.
        hard: cut where a soft filter would pass one half.
    """

    kind: str
    value: float | None = None
    hard: bool = False

    def __str__(self) -> str:
        """Render as on the command line, without dashes."""
        text = self.kind if self.value is None else f"{self.kind} {self.value:g}"
        return f"{text} hard" if self.hard else text


@dataclass(frozen=True)
class Filter:
    """How much of each coefficient a soft or hard filter keeps, not yet multiplied out.

    Attributes:
        ratios: ρ, non-negative, shaped like the coefficients.
        strength: λ.
        hard: cut in place of λρ/(1 + λρ).
    """

    ratios: torch.Tensor
    strength: float
    hard: bool

    def of(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Return the kept part of the coefficients."""
        return filter_coefficients(coefficients, self.ratios, self.strength, self.hard)


Keep = torch.Tensor | float | Filter
"""How much of each coefficient is kept: factors in [0, 1] that broadcast to the coefficients, or a filter."""


def kept(coefficients: torch.Tensor, keep: Keep) -> torch.Tensor:
    """Return the kept part of the coefficients."""
    return keep.of(coefficients) if isinstance(keep, Filter) else coefficients * keep


@dataclass
class Layer:
    """One matrix, as a method sees it.

    Attributes:
        name: where it comes from, for messages.
        update: U = W_f − W_r, (d_out, d_in), float32 or float64, finite; a basis may overwrite it when rebuilding.
        energy: ‖U‖².
        generator: seeded from the run's seed and the tensor's name.
        tolerance: the excess tail energy a truncated decomposition may have; 0 asks for an exact one.
        retain: Kronecker factors of the data the model must keep good at, or None.
        forget: Kronecker factors of what it must forget, one for each set.
        tokens: what single tokens of each forget set feel.
        shares: what each forget set counts: sets of one text at several points of the path share its 1; empty for 1 each.
        diagonal: diagonal Fisher of the retain data, or None.
        input_key: names the input it shares with other matrices, or None; what depends on that input alone goes into `memo`.
        memo: where such results are kept.
    """

    name: str
    update: torch.Tensor
    energy: float
    generator: torch.Generator
    tolerance: float = 1e-4
    retain: Factors | None = None
    forget: tuple[Factors, ...] = ()
    tokens: tuple[TokenGradients, ...] = ()
    shares: tuple[float, ...] = ()
    diagonal: Diagonal | None = None
    input_key: Hashable | None = None
    memo: Memo = field(default_factory=Memo)

    def weighed(self, name: str) -> list[tuple[Any, float]]:
        """Return the "forget" or "tokens" of every forget set, with what the set counts.

        Raises:
            BadInput: when the layer has none.
        """
        sets = self.need(name)
        return list(zip(sets, self.shares or (1.0,) * len(sets), strict=True))

    def need(self, name: str) -> Any:
        """Return the factors of this name.

        Raises:
            BadInput: when the layer has none.
        """
        found = getattr(self, name)
        if found is None or found == ():
            raise BadInput(f"{self.name}: this method needs {name} factors of every matrix it divides")
        return found


class Factors(Protocol):
    """Kronecker factors of one matrix (`liborth_cli.curvature.factors.KroneckerFactors` is one)."""

    @property
    def input_covariance(self) -> torch.Tensor: ...  # noqa: D102

    @property
    def gradient_covariance(self) -> torch.Tensor: ...  # noqa: D102

    @property
    def second_moments(self) -> torch.Tensor | None: ...  # noqa: D102

    @property
    def basis(self) -> Any: ...  # noqa: D102

    def curvature(self, kind: str = "kfac") -> torch.Tensor: ...  # noqa: D102


class TokenGradients(Protocol):
    """What single tokens feel of one matrix (`liborth_cli.curvature.per_token.TokenGradients` is one).

    Attributes:
        inputs: a of every token, (tokens, d_in).
        gradients: g of every token, (tokens, d_out).
    """

    @property
    def inputs(self) -> torch.Tensor: ...  # noqa: D102

    @property
    def gradients(self) -> torch.Tensor: ...  # noqa: D102


class Diagonal(Protocol):
    """The diagonal Fisher of one matrix, `values` (d_out, d_in)."""

    @property
    def values(self) -> torch.Tensor: ...  # noqa: D102


class Basis(Protocol):
    """Coordinates of one update.

    Attributes:
        coefficients: C, any shape; their squares sum to the energy they hold.
        facts: what to write about this decomposition into the manifest.
        in_place: whether `rebuild` uses up the update; then the squares of C are energies.
    """

    coefficients: torch.Tensor
    facts: dict[str, Any]
    in_place: bool

    def rebuild(self, keep: Keep) -> torch.Tensor | ThinProduct:
        """Return Σ keep·C over the basis, (d_out, d_in); may reuse the update's storage where `in_place` says so."""
        ...


class Method(Protocol):
    """A way to divide an update. Implementations are frozen dataclasses, one a file.

    Attributes:
        summary: one line for --help.
        amounts: the kinds of amount it understands; the first is the default when it needs no number.
        needs: what a layer has to bring: "retain", "forget", "tokens" (of the forget data), "moments" (of the retain data),
            "diagonal".
        memory_side: which end of the ranking is memory when the user does not say: "tail" or "top".
    """

    @property
    def summary(self) -> str: ...  # noqa: D102

    @property
    def amounts(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def needs(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def memory_side(self) -> str: ...  # noqa: D102

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
        in_place: the update is scaled where it lies.
    """

    coefficients: torch.Tensor
    facts: dict[str, Any] = field(default_factory=dict)
    in_place: bool = True

    def rebuild(self, keep: Keep) -> torch.Tensor:
        """Scale the elements in place."""
        assert not isinstance(keep, Filter)
        return self.coefficients.mul_(keep)
