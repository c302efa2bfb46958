"""What is summed up while one tensor is written: norms, and what rounding to codes did to the edit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from liborth_cli.checkpoint.blockscaled import BlockScaled
from liborth_cli.checkpoint.reader import Checkpoint

BEYOND = 1.0 + 1.0 / 28.0
"""Of the largest code of e4m3, 448: up to here it is the nearest one, as if the next were there."""


@dataclass
class Sums:
    """Sums over the elements of one tensor.

    Attributes:
        reference: ‖W_r‖².
        general: ‖W_g‖².
        wanted: ‖W_f − W‖², W what the method made of it before it was rounded to codes: the edit.
        lost: ‖W − W_g‖²: what rounding to codes did to the edit.
        noise: Σ step²/12 of every side that is stored as codes: what rounding alone puts into W_f − W_r.
        changed: codes that differ from those of W_f.
        beyond: values beyond the largest code of their block, which they became.
    """

    reference: float = 0.0
    general: float = 0.0
    wanted: float = 0.0
    lost: float = 0.0
    noise: float = 0.0
    changed: int = 0
    beyond: int = 0

    def note_rounding(
        self, side: BlockScaled, name: str, start: int, wanted: torch.Tensor, bits: tuple[np.ndarray, np.ndarray]
    ) -> None:
        """Add a piece of a weight that was rounded to codes.

        Args:
            side: W_f.
            name: the weight.
            start: first element of the piece.
            wanted: what it should be, flat.
            bits: the codes of W_f and those that were written.
        """
        old, new = (side.decode(name, codes, start).double() for codes in bits)
        limit = side.scale(name, start, start + len(wanted)) * (torch.finfo(side.codes(name)).max * BEYOND)
        self.wanted += _energy(old - wanted)
        self.lost += _energy(wanted - new)
        self.general += _energy(new)
        self.changed += int((bits[0] != bits[1]).sum())
        self.beyond += int((wanted.abs() > limit).sum())

    def note_noise(self, side: Checkpoint, name: str, start: int, stop: int) -> None:
        """Add what rounding to codes puts into a piece of one side, where that side is stored as codes."""
        if isinstance(side, BlockScaled) and name in side.scales:
            self.noise += side.rounding(name, start, stop)

    def facts(self, energy: float | None) -> dict[str, float | int]:
        """Return what is told of a tensor that was rounded to codes; `energy` is ‖U‖²."""
        return {
            "codes_changed": self.changed,
            "edit_norm": math.sqrt(self.wanted),
            "edit_rounding_norm": math.sqrt(self.lost),
            "beyond_largest_code": self.beyond,
            "update_rounding": min(self.noise / energy, 1.0) if energy else 1.0,
        }


def _energy(values: torch.Tensor) -> float:
    return float(torch.dot(values.double(), values.double()))
