"""Tensors, plain data and files from one rank to another, as messages of bytes; who carries them is given."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch

HOST = "cpu"
BUCKET = 1 << 26
"""Bytes of sums that go in one message, unless a single one is larger."""
PIECE = 1 << 24
"""Bytes of a piece of a file that is sent."""
HEAD = 128
"""Bytes in front of a tensor that say its shape and dtype."""
SUMS = 1
"""Tag of what `reduce_to` sends, so that a thread may do that beside other tensors."""


class Wire(Protocol):
    """Carries bytes between ranks, in the order in which they are sent under one tag."""

    def send(self, tensor: torch.Tensor, to: int, tag: int) -> None:
        """Send these bytes."""
        ...

    def recv(self, tensor: torch.Tensor, source: int, tag: int) -> None:
        """Fill these bytes with what a rank has sent."""
        ...


class Tensors:
    """What one rank sends to others and gets from them.

    Attributes:
        rank: this one.
        size: how many there are.
        place: where sums come from and go to: the rank's own GPU, or host memory, where all else goes through.
    """

    def __init__(self, rank: int, size: int, wire: Wire) -> None:
        """Send nothing yet."""
        self.rank, self.size, self.place, self._wire = rank, size, HOST, wire

    def reduce_to(self, owner: int, sums: dict[str, torch.Tensor], joined: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Add up tensors by name on one rank, in the order of the ranks; see `World.reduce_to`."""
        import torch

        if self.rank != owner:
            self.send_sums(sums, owner)
            return {}
        device = next((tensor.device for tensor in sums.values()), torch.device("cpu"))
        total: dict[str, torch.Tensor] = {}
        for source in range(self.size):
            mine = ((name, sums.pop(name)) for name in list(sums))
            for name, tensor in mine if source == owner else self.receive_sums(source):
                _add(total, name, tensor.to(device), joined)
        return total

    def send_sums(self, sums: dict[str, torch.Tensor], to: int) -> None:
        """Send tensors by name to one rank, many small ones in a message; taken as they go."""
        import torch

        self.send_value([(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in sums.items()], to, SUMS)
        for names in _buckets([(name, tensor.nbytes) for name, tensor in sums.items()]):
            flat = [sums.pop(name).detach().contiguous().view(-1).view(torch.uint8) for name in names]
            bucket = flat[0] if len(flat) == 1 else torch.cat(flat)
            self._wire.send(bucket.cpu() if self.place == HOST else bucket, to, SUMS)

    def receive_sums(self, source: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors that a rank sends, in its order; they come to `place`."""
        import torch

        kinds = {name: (shape, getattr(torch, dtype)) for name, shape, dtype in self.receive_value(source, SUMS)}
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in kinds.items()}
        for name in (name for name, size in sizes.items() if not size):
            yield name, torch.empty(kinds[name][0], dtype=kinds[name][1])
        for names in _buckets(list(sizes.items())):
            bucket = torch.empty(sum(sizes[name] for name in names), dtype=torch.uint8, device=self.place)
            self._wire.recv(bucket, source, SUMS)
            for name, part in zip(names, bucket.split([sizes[name] for name in names]), strict=True):
                shape, dtype = kinds[name]
                yield name, (part if len(names) == 1 else part.clone()).view(dtype).view(shape)

    def send_value(self, value: Any, to: int, tag: int) -> None:
        """Send plain data."""
        self.send(_tensor_of(packed(value)), to, tag)

    def receive_value(self, source: int, tag: int) -> Any:
        """Wait for plain data."""
        return unpacked(self.receive(source, tag).numpy().tobytes())

    def send(self, tensor: torch.Tensor, to: int, tag: int) -> None:
        """Send a tensor."""
        head = json.dumps([list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]).encode().ljust(HEAD)
        self._send(_tensor_of(head), to, tag)
        self._send(tensor, to, tag)

    def receive(self, source: int, tag: int) -> torch.Tensor:
        """Wait for a tensor; it comes in host memory."""
        import torch

        head = torch.empty(HEAD, dtype=torch.uint8)
        self._receive(head, source, tag)
        shape, dtype = json.loads(head.numpy().tobytes())
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        self._receive(tensor, source, tag)
        return tensor

    def send_file(self, path: Path, size: int, to: int, tag: int) -> None:
        """Send the bytes of a file."""
        with open(path, "rb", buffering=0) as file:
            for start in range(0, size, PIECE):
                self.send(_tensor_of(os.pread(file.fileno(), min(PIECE, size - start), start)), to, tag)

    def receive_file(self, source: int, size: int, tag: int) -> Iterator[memoryview]:
        """Yield the bytes of a file that a rank sends."""
        done = 0
        while done < size:
            piece = self.receive(source, tag).numpy().data
            done += len(piece)
            yield piece

    def _send(self, tensor: torch.Tensor, to: int, tag: int) -> None:
        import torch

        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        if len(flat):
            self._wire.send(flat, to, tag)

    def _receive(self, tensor: torch.Tensor, source: int, tag: int) -> None:
        import torch

        flat = tensor.view(-1).view(torch.uint8)
        if len(flat):
            self._wire.recv(flat, source, tag)


def _tensor_of(raw: bytes) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def packed(value: Any) -> bytes:
    """Write plain data as bytes."""
    import torch

    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def unpacked(raw: bytes) -> Any:
    """Read what a rank has sent or put into the store; data only, for whoever reaches the port can write there too."""
    import torch

    return torch.load(io.BytesIO(raw), weights_only=True)


def _buckets(sizes: Sequence[tuple[str, int]]) -> Iterator[list[str]]:
    """Put names with sizes, in their order, into buckets of at most `BUCKET` bytes; what has none is left out."""
    names, full = list[str](), 0
    for name, size in sizes:
        if names and full + size > BUCKET:
            yield names
            names, full = [], 0
        names, full = [*names, name] if size else names, full + size
    if names:
        yield names


def _add(total: dict[str, torch.Tensor], name: str, part: torch.Tensor, joined: tuple[str, ...]) -> None:
    import torch

    if name not in total:
        total[name] = part
    elif name.startswith(joined):
        total[name] = torch.cat([total[name], part])
    else:
        total[name].add_(part)
