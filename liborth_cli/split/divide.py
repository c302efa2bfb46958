"""From two checkpoints to the skill part of one matrix: read, subtract, divide. Runs beside the writer, ahead of it."""

from __future__ import annotations

import itertools
import math
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from liborth_kernels.update import update

from liborth_cli.checkpoint.pair import Item
from liborth_cli.checkpoint.reader import Checkpoint, TensorInfo, pieces
from liborth_cli.errors import BadInput, shown
from liborth_cli.linalg.rows import ThinProduct
from liborth_cli.linalg.truncated import energy
from liborth_cli.machine import DEVICE_LANES
from liborth_cli.methods import Layer
from liborth_cli.methods.memo import Memo
from liborth_cli.split.factors import FactorSource, MatrixFactors, moved
from liborth_cli.split.matrix import MatrixReport, Prediction, participation, predicted, split_matrix, truncate
from liborth_cli.split.options import SplitOptions
from liborth_cli.stream.host import own_stream, sent

AHEAD_BYTES = 32 << 20
"""Results that may wait for the writer, unless a single one is larger: then it is alone."""

Part = torch.Tensor | ThinProduct
"""U_s, to be looked at in flat ranges."""
Skill = tuple[Part | None, MatrixReport | None]
"""The skill part, and what was done; nothing where there was nothing to divide."""
BLOCK_BYTES = 8 << 20
"""Of a block of rows on the CPU."""
DEVICE_BLOCK_BYTES = 256 << 20
"""On a GPU, which needs many rows to be busy and pays for every transfer."""

Work = TypeVar("Work")
Result = TypeVar("Result")


