"""Where block inputs wait between the forward and the backward walk: in memory, or in a file nobody else sees."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from liborth_cli.checkpoint.dtypes import as_bytes
from liborth_cli.console import size
from liborth_cli.errors import NO_SPACE, OutOfResources, OutputConflict


class Store(Protocol):
    """Slots for activations: slot (batch, level) holds the input of block `level`, later the gradient that leaves it."""

    def put(self, batch: int, level: int, value: torch.Tensor) -> None:
        """Fill a slot; what it held is forgotten."""
        ...

    def get(self, batch: int, level: int) -> torch.Tensor:
        """Return what the slot holds; the caller must not change it."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


def open_store(folder: Path | None, sizes: Sequence[int], levels: int) -> Store:
    """Return slots in memory, or in a file in a folder.

    Args:
        folder: where the file goes; None keeps tensors in memory.
        sizes: bytes of one slot, for each batch.
        levels: slots of each batch.
    """
    return MemoryStore() if folder is None else FileStore(folder, sizes, levels)


class MemoryStore:
    """Slots that are tensors."""

    def __init__(self) -> None:
        """Start empty."""
        self._slots: dict[tuple[int, int], torch.Tensor] = {}

    def put(self, batch: int, level: int, value: torch.Tensor) -> None:
        """Keep the tensor."""
        self._slots[batch, level] = value

    def get(self, batch: int, level: int) -> torch.Tensor:
        """Return the tensor."""
        return self._slots[batch, level]

    def drop(self, batch: int, level: int) -> None:
        """Forget one slot."""
        del self._slots[batch, level]

    def close(self) -> None:
        """Drop all tensors."""
        self._slots.clear()


class FileStore:
    """Slots in one unlinked file: gone when the process is, however it ends."""

    def __init__(self, folder: Path, sizes: Sequence[int], levels: int) -> None:
        """Reserve the space.

        Args:
            folder: where the file goes.
            sizes: bytes of one slot, for each batch.
            levels: slots of each batch.

        Raises:
            OutOfResources: when the disk cannot hold it.
            OutputConflict: when the folder cannot be written to.
        """
        self._sizes, self._starts, total = list(sizes), [], 0
        for each in sizes:
            self._starts.append(total)
            total += each * levels
        self._like: dict[int, tuple[torch.Size, torch.dtype, torch.device]] = {}
        try:
            self._file = tempfile.TemporaryFile(prefix="liborth-scratch-", dir=folder)  # noqa: SIM115
        except OSError as error:
            raise OutputConflict(f"--scratch {folder}: cannot be written to ({error.strerror})") from None
        try:
            os.posix_fallocate(self._file.fileno(), 0, max(total, 1))
        except OSError as error:
            self._file.close()
            if error.errno in NO_SPACE:
                raise OutOfResources(
                    f"--scratch {folder}: {size(total)} of block inputs do not fit ({error.strerror}); "
                    "free some, or ask for smaller groups with --group-tokens"
                ) from None
            raise OutputConflict(f"--scratch {folder}: cannot be written to ({error.strerror})") from None

    def put(self, batch: int, level: int, value: torch.Tensor) -> None:
        """Write the tensor's bytes."""
        self._like[batch] = (value.shape, value.dtype, value.device)
        view, start, done = memoryview(as_bytes(value).data), self._starts[batch] + level * self._sizes[batch], 0
        try:
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], start + done)
        except OSError as error:
            raise OutOfResources(f"the scratch file cannot be written ({error.strerror})") from None

    def get(self, batch: int, level: int) -> torch.Tensor:
        """Read the bytes back into a fresh tensor."""
        shape, dtype, device = self._like[batch]
        flat = torch.empty(shape, dtype=dtype)
        view, start, done = memoryview(flat.view(-1).view(torch.uint8).numpy().data), self._starts[batch], 0
        start += level * self._sizes[batch]
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], start + done)
            if not count:
                raise OutOfResources("the scratch file became shorter while it was read")
            done += count
        return flat.to(device)

    def close(self) -> None:
        """Close the file, which removes it."""
        self._file.close()
