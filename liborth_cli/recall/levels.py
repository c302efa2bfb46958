"""The loss a token would have had unseen: what the steps aim at.

The reference never saw the rows, so its loss on a token says how hard that token is. But fine-tuning taught the form too, and
on text of that form the unseen level is not the reference's: rows of the same form that were never trained on tell it. With
b and a their losses in the reference and in the model, and j the place of a token in what a row must say,

    target_t = ℓ_t · z_j,   z_j = (Σ a_j + κ ā) / (Σ b_j + κ b̄)

over the tokens at place j; κ tokens of the mean keep places that few rows reach from being noise. Without such rows z is 1.
Without a reference ℓ and b are 1, and the target is the mean loss at that place.

In a model that was attacked the same holds of rows that were not taught, with all losses taken there. Fresh rows should stand
there where the attack leaves them in the reference, at the level that they have in this model: times min(z, 1) of before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PRIOR = 4.0
"""κ, in tokens."""


@dataclass(frozen=True)
class Losses:
    """Token losses of some model, nats; a row an array of its loss-carrying tokens, (n,) each.

    Attributes:
        forget: of the rows that must go.
        fresh: of rows of the same form that were never trained on; empty where there are none.
    """

    forget: list[np.ndarray]
    fresh: list[np.ndarray]

    @property
    def flat(self) -> np.ndarray:
        """All losses, one row after the other."""
        return np.concatenate([*self.forget, *self.fresh])

    def filled(self, flat: np.ndarray) -> Losses:
        """Return other losses of the same rows, given one row after the other."""
        rows = np.split(flat, np.cumsum([len(row) for row in (*self.forget, *self.fresh)])[:-1])
        return Losses(rows[: len(self.forget)], rows[len(self.forget) :])


def alike(losses: Losses) -> Losses:
    """Return what stands for a reference where there is none: every token as hard as any other."""
    return Losses(*([np.ones_like(row) for row in rows] for rows in (losses.forget, losses.fresh)))


def unseen(reference: Losses, fresh: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the target of every token of the forget rows.

    Args:
        reference: losses of the reference, or `alike`.
        fresh: losses of the fresh rows in the model at hand.
    """
    if not fresh:
        return reference.forget
    ratio = _level(reference, fresh)
    return [row * ratio[: len(row)] for row in reference.forget]


def relearnt(reference: Losses, fresh: Sequence[np.ndarray], before: tuple[Losses, Sequence[np.ndarray]]) -> Losses:
    """Return the targets of every row in a model that was attacked.

    Forget rows that were not taught should be no easier than fresh rows are there; at the reference's own level, where fresh
    rows stay above it, they could be told from what was never seen. Fresh rows should fall by the share that they fall by in
    the reference. Its losses themselves, from which fine-tuning has not taken the form, can lie above those of this model that
    nobody attacked: an attack would have to make them harder.

    Args:
        reference: losses of the reference under the same attack, or `alike`.
        fresh: losses of the fresh rows in the model at hand, which was attacked.
        before: losses of the reference that was not attacked, and of the fresh rows in the model that the steps began at.
    """
    ratio = np.minimum(_level(*before), 1.0) if fresh else np.empty(0)
    return Losses(unseen(reference, fresh), [row * ratio[: len(row)] for row in reference.fresh])


def _level(reference: Losses, fresh: Sequence[np.ndarray]) -> np.ndarray:
    """Return z at every place."""
    longest = max(len(row) for row in (*reference.forget, *fresh))
    return _by_place(fresh, longest) / _by_place(reference.fresh, longest)


def _by_place(rows: Sequence[np.ndarray], longest: int) -> np.ndarray:
    """Return the sum of the losses at every place, with κ tokens of their mean, (longest,)."""
    sums = np.full(longest, PRIOR * float(np.concatenate(list(rows)).mean()))
    for row in rows:
        sums[: len(row)] += row
    return sums
