"""The reference of a split that has none: zero everywhere, so that the update is the weight itself."""

from __future__ import annotations

import numpy as np

from liborth_cli.checkpoint.reader import Checkpoint


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
