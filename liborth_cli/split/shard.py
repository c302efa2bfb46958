"""One output file of a split: the general shard and the memory shard that belongs to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from liborth_kernels.rebuild import rebuild_delta
from liborth_kernels.rounding import round_to

from liborth_cli.checkpoint import delta, layout
from liborth_cli.checkpoint.blockscaled import BlockScaled
from liborth_cli.checkpoint.dtypes import DTYPES, as_bytes, as_tensor, torch_dtype
from liborth_cli.checkpoint.files import Written
from liborth_cli.checkpoint.pair import Action, Item
from liborth_cli.checkpoint.reader import PIECE, TensorInfo, pieces
from liborth_cli.checkpoint.writer import Coming, ShardWriter
from liborth_cli.console import Progress
from liborth_cli.manifest import Tensor
from liborth_cli.split.divide import Part, Skill, ahead
from liborth_cli.split.matrix import MatrixReport
from liborth_cli.split.plan import Splitter
from liborth_cli.split.sums import Sums
from liborth_cli.stream.host import fetch, own_stream, sent

WORST = ("excess", "factor_error", "gap")
"""Facts of which a stack of matrices tells the largest; others are listed."""
DEVICE_PIECE, DEVICE_PIECES = 1 << 22, 6
"""Elements of a piece that is made on a GPU, and pieces that are under way at a time."""


@dataclass(frozen=True)
class Folders:
    """Where the files of a split are made: what is published, and what is private."""

    general: Path
    memory: Path


@dataclass(frozen=True)
class ShardRecord:
    """What became of one output file.

    Attributes:
        general: the file of the general checkpoint.
        memory: the memory file, or None when nothing was removed.
        tensors: what was done to each.
        kept: names of the memory's tensors.
    """

    general: Written
    memory: Written | None
    tensors: dict[str, Tensor]
    kept: list[str]


@dataclass
class WrittenShard:
    """Two files whose contents are written; `close` makes them files.

    Attributes:
        plan: the split.
        file: name of the general file.
        general: its writer.
        memory: that of the memory file.
        tensors: what was done to each tensor so far.
        kept: names of the memory's tensors so far.
        lanes: threads that bring pieces back from a GPU.
    """

    plan: Splitter
    file: str
    general: ShardWriter
    memory: ShardWriter
    tensors: dict[str, Tensor] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    lanes: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(DEVICE_PIECES), repr=False)

    def close(self) -> ShardRecord:
        """Finish, flush and hash both files; another thread may do it."""
        self.lanes.shutdown()
        items = [self.plan.items[tensor.name] for tensor in self.plan.files[self.file]]
        self.tensors = {item.tensor.name: self.tensors[item.tensor.name] for item in items}
        places = {_memory_triple(item)[0]: number for number, item in enumerate(items)}
        self.kept.sort(key=lambda name: places.get(name, -1))
        general, memory = self.general.end(), None
        if self.memory.empty:
            self.memory.abandon()
        else:  # while the disk still takes the other
            memory = self.memory.finish(delta.metadata(self.file, general.sha256))
        self.general.finish()
        if memory is not None and self.plan.options.memory_format != delta.PLAIN:
            memory = delta.pack(self.general.path, self.memory.path)
            self.kept = [delta.packed_name(name) for name in self.kept]
        return ShardRecord(general, memory, self.tensors, self.kept)

    def write(self, item: Item, skills: Iterator[Skill]) -> None:
        """Write one tensor into the files it belongs to, and note what was done to it."""
        done: dict[str, object] = {"action": item.action.value, "why": item.why, "tied_to": item.twin}
        if item.reference is not None and item.reference.name != item.tensor.name:
            done["reference"] = item.reference.name
        if item.action != Action.WITHHELD:
            self.general.begin(*_triple(item.tensor))
        if item.action == Action.SKILL:
            self._copy(item.tensor, self.general)
        else:
            self.memory.begin(*_memory_triple(item))
            if self._edit(item, skills, done):
                self.kept.append(_memory_triple(item)[0])
            else:
                self.memory.discard()
        self.tensors[item.tensor.name] = Tensor.model_validate(done)

    def _copy(self, tensor: TensorInfo, writer: ShardWriter) -> None:
        for start in range(0, tensor.nbytes, PIECE * 4):
            writer.write(self.plan.finetuned.read(tensor.name, start, min(start + PIECE * 4, tensor.nbytes)))

    def _edit(self, item: Item, skills: Iterator[Skill], done: dict[str, object]) -> bool:
        """Write one tensor that is not plainly copied; return whether the memory file needs an entry for it."""
        if item.action == Action.WITHHELD:
            self._copy(item.tensor, self.memory)
            return True
        changed, reports, sums = False, list[MatrixReport | None](), Sums()
        matrices, rows, cols = item.grid
        for number in range(matrices):
            first = number * rows * cols
            skill = None
            if item.action == Action.SPLIT:
                skill, report = next(skills)
                reports.append(report)
            changed |= self._write_general(item, first, first + rows * cols, skill, sums)
        shared, everything = matrices * rows * cols, math.prod(item.tensor.shape)
        if shared < everything:
            changed |= self._write_added(item, shared, everything)
        if item.action == Action.SPLIT:
            done |= _summary(reports)
            if done["energy"]:
                done |= {"norm_reference": math.sqrt(sums.reference), "norm_general": math.sqrt(sums.general)}
                if item.tensor.name in self.plan.finetuned.scales:
                    done |= sums.facts(cast("float", done["energy"]))
        return changed

    def _write_general(self, item: Item, first: int, last: int, skill: Part | None, sums: Sums) -> bool:
        """Write elements [first, last) of W_g and of the delta; return whether they differ from W_f.

        Adds what is summed up of W_r and W_g to `sums`.
        """
        new, old, changed = item.tensor, item.reference, False
        dtype, alpha = torch_dtype(new.dtype), self.plan.options.alpha
        scaled = isinstance(self.plan.finetuned, BlockScaled) and new.name in self.plan.finetuned.scales
        if skill is not None and skill.device.type != "cpu" and not scaled:
            return self._bring_back(item, (first, last), skill, sums)
        for start, stop in pieces(first, last):
            bits = self.plan.finetuned.read_elements(new.name, start, stop)
            result, difference = bits, np.zeros_like(bits)
            if scaled:
                if skill is not None or item.action == Action.MEMORY:
                    part = None if skill is None else skill[start - first : stop - first]
                    result = self._rounded(item, (start, stop), bits, part, sums)
                    difference = delta.xor(bits, result)
            elif skill is not None:
                assert old is not None
                reference = _widened(self.plan.reference.load_elements(old.name, start, stop))  # once: it is summed up too
                finetuned = as_tensor(bits, new.dtype)
                general, bitwise = rebuild_delta(reference, finetuned, skill[start - first : stop - first], alpha)
                sums.reference += float(torch.dot(reference, reference))
                sums.general += float(torch.dot(wide := _widened(general), wide))
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

    def _bring_back(self, item: Item, where: tuple[int, int], skill: Part, sums: Sums) -> bool:
        """Do the same for a part on a GPU: pieces are read, sent, made, fetched and written beside each other."""
        new, old, changed, width = item.tensor, item.reference, False, DTYPES[item.tensor.dtype].bits // 8
        assert old is not None

        def make(job: tuple[int, int, int, int]) -> tuple[int, bool, float, float]:
            start, stop, here, there = job
            with own_stream(skill.device):
                finetuned = sent(self.plan.finetuned, new.name, start, stop, skill.device)
                reference = sent(self.plan.reference, old.name, start, stop, skill.device)
                part = skill[start - where[0] : stop - where[0]]
                general, bitwise = rebuild_delta(reference, finetuned, part, self.plan.options.alpha)
                before, after = (float(torch.dot(wide := _widened(side), wide)) for side in (reference, general))
                moved = bool(bitwise.any())
                self.general.put(fetch(general), here)
                self.memory.put(fetch(bitwise), there)
                return general.nbytes, moved, before, after

        jobs = list[tuple[int, int, int, int]]()
        for start, stop in pieces(*where, DEVICE_PIECE):
            size = (stop - start) * width
            jobs.append((start, stop, self.general.place(size), self.memory.place(size)))
        for size, moved, before, after in ahead(self.lanes, make, jobs, lambda _: 1, DEVICE_PIECES):
            sums.reference += before
            sums.general += after
            changed = changed or moved
            self.general.written(size)
            self.memory.written(size)
        return changed

    def _rounded(
        self, item: Item, where: tuple[int, int], bits: np.ndarray, skill: torch.Tensor | None, sums: Sums
    ) -> np.ndarray:
        """Return the codes of W_g under the scales of W_f, for elements `where`; `bits` are the codes of W_f."""
        finetuned, old, name = self.plan.finetuned, item.reference, item.tensor.name
        assert isinstance(finetuned, BlockScaled) and old is not None
        reference = self.plan.reference.load_elements(old.name, *where).float()
        wanted = reference if skill is None else torch.add(reference, skill.cpu().float(), alpha=self.plan.options.alpha)
        codes = finetuned.encode(name, wanted, where[0], bits)
        sums.reference += float(torch.dot(reference, reference))
        sums.note_rounding(finetuned, name, where[0], wanted, (bits, codes))
        for side, tensor in ((finetuned, name), (self.plan.reference, old.name)):
            sums.note_noise(side, tensor, *where)
        return codes

    def _write_added(self, item: Item, first: int, last: int) -> bool:
        """Write the rows only the fine-tuned side has: as they are, or as the mean of the reference's rows."""
        if self.plan.options.policy.added == "skill":
            for start, stop in pieces(first, last):
                bits = self.plan.finetuned.read_elements(item.tensor.name, start, stop)
                self.general.write(bits)
                self.memory.write(np.zeros_like(bits))
            return False
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


