"""What glibc's malloc keeps and gives back; elsewhere nothing is done."""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
KEEP_BYTES = 24 << 20
"""Free memory at the top of the heap that is not returned."""
MAP_BYTES = 32 << 20
"""Blocks from this size are mapped and returned at once; the largest value glibc accepts."""


def keep_freed_memory() -> None:
    """Make malloc keep what is freed; does nothing where malloc is not glibc's.

    By default glibc gives every freed block above 128 KiB back to the kernel, and the next one costs a page fault and a
    cleared page each 4 KiB: more than reading, blending and writing the data (docs/log.md).
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
        libc.mallopt(M_MMAP_THRESHOLD, MAP_BYTES)
        libc.mallopt(M_ARENA_MAX, 1)  # one heap: what one thread frees another uses, and none keeps its own spare


def return_freed_memory() -> None:
    """Give the system back what is free inside malloc's heap, which large blocks cannot use."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