@dataclass(frozen=True)
class UpdateRows:
    """U = W_f − W_r of one matrix; every look reads both again.

    Attributes:
        reference: W_r.
        finetuned: W_f.
        old: the tensor in the reference.
        new: the tensor in the fine-tuned checkpoint.
        first: its first element that belongs to this matrix.
        shape: (m, n).
        dtype: float32 or float64.
        device: where the blocks go. On a GPU both weights are sent as they are stored and subtracted there: for two-byte
            weights that is as many bytes as the update, and the host has nothing to compute.
    """

    reference: Checkpoint
    finetuned: Checkpoint
    old: TensorInfo
    new: TensorInfo
    first: int
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield blocks of rows, top to bottom, in memory that is used again."""
        rows, cols = self.shape
        buffer = torch.empty(min(self._step, rows) * cols, dtype=self.dtype, device=self.device)
        if self._on_device:
            for finetuned, reference in self.pairs() or ():
                yield update(finetuned, reference, buffer[: finetuned.numel()].view(-1, cols))
            return
        for start in range(0, rows, self._step):
            count = min(self._step, rows - start) * cols
            self._fill(buffer[:count], self.first + start * cols)
            yield buffer[:count].view(-1, cols)

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]] | None:
        """Return the same blocks as W_f and W_r, on a GPU; None on the CPU."""
        return self._pairs() if self._on_device else None

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rows, cols = self.shape
        for start in range(0, rows, self._step):
            here, there = self.first + start * cols, self.first + min(start + self._step, rows) * cols
            sides = ((self.finetuned, self.new), (self.reference, self.old))
            new, old = (sent(side, tensor.name, here, there, self.device).view(-1, cols) for side, tensor in sides)
            yield new, old

    @property
    def _on_device(self) -> bool:
        return self.device.type != "cpu"

    @property
    def _step(self) -> int:
        """Rows of a block."""
        size = DEVICE_BLOCK_BYTES if self._on_device else BLOCK_BYTES
        return max(size // (self.dtype.itemsize * self.shape[1]), 1)

    def all(self, out: torch.Tensor) -> float:
        """Write all of it into `out` (m·n,), on the device, and return ‖U‖²."""
        if self._on_device:
            start = 0
            for block in self.blocks():
                out[start : start + block.numel()] = block.view(-1)
                start += block.numel()
            return energy(out)
        total = []
        for start, stop in pieces(0, len(out)):
            self._fill(out[start:stop], self.first + start)
            total.append(energy(out[start:stop]))
        return math.fsum(total)

    def energy(self) -> float:
        """Return ‖U‖²."""
        return math.fsum(energy(block) for block in self.blocks())

    def _fill(self, out: torch.Tensor, first: int) -> None:
        for start, stop in pieces(first, first + len(out)):
            finetuned = self.finetuned.load_elements(self.new.name, start, stop)
            reference = self.reference.load_elements(self.old.name, start, stop)
            update(finetuned, reference, out[start - first : stop - first])


@dataclass(frozen=True)
class Job:
    """One matrix to divide: the `number`-th of a tensor's stack."""

    item: Item
    number: int

    @property
    def wide(self) -> bool:
        """Whether the arithmetic is float64."""
        return self.item.reference is not None and "F64" in (self.item.reference.dtype, self.item.tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Size of the update in memory."""
        _, rows, cols = self.item.grid
        return rows * cols * (8 if self.wide else 4)


@dataclass(frozen=True)
class Divider:
    """Divides matrices of a pair.

    Attributes:
        reference: W_r.
        finetuned: W_f.
        options: the split.
        factors: what the method needs of each matrix.
        device: where matrices are decomposed.
        devices: where they are, when there are several; each thread keeps to one of them.
        divide: divides one update.
        trial: nobody reads what is predicted of the cut, and parts come whole, as `divide` gives them.
        scratch: what each worker keeps.
        memos: what matrices with the same input have in common, on each device.
    """

    reference: Checkpoint
    finetuned: Checkpoint
    options: SplitOptions
    factors: FactorSource
    device: torch.device
    divide: Callable[[Layer, SplitOptions], tuple[torch.Tensor, MatrixReport]] = split_matrix
    trial: bool = False
    scratch: threading.local = field(default_factory=threading.local)
    devices: tuple[torch.device, ...] = ()
    memos: dict[torch.device, Memo] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Deal devices to threads in turn."""
        object.__setattr__(self, "_turn", itertools.cycle(self.devices or (self.device,)))
        for device in self.devices or (self.device,):
            self.memos.setdefault(device, Memo())

    @property
    def here(self) -> torch.device:
        """The device of this thread."""
        if not hasattr(self.scratch, "device"):
            self.scratch.device = next(self._turn)  # type: ignore[attr-defined]
        return self.scratch.device

    def forget(self) -> None:
        """Drop what matrices have in common."""
        for memo in self.memos.values():
            memo.clear()

    def cost(self, job: Job) -> int:
        """Return the bytes of a job's result: a whole part of the update, or two thin factors of it."""
        _, rows, cols = job.item.grid
        rank = int(self.options.of(job.item.twin).amount.value or 0)
        return (rows + cols) * rank * (8 if job.wide else 4) if self._thin(job) else job.nbytes

    def budget(self, jobs: list[Job]) -> int:
        """Return how many bytes of results may be in memory at a time; a few thin ones keep every worker busy."""
        largest = max(map(self.cost, jobs), default=0)
        if self.device.type != "cpu":
            return max(len(self.devices), 1) * DEVICE_LANES * largest
        return largest + AHEAD_BYTES // 4 if all(map(self._thin, jobs)) else max(AHEAD_BYTES, largest)

    def skill(self, job: Job) -> Skill:
        """Form one matrix's update and divide it; nothing when there is nothing to divide.

        Raises:
            BadInput: when its numbers are finite and beyond arithmetic.
        """
        try:
            with own_stream(self.here):
                found = self._skill(job)
            self.memos[self.here].release()
            return found
        except (np.linalg.LinAlgError, torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
            name = shown(job.item.tensor.name)
            raise BadInput(f"tensor {name}: cannot be decomposed, its numbers are too large; leave it with -e") from None

    def _skill(self, job: Job) -> Skill:
        item, (_, rows, cols) = job.item, job.item.grid
        covered = self.factors.covers(item.twin, job.number) or self.factors.covers_bias(item.twin)
        if self.factors.needs and not covered:
            return None, None
        old, new, first = item.reference, item.tensor, job.number * rows * cols
        assert old is not None
        dtype = torch.float64 if job.wide else torch.float32
        u = UpdateRows(
            self.reference,
            finetuned=self.finetuned,
            old=old,
            new=new,
            first=first,
            shape=(rows, cols),
            dtype=dtype,
            device=self.here,
        )
        options, generator = self.options.of(item.twin), torch.Generator().manual_seed(self._seed(job))
        flat = None if self._by_rows(job) else self._space(job, dtype)
        total = u.energy() if flat is None else u.all(flat)
        if not math.isfinite(total):
            return self._nonfinite(item, u)
        if total == 0.0:
            return None, None
        if self._thin(job):
            return truncate(u if flat is None else flat.view(rows, cols), total, generator, options)
        assert flat is not None
        layer = Layer(new.name, flat.view(rows, cols), total, generator, options.tolerance)
        factors: MatrixFactors | None = moved(self.factors.of(item.twin, job.number), self.here)
        if factors is None:
            skill, report = self.divide(layer, options)
            return skill.reshape(-1), report
        layer.retain, layer.forget, layer.diagonal = factors.retain, factors.forget, factors.diagonal
        layer.tokens, layer.shares, layer.edit = factors.tokens, factors.shares, factors.edit
        layer.input_key, layer.memo = factors.input_key, self.memos[self.here]
        if factors.transposed:
            layer.update = layer.update.T.contiguous()
        skill, report = self.divide(layer, options) if self.trial else self._reported(layer, options, factors)
        return (skill.T if factors.transposed else skill).contiguous().reshape(-1), report

    def _reported(self, layer: Layer, options: SplitOptions, factors: MatrixFactors) -> tuple[torch.Tensor, MatrixReport]:
        """Divide an update, and add what its factors predict of the cut."""
        removed: Part = layer.update.clone()
        dimension = participation(removed)
        skill, report = self.divide(layer, options)
        thin, report.leading = report.leading, None
        leads = options.alpha == 1.0 and options.side == "top"  # what is removed is the leading part itself
        if leads and (felt := report.felt) is not None:
            report.prediction = Prediction(dimension, felt.dimension, felt.retain_cost, felt.forget_gain)
            return skill, report
        if thin is not None and leads:
            removed = thin.on_orthonormal(layer.update.dtype)
        else:
            removed.sub_(skill, alpha=options.alpha)
        report.prediction = predicted(dimension, removed, factors.retain, factors.forget or factors.tokens)
        return skill, report

    def _space(self, job: Job, dtype: torch.dtype) -> torch.Tensor:
        """Return memory for an update, (m·n,): the worker's own, used again, when the result does not live in it."""
        _, rows, cols = job.item.grid
        if not self._thin(job):
            return torch.empty(rows * cols, dtype=dtype, device=self.here)
        held: torch.Tensor | None = getattr(self.scratch, "update", None)
        if held is None or held.nbytes < job.nbytes:
            self.scratch.update = None
            self.scratch.update = held = torch.empty(job.nbytes, dtype=torch.uint8, device=self.here)
        return held[: job.nbytes].view(dtype)

    def _seed(self, job: Job) -> int:
        name = f"{job.item.twin}/{job.number * job.item.grid[1] * job.item.grid[2]}"
        return zlib.crc32(name.encode()) ^ (self.options.seed & 0xFFFFFFFF) | (self.options.seed >> 32) << 32

    def last_first(self, jobs: list[Job]) -> bool:
        """Tell whether the last job is so large that it should not be begun last: alone, it would leave a processor idle."""
        sizes = [job.nbytes for job in jobs]
        return len(jobs) > 2 and self._by_rows(jobs[-1]) and sizes[-1] * len(sizes) > 4 * sum(sizes)

    def _thin(self, job: Job) -> bool:
        """Tell whether the result stays two thin factors until it is written."""
        return self._truncates(job) and (not self.trial or self._by_rows(job))

    def _by_rows(self, job: Job) -> bool:
        """Tell whether a matrix is so tall that its low-rank part is found without ever holding its update."""
        _, rows, cols = job.item.grid
        return rows >= 2 * cols and job.nbytes > AHEAD_BYTES and self._truncates(job)

    def _truncates(self, job: Job) -> bool:
        """Tell whether all that is wanted of an update is a low-rank part, and that saves memory."""
        o, (_, rows, cols) = self.options.of(job.item.twin), job.item.grid
        svd = o.method == "svd" and o.amount.kind == "rank" and o.side == "tail" and o.tolerance > 0
        return svd and (rows + cols) * int(o.amount.value or 0) < rows * cols

    def _nonfinite(self, item: Item, u: UpdateRows) -> tuple[None, None]:
        if self.options.nonfinite == "refuse":
            count = sum(int((~torch.isfinite(block)).sum()) for block in u.blocks())
            what = f"{count} NaN or infinite values" if count else "values too large for float32 arithmetic"
            raise BadInput(
                f"tensor {item.tensor.name!r} ({item.tensor.shard}): its update has {what}; leave such tensors as they are "
                "with --nonfinite passthrough, or exclude this one with -e"
            )
        return None, None


def ahead(
    pool: Executor,
    work: Callable[[Work], Result],
    jobs: Sequence[Work],
    cost: Callable[[Work], int],
    budget: int,
    last_first: bool = False,
) -> Iterator[Result]:
    """Yield work(job) for every job, in order, while later jobs are already being worked on.

    Args:
        pool: where the work is done.
        work: called in the pool.
        jobs: what to do, in order.
        cost: bytes a job holds from its start until the consumer asks for the next result.
        budget: bytes that may be held at a time; a single job may exceed it.
        last_first: begin the last job beside the first one, outside the budget; its result waits for its turn.

    Yields:
        The results.
    """
    early = pool.submit(work, jobs[-1]) if last_first else None
    rest, running, spent = deque(jobs[:-1] if early else jobs), deque[tuple[Work, Future[Result]]](), 0
    while rest or running:
        while rest and (not running or spent + cost(rest[0]) <= budget):
            job = rest.popleft()
            running.append((job, pool.submit(work, job)))
            spent += cost(job)
        job, future = running[0]
        yield future.result()
        running.popleft()
        spent -= cost(job)
    if early:
        yield early.result()
