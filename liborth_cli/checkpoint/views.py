"""Checkpoints that need not exist: formed from others while they are read, tensor by tensor, never written.

Each looks like an open `Checkpoint`; the files belong to the ones it is made of, which close them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from liborth_cli.checkpoint import delta
from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput, UsageError


class Origin(Checkpoint):
    """Looks like a checkpoint with the tensors of another, all bits zero; has no files.

    With it a split edits W itself, as the published K-FAC edit does (Merullo et al. 2025, arXiv 2510.24256).
    """

    def __init__(self, model: Checkpoint) -> None:
        """Take names, shapes and dtypes from a model."""
        super().__init__(model.path, {}, None)
        self.tensors = model.tensors

    def read(self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Return zeros in place of bytes [start, stop) of a tensor; writes into `out` when given."""
        size = (self.tensors[name].nbytes if stop is None else stop) - start
        if out is None:
            return np.zeros(size, np.uint8)
        out[:size] = 0
        return out[:size]

    @property
    def nbytes(self) -> int:
        """Bytes to read: none."""
        return 0


class Reattached(Checkpoint):
    """What `liborth excise --beta` would write, to the bit, formed while it is read; at β = 1 the fine-tuned tensors.

    Attributes:
        memory: the delta.
        beta: how much of it.
    """

    def __init__(self, general: Checkpoint, memory: Memory, beta: float = 1.0) -> None:
        """Lay the memory over the general checkpoint; both stay open elsewhere.

        Raises:
            PairMismatch: when the memory was made for another checkpoint.
            UsageError: when the memory holds tensors that the general checkpoint has not.
        """
        super().__init__(general.path, general.shards, general.index)
        delta.check_excisable(memory.checkpoint)
        memory.check_fits(general)
        self.memory, self.beta = memory, beta
        if any(memory.withheld().values()) or memory.grown:
            raise UsageError(
                f"{memory.checkpoint.path}: holds tensors or neurons that the general checkpoint does not have; write the "
                "fine-tuned model with `liborth excise --beta 1` first"
            )

    def read(self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Read bytes [start, stop) of one tensor, whole elements; see `Checkpoint.read`."""
        bits = super().read(name, start, stop, out)
        finetuned = self.memory.reattach(name, bits, start)
        if finetuned is not bits and self.beta != 0.0:
            bits[:] = delta.blend(bits, finetuned, self.beta, self.tensors[name].dtype)
        return bits

    def check_unchanged(self) -> None:
        """Raise BadInput when a file of either changed since it was opened."""
        super().check_unchanged()
        self.memory.checkpoint.check_unchanged()

    def close(self) -> None:
        """Do nothing: the files belong to the two it was made of."""


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
        delta.check_excisable(memory.checkpoint)
        memory.check_fits(general)
        super().__init__(folder, general.shards, general.index)
        self.memory, self.beta, self._general = memory, beta, general
        self.tensors = {name: memory.widen(info) for name, info in general.tensors.items()}
        sidecars = delta.sidecars(memory.checkpoint)
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
