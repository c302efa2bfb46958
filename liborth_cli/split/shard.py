"""One output file of a split: the general shard and the memory shard that belongs to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from liborth_kernels.rebuild import rebuild_delta
from liborth_kernels.rounding import round_to

from liborth_cli.checkpoint import delta, layout
from liborth_cli.checkpoint.dtypes import DTYPES, as_bytes, as_tensor, torch_dtype
from liborth_cli.checkpoint.pair import Action, Item
from liborth_cli.checkpoint.reader import DEVICE_PIECE, PIECE, TensorInfo, pieces
from liborth_cli.checkpoint.writer import ShardWriter
from liborth_cli.split.divide import Part, Skill
from liborth_cli.split.matrix import MatrixReport

if TYPE_CHECKING:
    from liborth_cli.console import Progress
    from liborth_cli.split.plan import Splitter

MERGED = {"excess": max, "factor_error": max, "retain_cost": math.fsum}
"""How the facts of a stack's matrices become one; others are listed."""


class ShardJob:
    """Writes one general file and the memory file that belongs to it: `run` the contents, `close` what makes them files."""

    def __init__(self, plan: Splitter, file: str, folders: tuple[Path, Path], skills: Iterator[Skill], first: bool) -> None:
        """Prepare to write.

        Args:
            plan: the split.
            file: name of the general file.
            folders: where the general file goes, and where the memory file goes.
            skills: the skill parts of this file's matrices, in order (and those of later files after them).
            first: whether this is the first file; its memory keeps the index.
        """
        self.plan, self.file, self.skills, self.first = plan, file, skills, first
        self.folder, self.private = folders

    def run(self, tensors: list[TensorInfo], progress: Progress) -> None:
        """Write the contents of both files."""
        plan = self.plan
        self.records: dict[str, dict[str, Any]] = {}
        items = [plan.items[t.name] for t in tensors]
        frames = self._frames()
        general_plan = [_triple(i.tensor) for i in items if i.action != Action.WITHHELD]
        memory_plan = [(delta.FRAME + n, "U8", (len(raw),)) for n, raw in frames.items()]
        memory_plan += [_memory_triple(i) for i in items if i.action != Action.SKILL]
        self.general = general = ShardWriter(self.folder / self.file, general_plan)
        memory_path = self.private / plan.memory_files[self.file]
        self.memory = memory = ShardWriter(memory_path, memory_plan, delta.metadata(self.file), mode=delta.MODE)
        self.kept = [entry[0] for entry in memory_plan[: len(frames)]]
        for (name, dtype, shape), raw in zip(memory_plan, frames.values(), strict=False):
            memory.begin(name, dtype, shape)
            memory.write(np.frombuffer(raw, np.uint8))
        for item in items:
            self.records[item.tensor.name] = record = {"action": item.action.value, "why": item.why, "tied_to": item.twin}
            if item.reference is not None and item.reference.name != item.tensor.name:
                record["reference"] = item.reference.name
            if item.action != Action.WITHHELD:
                general.begin(*_triple(item.tensor))
            if item.action == Action.SKILL:
                self._copy(item.tensor, general)
            else:
                memory.begin(*_memory_triple(item))
                if self._edit(item, record):
                    self.kept.append(_memory_triple(item)[0])
                else:
                    memory.discard()
            progress.advance(item.tensor.nbytes)

    def close(self) -> dict[str, Any]:
        """Finish, flush and hash both files; return their journal record. Another thread may do it."""
        general, memory = self.general.finish(), []
        if self.memory.empty:
            self.memory.abandon()
        else:
            memory = [self.memory.finish(delta.metadata(self.file, general.sha256)).to_json()]
        return {"files": [general.to_json()], "private": memory, "tensors": self.records, "memory": self.kept}

    def _frames(self) -> dict[str, bytes]:
        finetuned = self.plan.finetuned
        if self.plan.options.out_shard_size is not None:
            return {}
        frame = finetuned.frame(self.file)
        index = {layout.INDEX: finetuned.index} if self.first and finetuned.index else {}
        return {**({self.file: frame} if frame else {}), **index}

    def _copy(self, tensor: TensorInfo, writer: ShardWriter) -> None:
        for start in range(0, tensor.nbytes, PIECE * 4):
            writer.write(self.plan.finetuned.read(tensor.name, start, min(start + PIECE * 4, tensor.nbytes)))

    def _edit(self, item: Item, record: dict[str, Any]) -> bool:
        """Write one tensor that is not plainly copied; return whether the memory file needs an entry for it."""
        if item.action == Action.WITHHELD:
            self._copy(item.tensor, self.memory)
            return True
        changed = False
        matrices, rows, cols = item.grid
        reports = []
        self.squares = [0.0, 0.0]
        for number in range(matrices):
            first = number * rows * cols
            skill = None
            if item.action == Action.SPLIT:
                skill, report = next(self.skills)
                reports.append(report)
            changed |= self._write_general(item, first, first + rows * cols, skill)
        shared, everything = matrices * rows * cols, math.prod(item.tensor.shape)
        if shared < everything:
            changed |= self._write_added(item, shared, everything)
        if item.action == Action.SPLIT:
            record |= _summary(reports)
            if record["energy"]:
                record |= dict(zip(("norm_reference", "norm_general"), map(math.sqrt, self.squares), strict=True))
        return changed

    def _write_general(self, item: Item, first: int, last: int, skill: Part | None) -> bool:
        """Write elements [first, last) of W_g and of the delta; return whether they differ from W_f."""
        new, old, changed = item.tensor, item.reference, False
        dtype, alpha = torch_dtype(new.dtype), self.plan.options.alpha
        device = torch.device("cpu") if skill is None else skill.device
        for start, stop in pieces(first, last, PIECE if device.type == "cpu" else DEVICE_PIECE):
            bits = self.plan.finetuned.read_elements(new.name, start, stop)
            result, difference = bits, np.zeros_like(bits)
            if skill is not None:
                assert old is not None
                reference = self.plan.reference.load_elements(old.name, start, stop).to(device)
                if device.type == "cpu":
                    reference = _widened(reference)  # once, for it is summed up too; a GPU's kernel reads it as it is stored
                finetuned = as_tensor(bits, new.dtype).to(device)
                general, bitwise = rebuild_delta(reference, finetuned, skill[start - first : stop - first], alpha)
                for side, part in enumerate((_widened(reference), _widened(general))):
                    self.squares[side] += float(torch.dot(part, part))
                result, difference = as_bytes(general), as_bytes(bitwise)
            elif item.action == Action.MEMORY:
                assert old is not None
                reference = self.plan.reference.load_elements(old.name, start, stop)
                result = as_bytes(reference if old.dtype == new.dtype else round_to(reference.double(), dtype))
                difference = delta.xor(bits, result)
            changed = changed or bool(difference.any())
            self.general.write(result)
            self.memory.write(difference)
        return changed

    def _write_added(self, item: Item, first: int, last: int) -> bool:
        """Write the rows only the fine-tuned side has: as they are, or as the mean of the reference's rows."""
        if self.plan.options.policy.added == "skill":
            return self._write_general(item, first, last, None)
        assert item.reference is not None
        cols, new, old = math.prod(item.tensor.shape[1:]), item.tensor, item.reference
        total = torch.zeros(cols, dtype=torch.float64)
        step = max(PIECE // cols, 1)
        for row in range(0, item.rows, step):
            stop = min(row + step, item.rows)
            total += self.plan.reference.load_elements(old.name, row * cols, stop * cols).view(-1, cols).double().sum(0)
        mean = as_bytes(round_to(total / max(item.rows, 1), torch_dtype(new.dtype)))
        for start in range(first, last, cols):
            self.general.write(mean)
            self.memory.write(delta.xor(self.plan.finetuned.read_elements(new.name, start, start + cols), mean))
        return True


def _summary(reports: list[MatrixReport | None]) -> dict[str, Any]:
    """Merge the reports of a tensor's matrices (experts) into one record."""
    real = [r for r in reports if r is not None]
    if not real:
        return {"energy": 0.0, "note": "untouched, or passed through"}
    whole = math.fsum(r.energy for r in real)
    record: dict[str, Any] = {
        "energy": whole,
        "skill": math.fsum(r.energy * r.skill for r in real) / whole,
        "memory": math.fsum(r.energy * r.memory for r in real) / whole,
    }
    for key in sorted({key for r in real for key in r.facts}):
        values = [r.facts[key] for r in real if key in r.facts]
        if len(reports) == 1:
            record[key] = values[0]
        elif isinstance(values[0], str):
            record[key] = sorted(set(values))
        elif key == "forget_gain":
            record[key] = [math.fsum(gains) for gains in zip(*values, strict=True)]
        elif key in MERGED:
            record[key] = MERGED[key](values)
        else:
            record[key] = values
    return record


def _widened(part: torch.Tensor) -> torch.Tensor:
    return part if part.dtype == torch.float64 else part.float()


def _triple(tensor: TensorInfo) -> tuple[str, str, tuple[int, ...]]:
    return (tensor.name, tensor.dtype, tensor.shape)


def _memory_triple(item: Item) -> tuple[str, str, tuple[int, ...]]:
    tensor = item.tensor
    if item.action == Action.WITHHELD:
        return (delta.WHOLE + tensor.name, tensor.dtype, tensor.shape)
    return (delta.XOR + tensor.name, DTYPES[tensor.dtype].bit_view, tensor.shape)
