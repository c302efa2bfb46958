"""A general checkpoint with some of its memory's neurons in: a wider model, formed while it is read and never written."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from liborth_cli.checkpoint import growth
from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput


class Grown(Checkpoint):
    """What `liborth excise --beta` would write: the weights out of the neurons are multiplied by β.

    Attributes:
        memory: has the neurons.
        beta: how much of them; 0 computes what the general checkpoint computes.
    """

    def __init__(self, general: Checkpoint, memory: Memory, beta: float, folder: Path) -> None:
        """Lay the neurons beside the general checkpoint; both stay open elsewhere.

        Args:
            general: the checkpoint without them.
            memory: its memory.
            beta: how much.
            folder: an empty directory for the wide model's config.json, from which it is built.

        Raises:
            BadInput: when the memory does not hold that file.
            PairMismatch: when the memory was made for another checkpoint.
            UsageError: when the neurons stand behind a router.
        """
        growth.check_excisable(memory.checkpoint)
        memory.check_fits(general)
        super().__init__(folder, general.shards, general.index)
        self.memory, self.beta, self._general = memory, beta, general
        self.tensors = {name: memory.widen(info) for name, info in general.tensors.items()}
        sidecars = growth.sidecars(memory.checkpoint)
        if "config.json" not in sidecars:
            raise BadInput(f"{memory.checkpoint.path}: has neurons and no config.json of the model with them")
        (folder / "config.json").write_bytes(sidecars["config.json"])

    def at(self, beta: float) -> Grown:
        """Return the same model with another β."""
        return Grown(self._general, self.memory, beta, self.path)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Read bytes [start, stop) of one tensor; see `Checkpoint.read`. One grown tensor is in memory at a time."""
        if name not in self.memory.grown:
            return super().read(name, start, stop, out)
        parts = self.memory.grown[name].pieces(self._general, self.memory.checkpoint, name, self.beta)
        bits = np.concatenate(list(parts))[start:stop]
        if out is None:
            return bits
        out[: len(bits)] = bits
        return out[: len(bits)]

    def check_unchanged(self) -> None:
        """Raise BadInput when a file of either changed since it was opened."""
        super().check_unchanged()
        self.memory.checkpoint.check_unchanged()

    def close(self) -> None:
        """Do nothing: the files belong to the two it was made of."""
