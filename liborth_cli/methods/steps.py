"""What methods share that divide by an edit which steps made: W_g = W_f + Δ, whatever became of U.

With Δ what a matrix was moved by, U_m = −Δ and U_s = U + Δ. One coordinate, all or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from liborth_cli.methods.method import Amount, Layer, Method, setting

if TYPE_CHECKING:
    import torch

    from liborth_cli.methods.selection import Basis, Facts, Keep


@dataclass
class StepsBasis:
    """The one coordinate along −Δ.

    Attributes:
        coefficients: 1, (1,).
        edit: Δ, (d_out, d_in).
        facts: nothing.
        in_place: the update is left as it is.
    """

    coefficients: torch.Tensor
    edit: torch.Tensor
    facts: Facts = field(default_factory=dict)
    in_place: bool = False

    def rebuild(self, keep: Keep) -> torch.Tensor:
        """Return −keep·Δ, (d_out, d_in)."""
        assert isinstance(keep, float)
        return self.edit * -keep


@dataclass(frozen=True)
class Stepwise(Method):
    """Basis: what the steps moved. Score: none."""

    needs = ("retain", "edit")
    memory_side = "top"

    damping: float = setting(1e-2, "added to retain factors, relative to their mean eigenvalue.", low=0)
    rate: float = setting(
        0.3, "share of the way to their target losses that forget tokens go in one step.", low=0, high=1, above=True
    )
    ridge: float = setting(0.1, "added to the kernel of the tokens, relative to its mean eigenvalue; adapts.", low=0)
    trust: float = setting(2e-3, "most that a step may add to the loss of held-back retain rows, nats a token.", low=0)
    attack_steps: int = setting(12, "steps of the attack from whose result two of three steps start; 0: none.", low=0)
    attack_rank: int = setting(
        0, "rank of LoRA updates that this attack trains, at 4 bytes a weight in place of 16; 0: all weights.", low=0, high=256
    )

    def basis(self, layer: Layer, amount: Amount) -> Basis:
        """Return what the steps moved."""
        edit = layer.need("edit").to(layer.update)
        return StepsBasis(edit.new_ones(1), edit)

    def score(self, basis: Basis, layer: Layer) -> torch.Tensor:
        """Return 1, (1,)."""
        return basis.coefficients
