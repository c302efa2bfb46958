"""How much a run of TOFU does: all of it on a checkpoint that is given, or what two cores manage on one that is made here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.surgery.train import SMALL, Size
from liborth_cli.verify.attacks import Attack, Grid

AN_AUTHOR = 20
"""Questions about each author."""


ATTACK = Grid(tuple(Attack(rate) for rate in (3e-5, 1e-4, 3e-4)), steps=24)


@dataclass(frozen=True)
class Base:
    """A Llama that is trained here and stands for a model that knows the world.

    Attributes:
        size: of it, and how long it is trained.
        read: authors, by number among those outside the forget set, whose questions are text to it, once each or so.
        fresh: others that no model ever sees.
        facts: how often it is trained on TOFU's real authors and world facts.
        beside: questions of authors that it has read, which it reads again while it is fine-tuned, with all facts.
    """

    size: Size
    read: range
    fresh: range
    facts: int
    beside: int


@dataclass(frozen=True)
class Tier:
    """How much is done.

    Attributes:
        base: that is made; None where a checkpoint is given.
        going, staying: questions of the authors that must go and of those that stay, from the first; all where None.
        epochs, batch, rate: of fine-tuning.
        steps: of it in all, where it is not a number of epochs.
        most: questions of each set that are scored.
        tokens: retain tokens that liborth measures curvature on.
        fresh: rows that no model saw, given to methods that take such.
        own: texts that the base writes by itself, which a student reads.
        written: tokens of an answer at most; all that there is room for where None.
        attack: what a model is put through; the lowest loss counts.
        controls: further models that never saw the forget set, each by another seed.
        doses: of each edit that are tried; all that its search comes by where None.
        halvings: evaluations that find what share of a dose that costs too much does not.
    """

    base: Base | None = None
    going: int | None = None
    staying: int | None = None
    epochs: int = 6
    batch: int = 32
    rate: float = 2e-4
    steps: int | None = None
    most: int | None = 100
    tokens: int = 30_000
    fresh: int = 0
    own: int = 0
    written: int | None = None
    attack: Grid = ATTACK
    controls: int = 0
    doses: int | None = None
    halvings: int = 4


TIERS = {
    "full": Tier(),
    "small": Tier(
        Base(replace(SMALL, width=96, base=250), read=range(20, 150), fresh=range(150, 170), facts=25, beside=40),
        staying=6 * AN_AUTHOR, epochs=12, batch=16, rate=2e-3, most=50, tokens=12_000, fresh=24,
        own=32_768, written=60, attack=Grid((Attack(3e-4), Attack(1e-3)), steps=12), controls=1,
    ),
    "tiny": Tier(
        going=8, staying=8, steps=3, most=4, tokens=2_000, written=8, attack=Grid((Attack(3e-5),), steps=24), doses=1,
        halvings=1,
    ),
}  # fmt: skip
"""`full` is TOFU as it is; `small` is minutes on two cores; `tiny` shows that every part runs."""