def write_shard(plan: Splitter, file: str, folders: Folders, skills: Iterator[Skill], progress: Progress) -> WrittenShard:
    """Write the contents of one general file and of the memory file that belongs to it.

    Args:
        plan: the split.
        file: name of the general file.
        folders: where both go.
        skills: the skill parts of this file's matrices, in order (and those of later files after them).
        progress: what is told of the bytes that are done.
    """
    shard = begin_shard(plan, file, folders)
    for tensor in plan.files[file]:
        shard.write(plan.items[tensor.name], skills)
        progress.advance(tensor.nbytes)
    return shard


def begin_shard(plan: Splitter, file: str, folders: Folders, scattered: bool = False) -> WrittenShard:
    """Begin one general file and the memory file that belongs to it; the first file's memory keeps the index.

    Args:
        plan: the split.
        file: name of the general file.
        folders: where both go.
        scattered: the tensors come in any order.
    """
    items = [plan.items[t.name] for t in plan.files[file]]
    frames = _frames(plan, file, file == next(iter(plan.files)))
    planned = [(delta.FRAME + name, "U8", (len(raw),)) for name, raw in frames.items()]
    general = ShardWriter(
        folders.general / file,
        [_triple(i.tensor) for i in items if i.action != Action.WITHHELD],
        coming=Coming.ANY_ORDER if scattered else Coming.PLANNED,
    )
    memory = ShardWriter(
        folders.memory / plan.memory_files[file],
        [*planned, *(_memory_triple(i) for i in items if i.action != Action.SKILL)],
        delta.metadata(file),
        mode=delta.MODE,
        coming=Coming.ANY_ORDER if scattered else Coming.FEWER,
    )
    shard = WrittenShard(plan, file, general, memory, kept=[name for name, _, _ in planned])
    for entry, raw in zip(planned, frames.values(), strict=True):
        memory.begin(*entry)
        memory.write(np.frombuffer(raw, np.uint8))
    return shard


