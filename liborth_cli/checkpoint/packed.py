"""A smaller delta, still exact: how many units in the last place two tensors lie apart, in planes of bytes, deflated.

Numbers of one float format can be counted in the order of their values: each bit pattern has its place, −0 just before +0. From
the place of W_g to that of W_f it is few steps where the edit is small, so of their bytes the high ones are mostly zero and the
low one is skewed, where the XOR has bits all over. The sign of a step goes last (zigzag), bytes of one significance lie
together (a plane), and each plane is deflated by zlib where that makes it smaller. Steps wrap around: all bits can be reached.

A packed tensor, little-endian: width of an element in bytes, 1 for steps or 0 for XOR (uint8), two zeros, elements of a block
(uint32), elements in all (uint64), where each block begins and the last one ends (uint64), the blocks. A block is one plane
after the other, lowest byte first: 1 when it is deflated or 0 (uint8), its length (uint32), its bytes. Blocks are read singly.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.errors import BadInput

BLOCK = 1 << 18
"""Elements that are packed together."""
LEVEL, STRATEGY = 1, zlib.Z_RLE
"""Of zlib: planes have runs and a skewed histogram and no strings to find; what looks for these is slower and larger
(benchmarks/memory_file.py)."""
SIGNED = ("F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3")
"""Formats of a sign and a magnitude, which have an order; others are packed as their XOR."""
_HEAD, _PLANE = struct.Struct("<BBHIQ"), struct.Struct("<BI")
UNSIGNED = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


@dataclass(frozen=True)
class Head:
    """How a packed tensor is laid out.

    Attributes:
        width: bytes of an element.
        ordered: whether distances are packed, or the XOR.
        block: elements of a block.
        count: elements in all.
        offsets: where each block begins, and where the last one ends, (blocks + 1,).
    """

    width: int
    ordered: bool
    block: int
    count: int
    offsets: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.width * self.count

    @classmethod
    def read(cls, read: Callable[[int, int], np.ndarray], size: int, where: str) -> Head:
        """Read it, and hold it against the bytes there are.

        Args:
            read: returns bytes [start, stop) of the packed tensor.
            size: its bytes.
            where: its name, for messages.

        Raises:
            BadInput: when it is none.
        """
        if size < _HEAD.size:
            raise _damaged(where)
        width, ordered, _, block, count = _HEAD.unpack(read(0, _HEAD.size).tobytes())
        blocks = -(-count // block) if block else -1
        first = _HEAD.size + 8 * (blocks + 1)
        if width not in UNSIGNED or ordered > 1 or not 0 < block <= BLOCK or not 0 <= blocks <= size // 8 or first > size:
            raise _damaged(where)
        offsets = np.frombuffer(read(_HEAD.size, first).tobytes(), "<u8").astype(np.int64)
        if offsets[0] != first or offsets[-1] != size or bool((np.diff(offsets) < 0).any()):
            raise _damaged(where)
        return cls(width, bool(ordered), block, count, offsets)


def most(nbytes: int) -> int:
    """Return the bytes that a tensor takes packed at most."""
    return nbytes + (nbytes // BLOCK + 2) * (8 + 8 * _PLANE.size) + _HEAD.size


def pack(pieces: Iterator[tuple[np.ndarray, np.ndarray]], dtype: str) -> list[bytes]:
    """Pack a tensor.

    Args:
        pieces: bits of W_g and of W_f (uint8), `BLOCK` elements at a time.
        dtype: of both.

    Returns:
        The packed tensor, in parts.
    """
    width, ordered = DTYPES[dtype].bits // 8 or 1, dtype in SIGNED
    count, blocks = 0, list[bytes]()
    for general, finetuned in pieces:
        blocks.append(_deflate(_distance(general.view(UNSIGNED[width]), finetuned.view(UNSIGNED[width]), ordered)))
        count += len(general) // width
    ends = _HEAD.size + 8 * (len(blocks) + 1) + np.cumsum([0, *map(len, blocks)])
    return [_HEAD.pack(width, ordered, 0, BLOCK, count), ends.astype("<u8").tobytes(), *blocks]


def codes(block: bytes, head: Head, count: int, where: str) -> np.ndarray:
    """Return what a block holds, (count,), unsigned.

    Args:
        block: its bytes.
        head: of the tensor.
        count: its elements.
        where: the tensor's name, for messages.

    Raises:
        BadInput: when it is damaged.
    """
    planes, position = list[np.ndarray](), 0
    for _ in range(head.width):
        if position + _PLANE.size > len(block):
            raise _damaged(where)
        deflated, size = _PLANE.unpack_from(block, position)
        held = block[position + _PLANE.size : position + _PLANE.size + size]
        position += _PLANE.size + size
        try:
            plane = zlib.decompressobj().decompress(held, count + 1) if deflated else held
        except zlib.error:
            raise _damaged(where) from None
        planes.append(np.frombuffer(plane, np.uint8))
    if position != len(block) or any(len(plane) != count for plane in planes):
        raise _damaged(where)
    return np.ascontiguousarray(np.stack(planes, 1)).view(UNSIGNED[head.width]).reshape(-1)


def unpack(code: np.ndarray, general: np.ndarray, head: Head) -> np.ndarray:
    """Return bits(W_f), uint8, for bits(W_g), uint8, and what is packed of as many elements."""
    return _add(general.view(code.dtype), code, head.ordered).view(np.uint8)


def _distance(general: np.ndarray, finetuned: np.ndarray, ordered: bool) -> np.ndarray:
    """Return the zigzag of the steps from W_g to W_f, modulo the number of bit patterns."""
    if not ordered:
        return general ^ finetuned
    bits = general.dtype.itemsize * 8
    steps = places(finetuned) - places(general)
    return (steps << 1) ^ (steps.view(f"<i{bits // 8}") >> (bits - 1)).view(steps.dtype)


def _add(general: np.ndarray, code: np.ndarray, ordered: bool) -> np.ndarray:
    """Go so many steps from W_g."""
    if not ordered:
        return general ^ code
    place = places(general) + ((code >> 1) ^ (np.zeros_like(code) - (code & 1)))
    top = _top(place)
    return np.where(place & top != 0, place ^ top, ~place)


def places(bits: np.ndarray) -> np.ndarray:
    """Return the place of each bit pattern (unsigned) in the order of the numbers: −NaN, −∞, …, −0, +0, …, +∞, +NaN."""
    top = _top(bits)
    return np.where(bits & top != 0, ~bits, bits | top)


def _top(bits: np.ndarray) -> np.ndarray:
    return np.array(1 << (bits.dtype.itemsize * 8 - 1), bits.dtype)


def _deflate(codes: np.ndarray) -> bytes:
    planes = np.ascontiguousarray(codes.view(np.uint8).reshape(-1, codes.dtype.itemsize).T)
    parts = []
    for plane in planes:
        deflate = zlib.compressobj(LEVEL, zlib.DEFLATED, strategy=STRATEGY)
        small = deflate.compress(plane) + deflate.flush()
        deflated = len(small) < len(plane)
        held = small if deflated else plane.tobytes()
        parts += [_PLANE.pack(deflated, len(held)), held]
    return b"".join(parts)


def _damaged(where: str) -> BadInput:
    return BadInput(f"{where}: damaged; not a packed tensor of a memory file")
