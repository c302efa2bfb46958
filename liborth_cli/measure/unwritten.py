"""The general checkpoint of a split that nobody has written: every matrix is divided while it is read."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import torch
from liborth_kernels.rebuild import rebuild

from liborth_cli.checkpoint.dtypes import torch_dtype
from liborth_cli.checkpoint.pair import Action
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo
from liborth_cli.methods import Amount, Layer
from liborth_cli.split import SplitOptions, Splitter
from liborth_cli.split.divide import Divider, Job
from liborth_cli.split.matrix import MatrixReport
from liborth_cli.stream.host import portions, send, sent

Division = Callable[[Layer, SplitOptions], tuple[torch.Tensor, MatrixReport]]
"""Divides the update of one matrix, as `split_matrix` does."""


class Unwritten:
    """The general checkpoint that a planned split would write, to the bit, without writing it.

    Every matrix is divided when it is read.

    Attributes:
        plan: the split.
    """

    def __init__(self, plan: Splitter, device: torch.device, division: Division | None = None) -> None:
        """Prepare to divide.

        Args:
            plan: the split.
            device: where matrices are decomposed.
            division: divides one update in place of the split itself, and may remember decompositions.
        """
        self.plan = plan
        self._divider = Divider(plan.reference, plan.finetuned, plan.options, plan.factors, device)
        if division is not None:
            self._divider = dataclasses.replace(self._divider, divide=division, trial=True)

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
                for start, stop in portions(first, first + rows * cols, out.device):
                    reference = sent(plan.reference, item.reference.name, start, stop, out.device)
                    part = skill[start - first : stop - first].to(out.device)
                    out[start:stop].copy_(rebuild(reference, part, plan.options.alpha, torch_dtype(info.dtype)))
            divided = matrices * rows * cols
        elif item.action == Action.MEMORY:
            assert item.reference is not None
            divided = min(math.prod(item.reference.shape), math.prod(info.shape))
            self._copy(plan.reference, item.reference, out, 0, divided)
        self._copy(plan.finetuned, info, out, divided, math.prod(info.shape))

    def _copy(self, side: Checkpoint, info: TensorInfo, out: torch.Tensor, first: int, last: int) -> None:
        for start, stop in portions(first, last, out.device):
            send(side, info.name, start, stop, out[start:stop])
