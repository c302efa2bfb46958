"""fp8 weights with a scale for each block, as DeepSeek-V3 and fp8 releases of Qwen3 store them, read as the numbers they mean.

A weight of m × n 8-bit floats has a companion `weight_scale_inv` of ⌈m/b⌉ × ⌈n/c⌉ floats, b × c the blocks (128 × 128 where
config.json does not say otherwise): W_ij = code_ij · s[i div b, j div c] (DeepSeek-V3, arXiv 2412.19437, section 3.3).
Bytes stay bytes here: only what asks for numbers gets them decoded.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.checkpoint.dtypes import as_bytes, as_tensor, torch_dtype
from liborth_cli.checkpoint.quantised import quantised
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch

WEIGHT, SCALE = ".weight", ".weight_scale_inv"
CODES, SCALES = frozenset(("F8_E4M3", "F8_E5M2")), frozenset(("F32", "BF16", "F16"))
BLOCK = (128, 128)
CACHED = 16
"""Tables of scales that are kept: one is a 16,384th of its weight."""
MANTISSA = {"F8_E4M3": (3, -6), "F8_E5M2": (2, -14)}
"""Bits of the fraction, and the smallest exponent of a normal number."""


class BlockScaled(Checkpoint):
    """A checkpoint whose block-scaled weights come as numbers from `load` and `load_elements`, and as bytes from `read`.

    Attributes:
        stored: the checkpoint as it lies on disk, or stands for files that do; closed with this one.
    """

    def __init__(self, stored: Checkpoint) -> None:
        """Find the weights and their scales, from headers and config.json."""
        super().__init__(stored.path, {}, stored.index)
        self.stored, self.shards, self.tensors = stored, stored.shards, stored.tensors
        self._block = block_of(stored)
        self.scales = {name: scale for name in stored.tensors if (scale := _scale_of(stored, name, self._block)) is not None}
        self.config = stored.config
        if not set(quantised(stored)) - {*self.scales, *self.scales.values()}:  # nothing else is quantised
            self.config = {key: value for key, value in stored.config.items() if key != "quantization_config"}
        self._table = functools.lru_cache(CACHED)(self._read_table)

    @property
    def folders(self) -> tuple[Path, ...]:
        """As those of the stored checkpoint."""
        return self.stored.folders

    def read(self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Read bytes [start, stop) of one tensor, as they are stored; see `Checkpoint.read`."""
        return self.stored.read(name, start, stop, out)

    def load_elements(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Load elements [start, stop) of one tensor, flat; float32 where it is decoded."""
        codes = self.stored.load_elements(name, start, stop)
        return codes.float() * self.scale(name, start, stop) if name in self.scales else codes

    def load(self, name: str) -> torch.Tensor:
        """Load one whole tensor, in its shape; float32 where it is decoded."""
        info = self.tensors[name]
        return self.load_elements(name, 0, int(np.prod(info.shape))).reshape(info.shape)

    def scale(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return the scale of elements [start, stop) of a decoded weight, flat, float32."""
        import torch

        cols, table = self.tensors[name].shape[1], self._table(name)
        first, last = start // cols, (stop - 1) // cols + 1 if stop > start else start // cols
        rows = torch.arange(first, last) // self._block[0]
        wide = table[rows][:, torch.arange(cols) // self._block[1]].reshape(-1)
        return wide[start - first * cols : stop - first * cols]

    def encode(self, name: str, values: torch.Tensor, start: int, like: np.ndarray) -> np.ndarray:
        """Return the codes nearest to some values under the scales of a weight: bits, uint8.

        What lies beyond the largest code of its block becomes that code. Where `like` means the same number, its bits are kept,
        so that −0 stays −0 and what a scale of 0 stands for stays as it is.

        Args:
            name: the weight.
            values: what it should be, from element `start` on, flat.
            start: the first element.
            like: codes of the weight as it is, uint8.
        """
        import torch
        from liborth_kernels.rounding import round_to

        old, scale = as_tensor(like, self.tensors[name].dtype), self.scale(name, start, start + len(values))
        found = round_to(values.float() / scale, old.dtype)
        same = (found.float() == old.float()) | (scale == 0)
        return as_bytes(torch.where(same, old.view(torch.uint8), found.view(torch.uint8)))

    def codes(self, name: str) -> torch.dtype:
        """Return the dtype of a weight's codes."""
        return torch_dtype(self.tensors[name].dtype)

    def decode(self, name: str, bits: np.ndarray, start: int) -> torch.Tensor:
        """Return the numbers that codes mean under the scales of a weight, flat, float32.

        Args:
            name: the weight.
            bits: codes, uint8, from element `start` on.
            start: the first element.
        """
        return as_tensor(bits, self.tensors[name].dtype).float() * self.scale(name, start, start + len(bits))

    def rounding(self, name: str, start: int, stop: int) -> float:
        """Return what rounding to codes puts into elements [start, stop) on average: Σ step²/12, step the distance of codes."""
        import torch

        codes = self.stored.load_elements(name, start, stop).float()
        fraction, least = MANTISSA[self.tensors[name].dtype]
        exponent = torch.frexp(codes.abs())[1].sub_(1).clamp_(min=least)
        step = torch.ldexp(self.scale(name, start, stop), exponent - fraction)
        return float((step.double() ** 2).sum()) / 12.0

    def check_unchanged(self) -> None:
        """Raise BadInput when any file changed since it was opened."""
        self.stored.check_unchanged()

    def frame(self, file: str) -> bytes | None:
        """As that of the stored checkpoint."""
        return self.stored.frame(file)

    def close(self) -> None:
        """Close what is stored."""
        self.stored.close()

    def _read_table(self, name: str) -> torch.Tensor:
        return self.stored.load(self.scales[name]).float()


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with its block-scaled weights as numbers; the very same where it has none."""
    if not any(name.endswith(SCALE) for name in checkpoint.tensors):
        return checkpoint
    found = BlockScaled(checkpoint)
    return found if found.scales else checkpoint


def block_of(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return the size of the blocks that config.json names, or the usual one."""
    settings = checkpoint.config.get("quantization_config")
    block = settings.get("weight_block_size") if isinstance(settings, dict) else None
    if isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block):
        return (block[0], block[1])
    return BLOCK


def _scale_of(checkpoint: Checkpoint, name: str, block: tuple[int, int]) -> str | None:
    """Name the scales of a weight; None when it is no block-scaled one."""
    if not name.endswith(WEIGHT):
        return None
    weight, scale = checkpoint.tensors[name], checkpoint.tensors.get(name.removesuffix(WEIGHT) + SCALE)
    return scale.name if scale is not None and _fit(weight, scale, block) else None


def _fit(weight: TensorInfo, scale: TensorInfo, block: tuple[int, int]) -> bool:
    kinds = weight.dtype in CODES and scale.dtype in SCALES and len(weight.shape) == 2 and weight.nbytes > 0
    return kinds and scale.shape == tuple(-(-side // size) for side, size in zip(weight.shape, block, strict=False))
