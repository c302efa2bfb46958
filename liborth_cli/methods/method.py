"""What a method is: a declaration that the command line can read at once, a basis, and a score.

A basis turns an update U into coordinates; a score ranks the coordinates; a selection (selection.py) turns an amount into
how much of each coordinate to keep; the basis rebuilds a weight from what is kept. What is kept is the *leading part*.
Which part is memory is no property of a method: `memory_side` says "tail" (the leading part is skill) or "top".

Files of methods import torch, and whatever imports it, inside their functions: `--help` reads all of their declarations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_type_hints

from liborth_cli.errors import BadInput, UsageError
from liborth_cli.methods.amount import Amount
from liborth_cli.methods.memo import Memo

if TYPE_CHECKING:
    import torch

    from liborth_cli.curvature.layer import DiagonalFisher, SampledFactors, TokenGradients
    from liborth_cli.methods.kronecker import Factors
    from liborth_cli.methods.selection import Basis

Value = float | int | str | None
"""What a setting may be."""


@dataclass(frozen=True)
class Need:
    """Something a method needs of every matrix it divides.

    Attributes:
        side: which factor sets have it, "retain" or "forget".
        held: what `FactorSet.holds` calls it.
    """

    side: str
    held: str


NEEDS = {
    "retain": Need("retain", "factors"),
    "forget": Need("forget", "factors"),
    "tokens": Need("forget", "tokens"),
    "moments": Need("retain", "moments"),
    "diagonal": Need("retain", "diagonal"),
    "edit": Need("forget", "edit"),
}


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
        edit: Δ, what steps from W_f moved the matrix by, (d_out, d_in), or None.
        input_key: names the input it shares with other matrices, or None; what depends on that input alone goes into `memo`.
        memo: where such results are kept.
    """

    name: str
    update: torch.Tensor
    energy: float
    generator: torch.Generator
    tolerance: float = 1e-4
    retain: Factors | None = None
    forget: tuple[Factors | SampledFactors, ...] = ()
    tokens: tuple[TokenGradients, ...] = ()
    shares: tuple[float, ...] = ()
    diagonal: DiagonalFisher | None = None
    edit: torch.Tensor | None = None
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


@dataclass(frozen=True)
class Setting:
    """A setting of a method, as declared: the option, its check and its place in the manifest follow from it.

    Attributes:
        name: of the field; the option is --name.
        kind: float, int or str.
        default: when it is not given.
        help: one sentence for --help.
        choices: the words it may be, if it is one.
        low: smallest number allowed.
        high: largest number allowed.
        above: `low` itself is not allowed.
    """

    name: str
    kind: type
    default: Value
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    @property
    def option(self) -> str:
        """As it is typed."""
        return f"--{self.name.replace('_', '-')}"

    def check(self, value: Value) -> None:
        """Raise UsageError when a value is none of the choices, or a number that is not allowed."""
        if self.choices and value not in self.choices:
            raise UsageError(f"{self.option} is one of {', '.join(self.choices)}, not {value}")
        if isinstance(value, (int, float)):
            low = value > self.low if self.above else value >= self.low
            if not (math.isfinite(value) and low and value <= self.high):
                most = "" if self.high == math.inf else f" up to {self.high:g}"
                raise UsageError(
                    f"{self.option} takes a number {'above' if self.above else 'from'} {self.low:g}{most}, not {value}"
                )


def setting(
    default: Value,
    help: str,  # noqa: A002
    choices: Sequence[str] = (),
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
) -> Any:
    """Declare a field of a method as a setting of its own; `Setting` says what the arguments mean."""
    return field(default=default, metadata={"help": help, "choices": tuple(choices), "low": low, "high": high, "above": above})


@dataclass(frozen=True)
class Method:
    """A way to divide an update: a subclass, one a file; what it may be told are its fields (`setting`).

    Attributes:
        name: what --method calls it.
        summary: one line for --help.
        amounts: the kinds of amount it understands.
        needs: what a layer has to bring, keys of `NEEDS`.
        memory_side: which end of the ranking is memory when the user does not say: "tail" or "top".
        default: the amount when none is given; None asks for one.
        begin: an amount to begin with, where there is no default.
        cuts: whether its soft filter can be made a hard cut.
        searched: whether a search over all methods tries it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    amounts: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]] = ()
    memory_side: ClassVar[str] = "tail"
    default: ClassVar[Amount | None] = None
    begin: ClassVar[Amount | None] = None
    cuts: ClassVar[bool] = False
    searched: ClassVar[bool] = True

    def basis(self, layer: Layer, amount: Amount) -> Basis:
        """Decompose the layer's update (here: its elements); `amount` tells how many coordinates will be wanted."""
        from liborth_cli.methods.selection import ElementBasis

        return ElementBasis(layer.update)

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Rank the coordinates: non-negative, the leading ones highest, same shape as `basis.coefficients`."""
        raise NotImplementedError

    def dose_bytes(self, shape: tuple[int, int], full: Sequence[int], tokens: float) -> int:
        """Return the bytes that have to be kept of one matrix to divide it again by any amount, at most, once factors are gone.

        Here: the diagonal, where it divides by that; else eigenvectors of every full covariance, coordinates and scores, in
        float64.

        Args:
            shape: (d_out, d_in).
            full: widths of those of its covariances that are no diagonals.
            tokens: how many the forget data have; infinite for a hard cut.
        """
        if "diagonal" in self.needs:
            return 4 * shape[0] * shape[1]
        return 8 * (sum(width * width for width in full) + 2 * shape[0] * shape[1])

    @property
    def suggested(self) -> Amount:
        """The amount it takes by itself, or one to begin with."""
        found = self.default or self.begin
        assert found is not None, self.name
        return found

    @property
    def factor_sides(self) -> set[str]:
        """Which factor sets it needs: "retain", "forget", both or none."""
        return {NEEDS[need].side for need in self.needs}

    @property
    def settings(self) -> dict[str, Setting]:
        """Its settings by name, in the order of declaration."""
        return _settings(type(self))

    def having(self, values: Mapping[str, Value]) -> Method:
        """Return the method with some settings changed.

        Raises:
            UsageError: when it has no such setting, or a value is not allowed.
        """
        known = self.settings
        for name, value in values.items():
            if name not in known:
                raise UsageError(f"--{name.replace('_', '-')} is no setting of --method {self.name}")
            known[name].check(value)
        return replace(self, **values)


@functools.cache
def _settings(method: type[Method]) -> dict[str, Setting]:
    hints = get_type_hints(method)
    found = {}
    for one in fields(method):
        kinds = [kind for kind in (get_args(hints[one.name]) or (hints[one.name],)) if kind is not type(None)]
        default: Any = one.default
        found[one.name] = Setting(one.name, kinds[0], default, **one.metadata)
    return found
