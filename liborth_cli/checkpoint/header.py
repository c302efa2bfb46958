"""The safetensors header: parse it without trust, build it byte for byte.

A file is eight bytes of little-endian header length N, N bytes of JSON, then the data. We parse it ourselves
because the library accepts what an attacker would send: duplicate keys, and gigabytes of JSON.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from liborth_cli.checkpoint import documents
from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.errors import BadInput, shown

MAX_HEADER_BYTES = 25_000_000
MAX_TENSORS = 1_000_000
MAX_NAME = 1000
MAX_DIMENSIONS = 32
MAX_ELEMENTS = 1 << 60
PT_METADATA = {"format": "pt"}
"""The one metadata entry Transformers asks for; files with a single entry have one byte layout."""


@dataclass(frozen=True)
class Entry:
    """One tensor of one file.

    Attributes:
        name: the tensor's name.
        dtype: its safetensors dtype, a key of `DTYPES`.
        shape: its shape.
        start: first byte, counted from the beginning of the data.
        stop: one past the last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the size in bytes of a tensor of this dtype and shape."""
    return math.prod(shape) * DTYPES[dtype].bits // 8


def parse(raw: bytes, data_bytes: int, where: str) -> tuple[tuple[Entry, ...], dict[str, str]]:
    """Read a header and check everything it claims.

    Args:
        raw: the JSON bytes, without the eight bytes of length.
        data_bytes: how many bytes follow the header in the file.
        where: the file's name, for the error line.

    Returns:
        The entries in the order of their data, and the metadata.

    Raises:
        BadInput: when anything is malformed, out of bounds, overlapping, or leaves a hole.
    """
    try:
        document = documents.parse(raw)
    except documents.NotJson as error:
        raise BadInput(f"{where}: the header of this file: {error}; it is damaged or not safetensors") from None
    if not isinstance(document, dict):
        raise BadInput(f"{where}: the header is not a JSON object")
    metadata = document.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # null is what the safetensors library reads as none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadInput(f"{where}: __metadata__ is not a map of strings")
    if len(document) > MAX_TENSORS:
        raise BadInput(f"{where}: {len(document):,} tensors, more than the {MAX_TENSORS:,} allowed")
    entries = sorted((_entry(name, value, where) for name, value in document.items()), key=lambda e: (e.start, e.stop))
    position = 0
    for entry in entries:
        if entry.start != position:
            raise BadInput(f"{where}: tensor {shown(entry.name)} overlaps its neighbour or leaves a hole before it")
        position = entry.stop
    if position > data_bytes:
        raise BadInput(f"{where}: truncated, {position - data_bytes:,} bytes are missing; download it again")
    if position < data_bytes:
        raise BadInput(f"{where}: {data_bytes - position:,} bytes follow the last tensor that no tensor owns")
    return tuple(entries), metadata


def build(entries: Iterable[Entry], metadata: Mapping[str, str] = PT_METADATA, reserve: int = 0) -> bytes:
    """Return the file's first bytes, length included, laid out as `safetensors.save_file` does.

    Args:
        entries: the tensors, in the order of their data.
        metadata: the `__metadata__` map.
        reserve: pad with spaces to at least this many bytes in total.

    Returns:
        Eight bytes of length and the JSON, padded with spaces to a multiple of eight.
    """
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry in entries:
        document[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.stop],
        }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    length = max(-(-len(text) // 8) * 8, reserve - 8)
    return length.to_bytes(8, "little") + text.ljust(length)


def plan(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[Entry, ...]:
    """Give (name, dtype, shape) triples their offsets, one after the other in the order given."""
    entries, position = [], 0
    for name, dtype, shape in tensors:
        stop = position + nbytes(dtype, shape)
        entries.append(Entry(name, dtype, tuple(shape), position, stop))
        position = stop
    return tuple(entries)


def _entry(name: str, value: Any, where: str) -> Entry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        raise BadInput(f"{where}: tensor {shown(name)} has a malformed header entry")
    if len(shape) > MAX_DIMENSIONS or any(type(n) is not int for n in (*shape, *offsets)):
        raise BadInput(f"{where}: tensor {shown(name)} has a malformed header entry")
    if dtype not in DTYPES:
        raise BadInput(f"{where}: tensor {shown(name)} has the unknown dtype {shown(dtype)}; a newer liborth may know it")
    start, stop = offsets
    sound = min(*shape, start, stop) >= 0 and math.prod(n or 1 for n in shape) < MAX_ELEMENTS
    if not sound or math.prod(shape) * DTYPES[dtype].bits != 8 * (stop - start):
        raise BadInput(f"{where}: tensor {shown(name)} of {dtype} {shown(shape)} does not fill its bytes")
    if len(name) > MAX_NAME:
        raise BadInput(f"{where}: tensor {shown(name)} has a name of {len(name):,} letters; {MAX_NAME:,} are allowed")
    return Entry(name, dtype, tuple(shape), start, stop)
