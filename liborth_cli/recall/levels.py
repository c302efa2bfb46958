"""The loss a token would have had unseen: what the steps aim at.

The reference never saw the rows, so its loss on a token says how hard that token is. But fine-tuning taught the form too, and
on text of that form the unseen level is not the reference's: rows of the same form that were never trained on tell it. With
b and a their losses in the reference and in the model, and j the place of a token in what a row must say,

    target_it = ℓ_t · z_ij · ρ_i,   z_ij = (Σ_r s_ir a_rj + κ z_j b̄) / (Σ_r s_ir b_rj + κ b̄)
                                    z_j = (Σ_r a_rj + κ ā) / (Σ_r b_rj + κ b̄)

over fresh rows r that reach place j. Rows of several forms stand at several levels, so a fresh row counts by how like row i it
is: s_ir is how many pairs of neighbouring tokens both hold, over the most that i shares with any. κ tokens of the mean keep
places that few rows reach, or few that are like i, from being noise. Without fresh rows z is 1. Without a reference ℓ and b are
1, and the target is the mean loss at that place.

No row that was never seen stands at that mean: some are easier than is expected of them, some harder. So each forget row
that is known where the steps begin is put beside one fresh row that is like it, drawn once, and stands as that one does to what
is expected of it: with k the row beside i, ρ_i = Σ_j a_kj / Σ_j b_kj z_kj, between a half and two. A row that stands near its
level already, as in a student, would have to be learnt to become easier: there ρ is 1. One above its level in a model that was
trained on it was not learnt, and is not taught now: it stays as it is there, and ρ is what it has.

In a model that was attacked the same holds of rows that were not taught, with all losses taken there. Fresh rows should stand
there where the attack leaves them in the reference, and at each place no higher than they stood in this model before it: times
min(z, 1), with a before and b after the attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array

from liborth_cli.stream.texts import Row

PRIOR = 4.0
"""κ, in tokens."""
SPREAD = 0.5, 2.0
"""ρ at least and at most: a fresh row that was trained on after all must not keep the row beside it as it is."""


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


@dataclass(frozen=True)
class Likeness:
    """How like rows are to fresh rows: pairs of neighbouring tokens that both hold, over the most that a row shares with any.

    Attributes:
        forget: of the forget rows, (forget, fresh), 0 to 1.
        fresh: of the fresh rows, (fresh, fresh); a row is not like itself.
        beside: number of the fresh row that each forget row is put beside, −1 for none, (forget,).
        least: ρ of the forget rows that were not learnt, at least, and 0 for the others, (forget,).
    """

    forget: np.ndarray
    fresh: np.ndarray
    beside: np.ndarray
    least: np.ndarray

    def of_known(self, reference: Losses, losses: Losses, taught: bool) -> Likeness:
        """Leave rows beside others that are known, which is at less than half of the level that is expected of them.

        Args:
            reference: losses of the reference, or `alike`.
            losses: in the model that the steps begin at.
            taught: it was trained on the forget rows; those that it has not learnt stay as hard as they are in it.
        """
        apart = replace(self, beside=np.full_like(self.beside, -1))
        level = unseen(reference, losses.fresh, apart)
        tiny = np.finfo(float).tiny
        share = np.array([row.sum() / max(aim.sum(), tiny) for row, aim in zip(losses.forget, level, strict=True)])
        beside = np.where(share < 1 / 2, self.beside, -1) if losses.fresh else self.beside
        return replace(self, beside=beside, least=np.where(share > 1, share, 0.0) if taught else self.least)

    @classmethod
    def of(cls, forget: Sequence[Row], fresh: Sequence[Row]) -> Likeness:
        """Compare rows by their tokens."""
        pairs = _pairs([*forget, *fresh])
        shared = (pairs @ pairs[len(forget) :].T).toarray()
        np.fill_diagonal(shared[len(forget) :], 0.0)
        share = shared / np.maximum(shared.max(1, initial=0.0, keepdims=True), 1.0)
        mine = share[: len(forget)]
        beside = [_drawn(row, like) for row, like in zip(forget, mine, strict=True)] if fresh else []
        return cls(mine, share[len(forget) :], np.array(beside, dtype=int), np.zeros(len(forget)))


def unseen(reference: Losses, fresh: Sequence[np.ndarray], likeness: Likeness) -> list[np.ndarray]:
    """Return the target of every token of the forget rows.

    Args:
        reference: losses of the reference, or `alike`.
        fresh: losses of the fresh rows in the model at hand.
        likeness: of the rows.
    """
    if not fresh:
        return [row * max(1.0, least) for row, least in zip(reference.forget, likeness.least, strict=True)]
    level, stand = _level(reference, fresh, likeness.forget), np.append(_stand(reference, fresh, likeness), 1.0)
    rho = np.maximum(stand[likeness.beside], likeness.least)
    return [row * z[: len(row)] * mine for row, z, mine in zip(reference.forget, level, rho, strict=True)]


def relearnt(reference: Losses, fresh: Sequence[np.ndarray], before: Sequence[np.ndarray], likeness: Likeness) -> Losses:
    """Return the targets of every row in a model that was attacked.

    Forget rows that were not taught should be no easier than fresh rows are there; at the reference's own level, where fresh
    rows stay above it, they could be told from what was never seen. Fresh rows should fall to where they fall in the reference.
    Where that is above what they have in this model, which knows the form, they should stay: an attack would have to make them
    harder.

    Args:
        reference: losses of the reference under the same attack, or `alike`.
        fresh: losses of the fresh rows in the model at hand, which was attacked.
        before: losses of the fresh rows in the model that the steps began at, which was not.
        likeness: of the rows.
    """
    if not fresh:
        return Losses(reference.forget, [])
    level = np.minimum(_level(reference, before, likeness.fresh), 1.0)
    aims = [row * z[: len(row)] for row, z in zip(reference.fresh, level, strict=True)]
    return Losses(unseen(reference, fresh, likeness), aims)


def _level(reference: Losses, fresh: Sequence[np.ndarray], likeness: np.ndarray) -> np.ndarray:
    """Return z of every row at every place, (rows, places), by the likeness of the rows to the fresh ones."""
    longest = max(len(row) for row in (*reference.forget, *fresh))
    here, there = (np.array([np.pad(row, (0, longest - len(row))) for row in rows]) for rows in (fresh, reference.fresh))
    tokens = sum(map(len, fresh))
    mean, base = here.sum() / tokens, there.sum() / tokens
    of_all = (here.sum(0) + PRIOR * mean) / (there.sum(0) + PRIOR * base)
    return (likeness @ here + PRIOR * of_all * base) / (likeness @ there + PRIOR * base)


def _stand(reference: Losses, fresh: Sequence[np.ndarray], likeness: Likeness) -> np.ndarray:
    """Return the loss of every fresh row over what the others make expected of it, (fresh,)."""
    level = _level(reference, fresh, likeness.fresh)
    expected = [row @ z[: len(row)] for row, z in zip(reference.fresh, level, strict=True)]
    return np.clip([row.sum() for row in fresh] / np.maximum(expected, np.finfo(float).tiny), *SPREAD)


def _drawn(row: Row, like: np.ndarray) -> int:
    """Draw a fresh row by its likeness to a row, from whose tokens alone the draw comes: copies get the same."""
    weights = like if like.any() else np.ones_like(like)
    return int(np.random.default_rng(row.ids.astype(np.uint64)).choice(len(like), p=weights / weights.sum()))


def _pairs(rows: Sequence[Row]) -> csr_array:
    """Return which pairs of neighbouring tokens each row holds, (rows, pairs), 0 or 1."""
    held = [np.unique(np.stack([row.ids[:-1], row.ids[1:]], 1), axis=0) for row in rows]
    _, column = np.unique(np.concatenate(held), axis=0, return_inverse=True)
    ends = np.cumsum([0, *map(len, held)])
    return csr_array((np.ones(len(column)), column.ravel(), ends))
