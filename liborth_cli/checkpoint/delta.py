"""The memory delta: the bits that turn the general checkpoint back into the fine-tuned one.

For every tensor that a split changed, the memory file holds bits(W_f) XOR bits(W_g). XOR is exact for every dtype and
bit pattern, −0.0 and NaN payloads included, where a floating-point difference is not. Three kinds of entries:

    xor/<tensor>     the XOR, as integers of the tensor's width, in the tensor's shape
    whole/<tensor>   a tensor that only the fine-tuned checkpoint has and that was kept out of the general one
    frame/<file>     the exact header bytes of a fine-tuned shard (or its index), so that whole files come back identical

In a packed file (version 2) ulp/<tensor> stands for xor/<tensor>: the same difference in less space (checkpoint/packed.py).

A model with more neurons than the general one is the general one with longer matrices: rows and columns that follow
those of its tensors, so that taking the neurons out is exact. `tune` writes them as

    rows/<tensor>            what follows the tensor's last row (its last element, for a vector)
    columns/<tensor>         what follows the last column of every row
    scaled-rows/<tensor>, scaled-columns/<tensor>    the same, for weights that β multiplies: those out of a neuron
    sidecar/<file>           a file beside the weights as it reads with the neurons in (config.json)
    router/<name>, tokens/<name>    what no ordinary checkpoint has a place for: gates, and embeddings that stand before a text

There is one memory shard for each general shard, and it names the sha256 of the file it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from liborth_kernels import interpolate_numpy

from liborth_cli.checkpoint import header, layout, packed
from liborth_cli.checkpoint.dtypes import DTYPES, as_bytes, as_tensor
from liborth_cli.checkpoint.files import Written
from liborth_cli.checkpoint.reader import Checkpoint, Shard, TensorInfo
from liborth_cli.checkpoint.writer import Coming, ShardWriter
from liborth_cli.errors import BadInput, PairMismatch, UsageError

XOR, ULP, WHOLE, FRAME = "xor/", "ulp/", "whole/", "frame/"
ROWS, COLUMNS, SCALED_ROWS, SCALED_COLUMNS = "rows/", "columns/", "scaled-rows/", "scaled-columns/"
SIDECAR, ROUTER, TOKENS = "sidecar/", "router/", "tokens/"
KINDS = {ROWS: (0, False), COLUMNS: (1, False), SCALED_ROWS: (0, True), SCALED_COLUMNS: (1, True)}
"""prefix → (axis the tensor grows along, whether β multiplies what is added)."""
PIECE_ROWS = 256
VERSION, PACKED = "memory/1", "memory/2"
PLAIN = "xor"
MODE = 0o600


def metadata(shard: str, sha256: str = "0" * 64) -> dict[str, str]:
    """Return the `__metadata__` of the memory shard that belongs to one general file."""
    return {"format": "pt", "liborth": VERSION, "general": shard, "general_sha256": sha256}


def xor(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Combine two byte arrays (uint8, same length); applied twice it gives the first one back."""
    return np.bitwise_xor(a, b)


@dataclass(frozen=True)
class Growth:
    """What a memory adds to one tensor.

    Attributes:
        entry: where it lies in the memory file.
        axis: 0 for rows, 1 for columns.
        scaled: whether β multiplies it.
    """

    entry: TensorInfo
    axis: int
    scaled: bool

    def widen(self, tensor: TensorInfo) -> TensorInfo:
        """Return the tensor as it is with the neurons in.

        Raises:
            PairMismatch: when the two do not fit.
        """
        mine, other = list(self.entry.shape), list(tensor.shape)
        if len(mine) != len(other) or len(mine) <= self.axis or self.entry.dtype != tensor.dtype:
            raise PairMismatch(f"{self.entry.name!r} in the memory file does not fit the general checkpoint")
        added, before = mine.pop(self.axis), other.pop(self.axis)
        if mine != other:
            raise PairMismatch(f"{self.entry.name!r} in the memory file does not fit the general checkpoint")
        shape = (*tensor.shape[: self.axis], before + added, *tensor.shape[self.axis + 1 :])
        return replace(tensor, shape=shape, nbytes=tensor.nbytes + self.entry.nbytes)

    def pieces(self, general: Checkpoint, memory: Checkpoint, name: str, beta: float) -> Iterator[np.ndarray]:
        """Yield the bytes of the grown tensor, a few rows at a time.

        Args:
            general: has the tensor.
            memory: has what is added.
            name: of the tensor.
            beta: what the scaled weights are multiplied by; 1 leaves every bit as it is.
        """
        old, columns = general.tensors[name], self.axis == 1
        rows = old.shape[0]
        width = old.nbytes // rows
        added = self.entry.nbytes // rows if columns else 0
        for start in range(0, rows, PIECE_ROWS):
            stop = min(start + PIECE_ROWS, rows)
            part = general.read(name, start * width, stop * width)
            if columns:
                more = self._read(memory, start * added, stop * added, beta)
                part = np.concatenate([part.reshape(stop - start, -1), more.reshape(stop - start, -1)], 1).reshape(-1)
            yield part
        if not columns:
            yield self._read(memory, 0, self.entry.nbytes, beta)

    def _read(self, memory: Checkpoint, start: int, stop: int, beta: float) -> np.ndarray:
        bits = memory.read(self.entry.name, start, stop)
        return blend(np.zeros_like(bits), bits, beta, self.entry.dtype) if self.scaled else bits


