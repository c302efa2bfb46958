"""The attack inside: a few training steps on half of the forget rows, so that the other half can be held down where it leads.

What only hides comes back when half of it is taught. A step taken from the model that an attacker would have by then moves
what the attack uses. `verify` attacks by other halves, other rates and other lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Weights
from liborth_cli.tune.data import Example
from liborth_cli.tune.loop import train
from liborth_cli.tune.low_rank import trained
from liborth_cli.tune.options import Arithmetic, LoopOptions, Schedule

RATES = (0.02, 0.07, 0.2)
"""Learning rates that take turns, times 1/width as in arXiv 2203.03466."""
FASTER = 5.0
"""How much higher they are where low-rank updates are trained, which begin at nothing."""
CUTS = 2
"""Ways to deal the rows into two hands that take turns."""
ATTACKS = 2 * CUTS * len(RATES)
"""That there are: each hand of each cut at each rate."""
BATCH_ROWS = 16


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        taught: numbers of the rows that are taught.
        held: those of the others.
        rate: learning rate, times the width.
        steps: of training.
        seed: of the order of the rows.
        dtype: of the training's products with weights.
        rank: of the low-rank updates that are trained; 0: all weights are.
    """

    taught: tuple[int, ...]
    held: tuple[int, ...]
    rate: float
    steps: int
    seed: int
    dtype: Arithmetic = Arithmetic.FLOAT32
    rank: int = 0

    def run(self, model: BlockModel, weights: Weights, rows: Sequence[Row]) -> None:
        """Put weights into memory, and train them there.

        Args:
            model: left resident, at what training made of the weights.
            weights: where it starts.
            rows: all of the forget rows.
        """
        model.use(weights)
        if not model.resident:
            model.load_all()
        examples = [Example.of(rows[i]) for i in self.taught]
        options = LoopOptions(
            steps=self.steps, batch_size=min(BATCH_ROWS, len(examples)), rate=self.rate / model.hidden,
            schedule=Schedule.CONSTANT, warmup=0.0, seed=self.seed, dtype=self.dtype,
        )  # fmt: skip
        method = trained(model.model, self.rank, self.seed)
        torch.manual_seed(self.seed)
        try:
            train(method, examples, options)
        finally:
            method.finish()
            for parameter in method.parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None
            model.model.eval()


def attacks(rows: Sequence[Row], steps: int, seed: int, dtype: Arithmetic = Arithmetic.FLOAT32, rank: int = 0) -> list[Attack]:
    """Return the attacks that take turns; equal rows go into the same hand. None when there are not two different rows.

    Args:
        rows: the forget rows.
        steps: of training each.
        seed: of the hands.
        dtype: of the training's products with weights.
        rank: of the low-rank updates that they train; 0: all weights.
    """
    groups: dict[bytes, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.ids.tobytes(), []).append(number)
    if len(groups) < 2 or not steps:
        return []
    every, hands = list(groups.values()), list[tuple[int, ...]]()
    for cut in range(CUTS):
        order = np.random.default_rng([seed, cut, 0x5EC]).permutation(len(every))
        middle = len(order) // 2
        hands += [tuple(sorted(i for k in hand for i in every[k])) for hand in (order[:middle], order[middle:])]
    faster = FASTER if rank else 1.0
    # Each hand in turn, at another rate each time round; hands 2n and 2n + 1 are of one cut.
    return [
        Attack(hands[k], hands[k ^ 1], RATES[(k + turn) % len(RATES)] * faster, steps, seed=seed, dtype=dtype, rank=rank)
        for turn in range(len(RATES))
        for k in range(len(hands))
    ]