def _frames(plan: Splitter, file: str, first: bool) -> dict[str, bytes]:
    """Return the headers (and the index) that make the fine-tuned files again, byte for byte, where the layout is kept."""
    if plan.options.out_shard_size is not None:
        return {}
    frame = plan.finetuned.frame(file)
    index = {layout.INDEX: plan.finetuned.index} if first and plan.finetuned.index else {}
    return {**({file: frame} if frame else {}), **index}


def _summary(reports: list[MatrixReport | None]) -> dict[str, object]:
    """Merge the reports of a tensor's matrices (experts) into one record."""
    real = [r for r in reports if r is not None]
    if not real:
        return {"energy": 0.0, "note": "untouched, or passed through"}
    whole = math.fsum(r.energy for r in real)
    record: dict[str, object] = {
        "energy": whole,
        "skill": math.fsum(r.energy * r.skill for r in real) / whole,
        "memory": math.fsum(r.energy * r.memory for r in real) / whole,
    }
    for key in sorted({key for r in real for key in r.facts}):
        values = [r.facts[key] for r in real if key in r.facts]
        if len(reports) == 1:
            record[key] = values[0]
        elif isinstance(values[0], str):
            record[key] = sorted(map(str, set(values)))
        else:
            record[key] = max(values) if key in WORST else values
    found = [r.prediction for r in real if r.prediction is not None]
    if found:
        one = len(reports) == 1
        record["dimension"] = found[0].dimension if one else [p.dimension for p in found]
        record["memory_dimension"] = found[0].memory_dimension if one else [p.memory_dimension for p in found]
        costs = [p.retain_cost for p in found if p.retain_cost is not None]
        gains = [p.forget_gain for p in found if p.forget_gain]
        record |= {"retain_cost": math.fsum(costs)} if costs else {}
        record |= {"forget_gain": [math.fsum(each) for each in zip(*gains, strict=True)]} if gains else {}
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
