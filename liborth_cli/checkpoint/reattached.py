"""The fine-tuned checkpoint as its general checkpoint and memory hold it, without writing it."""

from __future__ import annotations

import numpy as np

from liborth_cli.checkpoint.delta import XOR, Memory
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import UsageError


class Reattached(Checkpoint):
    """bits(W_g) XOR delta: the fine-tuned tensors to the bit, formed while they are read.

    Attributes:
        memory: the delta.
    """

    def __init__(self, general: Checkpoint, memory: Memory) -> None:
        """Lay the memory over the general checkpoint; both stay open elsewhere.

        Raises:
            PairMismatch: when the memory was made for another checkpoint.
            UsageError: when the memory holds tensors that the general checkpoint has not.
        """
        super().__init__(general.path, general.shards, general.index)
        memory.check_fits(general)
        self.memory = memory
        if any(memory.withheld().values()) or memory.grown:
            raise UsageError(
                f"{memory.checkpoint.path}: holds tensors or neurons that the general checkpoint does not have; write the "
                "fine-tuned model with `liborth excise --beta 1` first"
            )

    def read(self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Read bytes [start, stop) of one fine-tuned tensor; see `Checkpoint.read`."""
        bits = super().read(name, start, stop, out)
        entry = XOR + name
        if entry in self.memory.checkpoint.tensors:
            np.bitwise_xor(bits, self.memory.checkpoint.read(entry, start, start + len(bits)), out=bits)
        return bits

    def check_unchanged(self) -> None:
        """Raise BadInput when a file of either changed since it was opened."""
        super().check_unchanged()
        self.memory.checkpoint.check_unchanged()

    def close(self) -> None:
        """Do nothing: the files belong to the two it was made of."""