def blend(general: np.ndarray, finetuned: np.ndarray, beta: float, dtype: str) -> np.ndarray:
    """Return round(W_g + β·(W_f − W_g)): the one definition of the weights at β.

    Args:
        general: bits of W_g, uint8.
        finetuned: bits of W_f, uint8, same length.
        beta: how much memory; 1 gives W_f to the bit.
        dtype: safetensors dtype of both; arithmetic is float64 for fp32 and wider, else float32.

    Returns:
        Bits of the result, uint8.
    """
    if beta == 1.0:
        return finetuned
    if dtype in interpolate_numpy.SUPPORTED:
        return interpolate_numpy.interpolate(general, finetuned, beta, dtype)
    from liborth_kernels.interpolate import interpolate

    return as_bytes(interpolate(as_tensor(general, dtype), as_tensor(finetuned, dtype), beta))


class Memory:
    """An open memory file (or set of shards); close it, or use it in a `with`.

    Attributes:
        checkpoint: its tensors.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Check that every shard is a memory shard of a version we know.

        Raises:
            BadInput: when it is something else.
        """
        self.checkpoint = checkpoint
        self._by_general: dict[str, Shard] = {}
        self._heads: dict[str, packed.Head] = {}
        self._last = ("", 0, np.empty(0, np.uint8))
        for shard in checkpoint.shards.values():
            if shard.metadata.get("liborth") not in (VERSION, PACKED) or not {"general", "general_sha256"} <= set(
                shard.metadata
            ):
                raise BadInput(f"{shard.path}: not a memory file that this version of liborth can read")
            self._by_general[shard.metadata["general"]] = shard

    @classmethod
    def open(cls, place: Path) -> Memory:
        """Open the memory in a directory, or a single memory file.

        Raises:
            BadInput: when it is something else, or damaged.
        """
        return cls(Checkpoint.open(place, stem="memory"))

    def reattach(self, name: str, general: np.ndarray, start: int = 0) -> np.ndarray:
        """Return bits(W_f) of one tensor, from byte `start` on, for those of W_g; the very same where nothing was changed.

        Raises:
            BadInput: when a packed tensor is damaged.
        """
        if XOR + name in self.checkpoint.tensors:
            return xor(general, self.checkpoint.read(XOR + name, start, start + len(general)))
        return self._unpack(name, general, start) if ULP + name in self.checkpoint.tensors else general

    @cached_property
    def changes(self) -> set[str]:
        """Names of the tensors that it changes and the general checkpoint has."""
        return {name.partition("/")[2] for name in self.checkpoint.tensors if name.startswith((XOR, ULP))}

    def _head(self, name: str) -> packed.Head:
        """Return the layout of a packed tensor."""
        entry, where = self.checkpoint.tensors[ULP + name], f"{self.checkpoint.path}: {name!r}"
        if name not in self._heads:
            self._heads[name] = packed.Head.read(
                lambda first, stop: self.checkpoint.read(entry.name, first, stop), entry.nbytes, where
            )
        return self._heads[name]

    def _unpack(self, name: str, general: np.ndarray, start: int) -> np.ndarray:
        head = self._head(name)
        first, last = start // head.width, (start + len(general)) // head.width
        found = np.empty_like(general)
        for number in range(first // head.block, -(-last // head.block)):
            base = number * head.block
            low, high = max(first, base), min(last, base + head.block)
            here = slice((low - first) * head.width, (high - first) * head.width)
            found[here] = packed.unpack(self._codes(name, number)[low - base : high - base], general[here], head)
        return found

    def _codes(self, name: str, number: int) -> np.ndarray:
        """Return what one block holds; the last one stays, for reads that end within it."""
        head, held = self._head(name), self._last
        if held[:2] != (name, number):
            start, stop = int(head.offsets[number]), int(head.offsets[number + 1])
            block = self.checkpoint.read(ULP + name, start, stop).tobytes()
            count = min(head.block, head.count - number * head.block)
            held = self._last = (name, number, packed.codes(block, head, count, f"{self.checkpoint.path}: {name!r}"))
        return held[2]

    def check_fits(self, general: Checkpoint) -> None:
        """Compare names, shapes and widths with the general checkpoint's, from headers alone.

        Raises:
            PairMismatch: when the memory was made for another checkpoint.
        """
        strangers = set(self._by_general) - set(layout.keep(general))
        if strangers:
            raise PairMismatch(f"{self.checkpoint.path}: belongs to a file {min(strangers)!r} that is not here")
        for t in self.checkpoint.tensors.values():
            if t.name.startswith(XOR):
                mine = general.tensors.get(t.name.removeprefix(XOR))
                if mine is None or (mine.shape, DTYPES[mine.dtype].bit_view) != (t.shape, t.dtype):
                    raise PairMismatch(f"{self.checkpoint.path}: {t.name!r} does not fit the general checkpoint")
            if t.name.startswith(ULP):
                mine = general.tensors.get(t.name.removeprefix(ULP))
                if mine is None or self._head(t.name.removeprefix(ULP)).nbytes != mine.nbytes:
                    raise PairMismatch(f"{self.checkpoint.path}: {t.name!r} does not fit the general checkpoint")
        for name, grown in self.grown.items():
            if name not in general.tensors or name in self.changes:
                raise PairMismatch(f"{self.checkpoint.path}: {grown.entry.name!r} does not fit the general checkpoint")
            grown.widen(general.tensors[name])

    @cached_property
    def grown(self) -> dict[str, Growth]:
        """Tensor name → the rows or columns that only the memory has."""
        return find_growth(self.checkpoint)

    def widen(self, tensor: TensorInfo) -> TensorInfo:
        """Return a tensor of the general checkpoint as it is with the memory in."""
        return self.grown[tensor.name].widen(tensor) if tensor.name in self.grown else tensor

    def withheld(self) -> dict[str, list[TensorInfo]]:
        """Return the tensors that only the memory holds, under their own names, by the general file they belong to."""
        found: dict[str, list[TensorInfo]] = {}
        for t in self.checkpoint.tensors.values():
            if t.name.startswith(WHOLE):
                general = self.checkpoint.shards[t.shard].metadata["general"]
                found.setdefault(general, []).append(replace(t, name=t.name.removeprefix(WHOLE)))
        return found

    def check_belongs(self, general: Written) -> None:
        """Compare a general file's hash with the one this memory was made with.

        Raises:
            PairMismatch: when it is not, to the bit, the same file.
        """
        mine = self._by_general.get(general.name)
        if mine and mine.metadata["general_sha256"] != general.sha256:
            raise PairMismatch(
                f"{mine.path}: does not belong to this {general.name}, or one of the two was changed since the split"
            )

    def frame(self, name: str) -> bytes | None:
        """Return the exact header (or index) bytes of a fine-tuned file, or None when they were not kept."""
        entry = FRAME + name
        return self.checkpoint.read(entry).tobytes() if entry in self.checkpoint.tensors else None

    def close(self) -> None:
        """Close its files."""
        self.checkpoint.close()

    def __enter__(self) -> Memory:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close its files."""
        self.close()


def find_growth(memory: Checkpoint) -> dict[str, Growth]:
    """Return tensor name → what a memory file adds to it."""
    return {
        name.removeprefix(prefix): Growth(info, axis, scaled)
        for name, info in memory.tensors.items()
        for prefix, (axis, scaled) in KINDS.items()
        if name.startswith(prefix) and DTYPES[info.dtype].editable
    }


def sidecars(memory: Checkpoint) -> dict[str, bytes]:
    """Return the files beside the weights that read differently with the neurons in, by name.

    Raises:
        BadInput: when the memory names a file that it has no business with.
    """
    names = [name.removeprefix(SIDECAR) for name in memory.tensors if name.startswith(SIDECAR)]
    if set(names) - {"config.json"}:
        raise BadInput(f"{memory.path}: wants to write {min(set(names) - {'config.json'})!r} beside the weights; refused")
    return {name: memory.read(SIDECAR + name).tobytes() for name in names}


def holds(memory: Checkpoint, kind: str) -> bool:
    """Tell whether a memory has entries of a kind, such as `ROUTER`."""
    return any(name.startswith(kind) for name in memory.tensors)


def check_excisable(memory: Checkpoint) -> None:
    """Raise UsageError when the neurons work only behind a router, or the memory is tokens before the text."""
    if holds(memory, TOKENS):
        raise UsageError(
            f"{memory.path}: this memory is tokens before the text, which no checkpoint has a place for; "
            "load it with liborth_cli.tune.tokens.attach_tokens, or take --beta 0"
        )
    if holds(memory, ROUTER):
        raise UsageError(
            f"{memory.path}: this memory stands behind a router, which no checkpoint has a place for; "
            "load it with liborth_cli.tune.sinks.attach, or take --beta 0"
        )


def shard_names(general: list[str]) -> dict[str, str]:
    """Name the memory shard of each general shard."""
    if len(general) == 1:
        return {general[0]: "memory.safetensors"}
    return {name: f"memory-{i:05d}-of-{len(general):05d}.safetensors" for i, name in enumerate(general, 1)}


def pack(general: Path, memory: Path) -> Written:
    """Write a memory shard again with `ulp/` in place of `xor/`, a tensor at a time; it takes the old one's name.

    Args:
        general: the general file that it belongs to.
        memory: the shard.

    Raises:
        OutOfResources: when the disk cannot hold both.
    """
    alone = [Checkpoint(path, {path.name: Shard(path)}, None) for path in (general, memory)]  # one file of several
    with alone[0] as base, alone[1] as plain:
        (shard,) = plain.shards.values()
        told = {**shard.metadata, "liborth": PACKED}
        planned = [(packed_name(t.name), "U8", (packed.most(t.nbytes),)) for t in plain.tensors.values()]
        writer = ShardWriter(memory, planned, told, mode=MODE, coming=Coming.FEWER)
        for t in plain.tensors.values():
            if not t.name.startswith(XOR):
                writer.begin(t.name, t.dtype, t.shape)
                for start in range(0, t.nbytes, packed.BLOCK):
                    writer.write(plain.read(t.name, start, min(start + packed.BLOCK, t.nbytes)))
                continue
            name = t.name.removeprefix(XOR)
            parts = packed.pack(_both(base, plain, name), base.tensors[name].dtype)
            writer.begin(ULP + name, "U8", (sum(map(len, parts)),))
            for part in parts:
                writer.write(np.frombuffer(part, np.uint8))
        return writer.finish(told)


def packed_name(entry: str) -> str:
    """Return what an entry is called in a packed file."""
    return ULP + entry.removeprefix(XOR) if entry.startswith(XOR) else entry


def _both(general: Checkpoint, memory: Checkpoint, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield bits of W_g and of W_f, a block at a time."""
    info = general.tensors[name]
    step = packed.BLOCK * (DTYPES[info.dtype].bits // 8 or 1)
    for start in range(0, info.nbytes, step):
        stop = min(start + step, info.nbytes)
        bits = general.read(name, start, stop)
        yield bits, xor(bits, memory.read(XOR + name, start, stop))


def in_order_of(frame: bytes, tensors: list[TensorInfo], file: str) -> list[TensorInfo]:
    """Arrange tensors as the fine-tuned header did.

    Raises:
        PairMismatch: when the header names other tensors.
    """
    entries, _ = header.parse(frame[8:], sum(t.nbytes for t in tensors), f"the frame of {file}")
    by_name = {t.name: t for t in tensors}
    if {entry.name for entry in entries} != set(by_name):
        raise PairMismatch(f"{file}: the memory was made with other tensors")
    return [by_name[entry.name] for entry in entries]
