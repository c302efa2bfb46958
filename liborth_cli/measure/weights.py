"""Weights that are computed while they are read: general plus some memory, and splits that nobody has written."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass

import torch
from liborth_kernels.rebuild import rebuild

from liborth_cli.checkpoint import delta
from liborth_cli.checkpoint.delta import Memory
from liborth_cli.checkpoint.dtypes import DTYPES
from liborth_cli.checkpoint.pair import Action
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.checkpoint.tensors import as_tensor, torch_dtype
from liborth_cli.errors import UsageError
from liborth_cli.methods import Amount
from liborth_cli.split import Splitter
from liborth_cli.split.divide import Divider, Job
from liborth_cli.split.elements import load_elements, pieces


@dataclass
class Restored:
    """W_g + β·(W_f − W_g) from a general checkpoint and its memory file.

    Attributes:
        checkpoint: W_g.
        memory: its memory.
        beta: how much; 0 is W_g and 1 is W_f, both to the bit, where the model's arithmetic is the stored dtype or wider.
    """

    checkpoint: Checkpoint
    memory: Memory
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Check that the two belong together, and that the general checkpoint has every tensor.

        Raises:
            PairMismatch: when the memory was made for another checkpoint.
            UsageError: when the memory holds tensors or neurons that the general checkpoint has not.
        """
        self.memory.check_fits(self.checkpoint)
        if any(self.memory.withheld().values()) or self.memory.grown:
            raise UsageError(
                f"{self.memory.checkpoint.path}: holds tensors or neurons that the general checkpoint does not have; "
                "write the model with `liborth excise` first"
            )

    def read_into(self, out: torch.Tensor, info: TensorInfo) -> None:
        """Fill `out` (flat, any floating dtype) with the tensor `info`; the blend is float32, or float64 for float64."""
        entry, width = delta.XOR + info.name, DTYPES[info.dtype].bits // 8
        edited = self.beta != 0.0 and entry in self.memory.checkpoint.tensors
        wide = torch.float64 if info.dtype == "F64" else torch.float32
        for start, stop in pieces(0, math.prod(info.shape)):
            bits = self.checkpoint.read(info.name, start * width, stop * width)
            if not edited:
                out[start:stop].copy_(as_tensor(bits, info.dtype))
                continue
            change = self.memory.checkpoint.read(entry, start * width, stop * width)
            finetuned = as_tensor(delta.xor(bits, change), info.dtype)
            if self.beta != 1.0:
                general = as_tensor(bits, info.dtype).to(wide)
                finetuned = general.add(finetuned.to(wide).sub_(general), alpha=self.beta)
            out[start:stop].copy_(finetuned)


class Unwritten:
    """The general checkpoint that a planned split would write, to the bit, without writing it.

    Every matrix is divided when it is read.

    Attributes:
        plan: the split.
    """

    def __init__(self, plan: Splitter, device: torch.device) -> None:
        """Prepare to divide.

        Args:
            plan: the split.
            device: where matrices are decomposed.
        """
        self.plan = plan
        self._divider = Divider(plan.reference, plan.finetuned, plan.options, plan.factors, device)

    def with_amount(self, amount: Amount) -> Unwritten:
        """Return the same split of the same tensors with another amount."""
        other = copy.copy(self)
        other._divider = dataclasses.replace(self._divider, options=dataclasses.replace(self._divider.options, amount=amount))
        return other

    @property
    def checkpoint(self) -> Checkpoint:
        """The fine-tuned checkpoint: the general one has its configuration, names, shapes and dtypes."""
        return self.plan.finetuned

    def read_into(self, out: torch.Tensor, info: TensorInfo) -> None:
        """Fill `out` (flat, any floating dtype) with the general tensor `info`."""
        plan = self.plan
        item = plan.items[info.name]
        matrices, rows, cols = item.grid
        divided = 0
        if item.action == Action.SPLIT:
            assert item.reference is not None
            for number in range(matrices):
                first = number * rows * cols
                skill, _ = self._divider.skill(Job(item, number))
                if skill is None:
                    self._copy(plan.finetuned, info, out, first, first + rows * cols)
                    continue
                for start, stop in pieces(first, first + rows * cols):
                    reference = load_elements(plan.reference, item.reference, start, stop)
                    part = skill[start - first : stop - first].cpu()
                    out[start:stop].copy_(rebuild(reference, part, plan.options.alpha, torch_dtype(info.dtype)))
            divided = matrices * rows * cols
        elif item.action == Action.MEMORY:
            assert item.reference is not None
            divided = math.prod(item.reference.shape)
            self._copy(plan.reference, item.reference, out, 0, divided)
        self._copy(plan.finetuned, info, out, divided, math.prod(info.shape))

    def _copy(self, side: Checkpoint, info: TensorInfo, out: torch.Tensor, first: int, last: int) -> None:
        for start, stop in pieces(first, last):
            out[start:stop].copy_(load_elements(side, info, start, stop))
