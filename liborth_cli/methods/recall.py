"""`recall`: what steps moved to bring every forget token to the loss it would have had unseen is memory.

Not a filter of the update: the steps (`liborth_cli.recall`) are taken from W_f and may leave the span of U. Here they are one
more way to divide a matrix. With Δ what they moved it by, W_g = W_f + Δ, so U_m = −Δ and U_s = U + Δ. One coordinate, all or
nothing: its amount is how many steps are taken at most.

The unseen loss is told by rows of the same form that were never trained on: --fresh, or the decoys of a --forget-pattern given
beside --forget-data. Without either, the reference's own loss is the aim, which may be too high where fine-tuning taught the
form too; with --one-checkpoint there is no reference, and one of the two is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from liborth_cli.methods.amount import Amount
from liborth_cli.methods.steps import Stepwise


@dataclass(frozen=True)
class Recall(Stepwise):
    """Basis: what the steps moved. Score: none."""

    name = "recall"
    summary = "steps from the fine-tuned model to the loss of forget tokens that were never seen (reads texts itself)"
    amounts = ("steps",)
    default = Amount("steps", 48)
