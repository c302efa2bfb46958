"""The state of a walk over one group of rows, kept every minute, and when a signal ends it, for --resume.

One block at a time: the store's slots up to the block that is reached, the last of them the gradient on the way back, and the
factors of the blocks that are done. Batch by batch: the running sums. Both are what an uninterrupted walk has at this point, to
the bit. They tell of single tokens: they lie in the directory that becomes the factor set, closed to others (0700, 0600), and
are gone when the group is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liborth_cli.checkpoint.dtypes import as_bytes, name_of
from liborth_cli.checkpoint.journal import Unit
from liborth_cli.checkpoint.pace import Pace
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.checkpoint.writer import ShardWriter
from liborth_cli.curvature import factors
from liborth_cli.curvature.factors import FILE_MODE, Sums
from liborth_cli.manifest import File, Record
from liborth_cli.stream.batches import Batch
from liborth_cli.stream.store import Store
from liborth_cli.stream.walk import Reached

UNIT, STEM = "walk", "walk-"
"""Unit of the journal, and beginning of the names of files."""


class Found(Record):
    """What walks have found: where their sums are, and what they counted.

    Attributes:
        stages: stage → the file of its sums.
        rows: stage → the files of tokens kept one by one, where those are in files of their own; one a group.
        tokens: layer → how many tokens it saw, weighted.
        shared: layer → the layer under whose name its A is kept.
        loss: summed over all loss-carrying tokens.
        loss_tokens: how many those are.
    """

    stages: dict[str, File]
    rows: dict[str, list[File]]
    tokens: dict[str, float]
    shared: dict[str, str]
    loss: float
    loss_tokens: int

    @property
    def written(self) -> list[File]:
        """All files."""
        return [*self.stages.values(), *(file for some in self.rows.values() for file in some)]


class Walked(Found, Unit):
    """What the journal holds of a walk that is under way: what it has found of its group until then, and where it is.

    Attributes:
        group: the unit that it is going to finish.
        batches: tokens of every batch: the walk is cut up as it was.
        done: the level that is reached, one block at a time; or how many batches are done.
        back: it is on its way back.
        slots: level → the file of its slots.
    """

    group: str
    batches: list[int]
    done: int
    back: bool
    slots: dict[str, File]


@dataclass
class Keeper:
    """Keeps the state of one walk after the other.

    Attributes:
        transaction: whose journal says what is kept; None keeps nothing.
        hashes: returns the hash of every input, by its name in the journal.
        room: bytes that the disk must have left beside a state.
        tell: is told when there is no room, and what a signal waits for.
        pace: how often.
    """

    transaction: Transaction | None
    hashes: Callable[[], dict[str, str]]
    room: int
    tell: Callable[[str], None]
    _group: str = ""
    _batches: Sequence[Batch] = ()
    _slots: dict[str, File] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin to count."""
        self.pace = Pace("block or batch", self.tell)

    def is_due(self) -> bool:
        """Tell at the end of a block, or of a batch, whether a state should be kept now."""
        if self.transaction is None:
            return False
        self.pace.done()
        return self.pace.is_due

    def begin(self, group: str, batches: Sequence[Batch]) -> Walked | None:
        """Return the state that a stopped run has left of this walk; None where there is none that fits."""
        self._group, self._batches, self._slots = group, batches, {}
        if self.transaction is None:
            return None
        unit = self.transaction.finished.get(UNIT)
        found = unit.become(Walked) if unit else None
        if found is None or (found.group, found.batches) != (group, self._cut):
            self.clear()
            return None
        self._slots = dict(found.slots)
        return found

    def fill(self, store: Store, found: Walked) -> None:
        """Put the slots of a state back."""
        for level, file in found.slots.items():
            with Checkpoint.open(self._folder / file.name) as slots:
                for index in slots.tensors:
                    store.put(int(index), int(level), slots.load(index).to(self._batches[int(index)].ids.device))

    def sums(self, found: Walked) -> Sums:
        """Return the running sums of a state."""
        return factors.read(self._folder / found.files[0].name)

    def keep_slots(self, place: Reached, store: Store, sofar: Found) -> None:
        """Keep a walk that goes one block at a time: inputs, written once, and the gradient that waits for the next block."""
        with self.pace.keeping():
            slots = dict[str, File]()
            for level in map(str, range(place.level + 1)):
                gradient = place.back and int(level) == place.level
                name = f"{STEM}{'gradient' if gradient else 'input'}-{level}.safetensors"
                known = self._slots.get(level)
                file = known if known and known.name == name else self._written(name, store, int(level))
                if file is None:
                    return
                slots[level] = file
            state = Walked(**self._head(place.level, place.back), slots=slots, **dict(sofar))
            self._note(state, list(slots.values()))
            self._slots = slots

    def keep_sums(self, done: int, sums: Sums, sofar: Found) -> None:
        """Keep a walk that goes batch by batch, with all sums so far."""
        with self.pace.keeping():
            if self._fits(sum(value.nbytes for value in sums.values())):
                here = {name: value.cpu() for name, value in sums.items()}
                file = factors.write(self._folder / f"{STEM}sums-{done}.safetensors", here)
                self._note(Walked(**self._head(done, back=False), slots={}, **dict(sofar)), [file])

    def end(self) -> None:
        """Note that the walk is over, and all it found is kept elsewhere."""
        self.clear()
        self.pace.rest()

    def clear(self, but: Sequence[File] = ()) -> None:
        """Remove what was kept, but for some files."""
        if self.transaction is not None:
            names = {file.name for file in but}
            for path in self._folder.glob(f"{STEM}*"):
                if path.name not in names:
                    path.unlink(missing_ok=True)

    @property
    def _folder(self) -> Path:
        assert self.transaction is not None
        return self.transaction.partial

    @property
    def _cut(self) -> list[int]:
        return [batch.tokens for batch in self._batches]

    def _head(self, done: int, back: bool) -> dict[str, Any]:
        place = {"group": self._group, "batches": self._cut, "done": done, "back": back}
        return {"unit": UNIT, "inputs": self.hashes(), **place}

    def _note(self, state: Walked, files: Sequence[File]) -> None:
        """Write the journal's line, and only then remove what the state before it needed."""
        assert self.transaction is not None
        self.transaction.finish(state.model_copy(update={"files": [*files, *state.written]}))
        self.clear(but=files)

    def _written(self, name: str, store: Store, level: int) -> File | None:
        """Write the slots of one level, one batch in memory at a time; None where the disk has no room."""
        like = store.get(0, level)
        dtype, width = name_of(like.dtype), like.shape[-1]
        shapes = [(str(index), dtype, (*batch.ids.shape, width)) for index, batch in enumerate(self._batches)]
        if not self._fits(sum(self._cut) * width * like.itemsize):
            return None
        writer = ShardWriter(self._folder / name, shapes, mode=FILE_MODE)
        for index, planned in enumerate(shapes):
            writer.begin(*planned)
            writer.write(as_bytes(store.get(index, level)))
        return File.of(writer.finish())

    def _fits(self, nbytes: int) -> bool:
        """Tell whether the disk has room for a state; where it has not, that is said once, and none is kept."""
        lack = self.pace.lack_of_room(self._folder, nbytes, self.room)
        if lack:
            self.tell(f"{lack}: a stopped run goes on after the last group it finished")
        return not lack
