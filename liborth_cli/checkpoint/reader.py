"""Read a checkpoint: headers first, then any byte range of any tensor, never a model.

Bytes come through `os.preadv` into buffers the caller owns. A memory map would kill the process with SIGBUS when a
file shrinks under it, and fresh buffers cost more in page faults than the read itself (docs/decisions/0002).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from liborth_cli.checkpoint import documents, header
from liborth_cli.checkpoint.dtypes import DTYPES, as_tensor
from liborth_cli.checkpoint.refusals import CONVERT, no_checkpoint, refuse_adapter, refuse_one_of_many
from liborth_cli.errors import BadInput, from_os, shown

if TYPE_CHECKING:
    import torch

MAX_CONFIG_BYTES = 10_000_000
PIECE = 1 << 18
"""Elements handled at a time in elementwise work: small enough for the cache, large enough for the call."""
DEVICE_PIECE = 1 << 24
"""The same on a GPU, where a piece is a transfer and a few launches."""


def pieces(first: int, last: int, piece: int = PIECE) -> Iterator[tuple[int, int]]:
    """Cut a range of elements into pieces."""
    for start in range(first, last, piece):
        yield start, min(start + piece, last)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: the tensor's name.
        dtype: its safetensors dtype.
        shape: its shape.
        shard: name of the file that holds it.
        offset: its first byte in that file.
        nbytes: its size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    nbytes: int


class Shard:
    """One open safetensors file whose header has been checked.

    Attributes:
        path: the file.
        name: its base name.
        header: its first bytes, length included, up to the data.
        entries: its tensors, in the order of their data.
        metadata: its `__metadata__`.
        size: its size in bytes when opened.
        stamp: what the file was when opened.
        on_read: told of every read: its first byte, counted within the file, and its bytes.
    """

    on_read: Callable[[int, np.ndarray], None] | None = None

    def __init__(self, path: Path) -> None:
        """Open `path` and check its header.

        Raises:
            BadInput: when the file cannot be read or is not what it claims to be.
        """
        self.path, self.name = path, path.name
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise from_os(error, path, "read", BadInput) from None
        try:
            self.stamp = stamp(self._fd)
            self.size = self.stamp[1]
            prefix = self._first(8, 0)
            length = int.from_bytes(prefix, "little")
            foreign = prefix[:2] in (b"PK", b"\x80\x02") and length > header.MAX_HEADER_BYTES  # a header may be 640 bytes
            if len(prefix) < 8 or foreign or length > self.size - 8:
                raise BadInput(f"{path}: {self._why_not(prefix, length)}")
            if length > header.MAX_HEADER_BYTES:
                raise BadInput(f"{path}: the header claims {length:,} bytes; {header.MAX_HEADER_BYTES:,} are allowed")
            self.header = prefix + self._first(length, 8)
            self.entries, self.metadata = header.parse(self.header[8:], self.size - 8 - length, str(path))
        except BaseException:
            self.close()
            raise

    def read_into(self, buffer: np.ndarray, offset: int) -> None:
        """Fill `buffer` (uint8) from the file, starting at byte `offset`.

        Raises:
            BadInput: when the file ends early or the disk fails.
        """
        view, done = buffer.data, 0
        try:
            while done < len(view):
                if not (count := os.preadv(self._fd, [view[done:]], offset + done)):
                    raise BadInput(f"{self.path}: the file became shorter while it was read; start again")
                done += count
        except OSError as error:
            raise from_os(error, self.path, "read", BadInput) from None
        if self.on_read:
            self.on_read(offset, buffer)

    def check_unchanged(self) -> None:
        """Raise BadInput when the file is no longer the one that was opened."""
        try:
            now = os.stat(self.path)
            same = stamp(self._fd) == self.stamp and (now.st_dev, now.st_ino) == self.stamp[2:]
        except OSError:
            same = False
        if not same:
            raise BadInput(f"{self.path}: the file changed while it was read; start again when nothing writes to it")

    @property
    def identity(self) -> tuple[str, int, int]:
        """Name, size and modification time (ns): enough to notice that a resumed run has other inputs."""
        return (self.name, self.size, self.stamp[0])

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _first(self, length: int, offset: int) -> bytes:
        """Read bytes of the header, all that are there: a read may bring fewer than it was asked for."""
        found = b""
        try:
            while len(found) < length and (piece := os.pread(self._fd, length - len(found), offset + len(found))):
                found += piece
        except OSError as error:
            raise from_os(error, self.path, "read", BadInput) from None
        return found

    def _why_not(self, prefix: bytes, length: int) -> str:
        if prefix[:2] in (b"PK", b"\x80\x02"):
            return f"this is a pickle, which can run code when loaded; {CONVERT}"
        if prefix[:4] == b"GGUF":
            return "this is a GGUF file; Transformers makes a checkpoint of it (from_pretrained, with gguf_file)"
        if length > 1 << 40 or len(prefix) < 8:
            return "not a safetensors file"
        return f"truncated, or not safetensors: the header claims {length:,} bytes and the file has {self.size:,}"


def stamp(fd: int) -> tuple[int, int, int, int]:
    """Return modification time (ns), size, device and inode of an open file: the same later, the same content."""
    stat = os.fstat(fd)
    return (stat.st_mtime_ns, stat.st_size, stat.st_dev, stat.st_ino)


class Checkpoint:
    """A directory (or one file) of safetensors shards, opened and checked.

    Attributes:
        path: the directory or file.
        shards: file name → `Shard`, in name order.
        tensors: tensor name → `TensorInfo`, shard by shard in the order of the data.
        index: the bytes of the index file, or None when there is one shard without.
        scales: weight → its scales, of those whose numbers are decoded (blockscaled.py); none are here.
    """

    scales: Mapping[str, str] = MappingProxyType({})

    def __init__(self, path: Path, shards: dict[str, Shard], index: bytes | None) -> None:
        """Collect the tensors of shards that are already open."""
        self.path, self.shards, self.index = path, shards, index
        self.tensors: dict[str, TensorInfo] = {}
        for shard in shards.values():
            base = len(shard.header)
            for e in shard.entries:
                if e.name in self.tensors:
                    raise BadInput(
                        f"{shard.path}: tensor {shown(e.name)} is also in {self.tensors[e.name].shard}; "
                        "refusing to guess which is meant"
                    )
                self.tensors[e.name] = TensorInfo(e.name, e.dtype, e.shape, shard.name, base + e.start, e.nbytes)

    @classmethod
    def open(cls, path: Path, stem: str = "model") -> Checkpoint:
        """Open `path` and check every header, without reading any data.

        Args:
            path: a directory with `<stem>.safetensors` or `<stem>.safetensors.index.json`, or one .safetensors file.
            stem: what the files are called.

        Returns:
            The open checkpoint; close it, or use it in a `with`.

        Raises:
            BadInput: when there is no checkpoint, or it is damaged, unsafe or ambiguous.
        """
        path = Path(path)
        single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
        try:
            if stem == "model":
                refuse_adapter(path)
            if path.is_file():
                refuse_one_of_many(path, stem)
                return cls(path, {path.name: Shard(path)}, None)
            if not path.is_dir():
                raise BadInput(f"{path}: no such file or directory")
            if not index.is_file():
                if not single.is_file():
                    raise BadInput(no_checkpoint(path, stem))
                return cls(path, {single.name: Shard(single)}, None)
            raw = documents.read_small(index)
            names = weight_map(raw, index)
            files = shard_files(names, path, stem)
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
        if single.is_file() and single.name not in files:
            raise BadInput(
                f"{path}: both {single.name} and {index.name} are here, and the index names {files[0]}; "
                "remove the one that is not meant"
            )
        shards: dict[str, Shard] = {}
        try:
            for name in files:
                shards[name] = Shard(path / name)
            checkpoint = cls(path, shards, raw)
            check_index(names, {t.name: t.shard for t in checkpoint.tensors.values()}, index)
        except BaseException:
            for shard in shards.values():
                shard.close()
            raise
        return checkpoint

    def read(self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Read bytes [start, stop) of one tensor.

        Args:
            name: the tensor.
            start: first byte, counted within the tensor.
            stop: one past the last byte; the tensor's end when None.
            out: buffer to read into, uint8, at least stop − start long; a fresh one when None.

        Returns:
            The bytes, uint8, (stop − start,); a view of `out` when given.
        """
        info = self.tensors[name]
        size = (info.nbytes if stop is None else stop) - start
        buffer = np.empty(size, np.uint8) if out is None else out[:size]
        self.shards[info.shard].read_into(buffer, info.offset + start)
        return buffer

    def read_elements(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read the bits of elements [start, stop) of one tensor, uint8."""
        width = DTYPES[self.tensors[name].dtype].bits // 8
        return self.read(name, start * width, stop * width)

    def load_elements(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Load elements [start, stop) of one tensor, flat."""
        return as_tensor(self.read_elements(name, start, stop), self.tensors[name].dtype)

    def load(self, name: str) -> torch.Tensor:
        """Load one whole tensor, in its shape and dtype."""
        info = self.tensors[name]
        return as_tensor(self.read(name), info.dtype).reshape(info.shape)

    def check_unchanged(self) -> None:
        """Raise BadInput when any file changed since it was opened."""
        for shard in self.shards.values():
            shard.check_unchanged()

    def frame(self, file: str) -> bytes | None:
        """Return the exact first bytes of a file of the kept layout, or None where there is no such file."""
        shard = self.shards.get(file) or (next(iter(self.shards.values())) if self.index is None else None)
        return shard.header if shard else None

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the files beside the weights lie; of two of a name the later folder's counts."""
        return (self.path if self.path.is_dir() else self.path.parent,)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json, or an empty dict.

        Raises:
            BadInput: when config.json is not a JSON object.
        """
        file = self.folders[0] / "config.json"
        return documents.load_object(file, MAX_CONFIG_BYTES) if file.is_file() else {}

    @property
    def rewritten(self) -> dict[str, bytes]:
        """What files beside the weights have to say otherwise than they do in `folders`, by name."""
        return {}

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(t.nbytes for t in self.tensors.values())

    def close(self) -> None:
        """Close every shard."""
        for shard in self.shards.values():
            shard.close()

    def __enter__(self) -> Checkpoint:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close every shard."""
        self.close()


def named_shards(sides: Mapping[str, Checkpoint]) -> dict[str, Shard]:
    """Return every weight file of several checkpoints, by the name that a run's records have for it: side/file."""
    return {f"{side}/{name}": shard for side, checkpoint in sides.items() for name, shard in checkpoint.shards.items()}


def weight_map(raw: bytes, index: Path) -> dict[str, str]:
    """Parse an index file into tensor name → shard name.

    Raises:
        BadInput: when it is not an index, or names a tensor twice.
    """
    try:
        found = documents.parse(raw)
    except documents.NotJson as error:
        raise BadInput(f"{index}: not a safetensors index: {error}") from None
    found = found.get("weight_map") if isinstance(found, dict) else None
    if not found or not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise BadInput(f"{index}: not a safetensors index (no weight_map of tensor names to files)")
    return found


def shard_files(names: Mapping[str, str], folder: Path, stem: str) -> list[str]:
    """List the shards an index names, each once, in name order.

    Raises:
        BadInput: when a name could leave the directory, a shard is missing, or one is there that is not named.
    """
    shards = sorted(set(names.values()))
    for name in shards:
        plain = name == os.path.basename(name) and "\\" not in name and name.isprintable() and len(name.encode()) < 256
        if not plain or not name.endswith(".safetensors"):
            raise BadInput(f"{folder}: the index names the file {shown(name)}; only plain *.safetensors names are allowed")
        if not (folder / name).is_file():
            raise BadInput(f"{folder / name}: the index names this shard and it is missing; download it again")
    pattern = re.compile(re.escape(stem) + r"-\d+-of-\d+\.safetensors")
    for file in sorted(folder.iterdir()):
        if pattern.fullmatch(file.name) and file.name not in shards:
            raise BadInput(f"{file}: this shard is not in the index; remove it or repair the index")
    return shards


def check_index(names: Mapping[str, str], held: Mapping[str, str], index: Path) -> None:
    """Compare what the index says with what the shards hold (both: tensor name → shard name).

    Raises:
        BadInput: when they differ either way.
    """
    for name, shard in names.items():
        if held.get(name) != shard:
            raise BadInput(f"{index}: says tensor {shown(name)} is in {shard}, which does not hold it")
    for name, shard in held.items():
        if name not in names:
            raise BadInput(f"{index}: does not name tensor {shown(name)} of {shard}; repair the index")
