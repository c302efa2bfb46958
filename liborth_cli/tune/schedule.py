"""How the learning rate goes."""

from __future__ import annotations

import math


def factor(kind: str, step: int, steps: int, warmup: int) -> float:
    """Return the learning rate of one step as a share of the highest.

    Args:
        kind: "cosine", "linear" or "constant", after the warm-up.
        step: from 0.
        steps: in all.
        warmup: steps of linear rise from 1/warmup.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    left = (step - warmup) / max(steps - warmup, 1)
    return 1.0 - left if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * left))
