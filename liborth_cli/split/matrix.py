"""The mathematics of a split, on one matrix in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from liborth_cli.checkpoint.pair import Policy
from liborth_cli.linalg.rows import Rows, ThinProduct
from liborth_cli.linalg.truncated import energy, leading_subspace
from liborth_cli.methods import METHODS, Amount, Layer, Method
from liborth_cli.methods.method import Value
from liborth_cli.methods.selection import Basis, kept_energy, select
from liborth_cli.split.overrides import Override, last_match


@dataclass(frozen=True)
class SplitOptions:
    """What to do, apart from where.

    Attributes:
        method: a key of `METHODS`.
        amount: how much the leading part keeps.
        memory_side: "tail" when the leading part is skill, "top" when it is memory; None leaves it to the method.
        alpha: factor on the skill part in the general checkpoint.
        policy: which tensors take part.
        nonfinite: "refuse" or "passthrough" for tensors with NaN or infinite values.
        tolerance: excess tail energy a truncated SVD may have; 0 for the full SVD.
        seed: for everything random.
        out_shard_size: bytes; None keeps the fine-tuned checkpoint's layout.
        settings: of the method, by name; the others have their defaults.
        overrides: what some tensors get instead.
    """

    method: str
    amount: Amount
    memory_side: str | None = None
    alpha: float = 1.0
    policy: Policy = field(default_factory=Policy)
    nonfinite: str = "refuse"
    tolerance: float = 1e-4
    seed: int = 0
    out_shard_size: int | None = None
    settings: Mapping[str, Value] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()

    @property
    def side(self) -> str:
        """Which end of the ranking is memory."""
        return self.memory_side or METHODS[self.method].memory_side

    @property
    def rule(self) -> Method:
        """The method, with its settings."""
        return METHODS[self.method].having(self.settings)

    def of(self, name: str) -> SplitOptions:
        """Return the options for one tensor: with its own amount, when --for gives it one."""
        found = last_match(self.overrides, name)
        return dataclasses.replace(self, amount=found.amount) if found and found.amount else self


@dataclass
class MatrixReport:
    """What a split did to one matrix.

    Attributes:
        energy: ‖U‖².
        skill: share of it in the skill part, ‖U_s‖²/‖U‖².
        memory: share of it in the memory part, ‖U − U_s‖²/‖U‖².
        facts: what the method adds: rank, certificate.
        leading: the leading part, when it comes as two thin factors.
    """

    energy: float
    skill: float
    memory: float
    facts: dict[str, Any]
    leading: ThinProduct | None = None


def split_matrix(layer: Layer, options: SplitOptions) -> tuple[torch.Tensor, MatrixReport]:
    """Divide one update into skill and memory.

    Args:
        layer: the update and its seed; the update's storage is reused for the result.
        options: method, amount and side.

    Returns:
        U_s, (d_out, d_in), and the report. U_m is what is left of U.
    """
    method, u = options.rule, layer.update
    tail = options.side == "tail"
    basis = method.basis(layer, options.amount)
    scores = method.score(basis, layer)
    if not basis.in_place:
        return divide(basis, scores, layer, options)
    whole = u if tail else u.clone()
    keep = select(options.amount, basis, scores, (u.shape[0], u.shape[1]), layer.energy)
    leading_share = kept_energy(basis, keep) / layer.energy
    rest_share = (1 - keep) ** 2 if isinstance(keep, float) else max(1.0 - leading_share, 0.0)
    leading = basis.rebuild(keep)
    assert isinstance(leading, torch.Tensor)
    if tail:
        return leading, MatrixReport(layer.energy, leading_share, rest_share, basis.facts)
    return whole.sub_(leading), MatrixReport(layer.energy, rest_share, leading_share, basis.facts)


def divide(basis: Basis, scores: torch.Tensor, layer: Layer, options: SplitOptions) -> tuple[torch.Tensor, MatrixReport]:
    """Divide an update whose basis does not use it up, once basis and scores are there; see `split_matrix`."""
    u = layer.update
    keep = select(options.amount, basis, scores, (u.shape[0], u.shape[1]), layer.energy)
    found = basis.rebuild(keep)
    leading = found.whole(u.dtype) if isinstance(found, ThinProduct) else found
    rest = u.sub_(leading)
    skill, memory = (leading, rest) if options.side == "tail" else (rest, leading)
    shares = energy(skill) / layer.energy, energy(memory) / layer.energy
    return skill, MatrixReport(layer.energy, *shares, basis.facts, found if isinstance(found, ThinProduct) else None)


def truncate(
    u: torch.Tensor | Rows, total: float, generator: torch.Generator, options: SplitOptions
) -> tuple[ThinProduct, MatrixReport]:
    """Find the low-rank part of an update without multiplying it out: what `svd` at a rank keeps of it.

    Args:
        u: U, (m, n), in memory or formed by rows.
        total: ‖U‖².
        generator: seeded.
        options: the rank and the tolerance.

    Returns:
        U_s as two thin factors, and the report.
    """
    found = leading_subspace(u, int(options.amount.value or 0), total, generator, options.tolerance)
    facts = {"rank": found.vectors.shape[1], "excess": found.excess, "route": found.route}
    skill = found.captured / total
    return found.thin(u.shape[0] > u.shape[1]), MatrixReport(total, skill, max(1.0 - skill, 0.0), facts)
