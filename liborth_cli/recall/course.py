"""What became of the steps, in numbers and in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

LITTLE = 0.1
"""Share of the way to the aim below which (almost) nothing was forgotten."""
CLOSE = 0.03
"""Share of the aim within which the mean loss counts as being there; under attack it may be above."""


@dataclass
class Course:
    """What became of the steps; losses in nats a token.

    Attributes:
        taken: how many moved the model.
        attacked: how many of those started from an attacked model.
        before: mean loss of the forget tokens.
        after: the same when the last step was taken.
        target: mean of their targets.
        cost: what all steps together add to the loss of held-back retain rows, of the kind that pays most.
        predicted: what K-FAC predicted of all of them.
        why: why no more were taken.
    """

    taken: int = 0
    attacked: int = 0
    before: float = math.nan
    after: float = math.nan
    target: float = math.nan
    cost: float = 0.0
    predicted: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        """Say it in one line."""
        steps = "1 step" if self.taken == 1 else f"{self.taken} steps"
        return (
            f"recall: {steps}, {self.attacked} of them from models that had been taught half of the forget rows, "
            f"took these rows from {self.before:.2f} to {self.after:.2f} nats a token (aim: {self.target:.2f}); held-back "
            f"retain rows: {self.cost:+.4f} (predicted: {self.predicted:+.4f}); {self.why}"
        )

    @property
    def doubt(self) -> str:
        """Say that (almost) nothing was forgotten, or ""."""
        way = self.target - self.before
        if not way > CLOSE * self.target:
            return (
                f"the forget rows stood at {self.before:.2f} nats a token before the first step, and their aim is "
                f"{self.target:.2f}: there was (almost) nothing to forget"
            )
        if not self.taken:
            return "recall moved nothing: retain rows allowed no step; a larger --trust or more --retain-data may"
        if self.after - self.before < LITTLE * way:
            return (
                f"recall forgot almost nothing: forget rows went {max(self.after - self.before, 0.0) / way:.0%} of the way to "
                "their aim; more --steps, or a larger --trust, go further"
            )
        return ""
