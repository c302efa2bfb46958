"""What `recall` moved, on disk: one private file, one tensor for each stored tensor that it moved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from liborth_cli.checkpoint.files import write_file
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.writer import write_tensors
from liborth_cli.curvature.factors import FILE_MODE, GUARDS

STEM = "edit"
FILE = f"{STEM}.safetensors"


class EditSet:
    """An edit Δ of some stored tensors, read one at a time.

    Attributes:
        path: its private directory.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint) -> None:
        """Wrap a file that is already open."""
        self.path, self._checkpoint = path, checkpoint

    @classmethod
    def open(cls, path: Path) -> EditSet:
        """Open an edit without reading any of it.

        Raises:
            BadInput: when it is none, or damaged.
        """
        return cls(path, Checkpoint.open(path, stem=STEM))

    @staticmethod
    def write(path: Path, moved: Mapping[str, torch.Tensor]) -> None:
        """Write an edit into a private directory that is there; the file appears when it is whole.

        Args:
            path: the directory, 0700.
            moved: stored tensor → Δ, of its shape, float32.
        """
        for name, text in GUARDS.items():
            write_file(path / name, text, FILE_MODE)
        write_tensors(path / FILE, moved, FILE_MODE)

    @property
    def identity(self) -> list[object]:
        """What identifies it, for --resume."""
        return [shard.identity for shard in self._checkpoint.shards.values()]

    def holds(self, tensor: str) -> bool:
        """Tell whether a stored tensor was moved."""
        return tensor in self._checkpoint.tensors

    def of(self, tensor: str, number: int) -> torch.Tensor:
        """Read Δ of one matrix of a stored tensor, as it lies there, (rows, columns), float32."""
        shape = self._checkpoint.tensors[tensor].shape[-2:]
        size = shape[0] * shape[1]
        return self._checkpoint.load_elements(tensor, number * size, (number + 1) * size).view(*shape)

    def __enter__(self) -> EditSet:
        """Return the edit."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._checkpoint.close()
