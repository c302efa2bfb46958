"""Where the steps stand, and how that is kept for --resume: after a step, once a minute, and when a signal ends the run.

A resumed run measures again what came before the first step, and goes on with the very numbers that the stopped one had. The
state tells of private rows: it lies in the private directory of the edit (0700, 0600), and is gone when the edit is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import fsum
from pathlib import Path

import torch
from pydantic import ConfigDict

from liborth_cli.checkpoint.documents import fit, load_json
from liborth_cli.checkpoint.files import hash_file, write_file
from liborth_cli.checkpoint.pace import Pace
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.writer import write_tensors
from liborth_cli.console import Console
from liborth_cli.curvature.factors import FILE_MODE
from liborth_cli.errors import BadInput, LiborthError
from liborth_cli.manifest import File, Record
from liborth_cli.recall.course import CLOSE
from liborth_cli.recall.levels import Losses
from liborth_cli.recall.moves import Moves

STEM = "state"
FILE = f"{STEM}.json"
MOVED, SLOPE, RELEARNT = "moved/", "slope/", "relearnt/"
"""What tensors of a state are called by."""
RECENT = 6
"""Attacks, half of all there are, that tell whether something is left: all hands, and all rates. One by one they are asked too
seldom: steps that go on because of one that was asked long ago lift what has long been where it should be."""


class Tally(Record):
    """What the steps have come to, in numbers that change with every step.

    Attributes:
        level: loss of each kind's held-back retain rows, nats a token.
        ridges: of the next step from the model itself, and of the next attacked one.
        left: share of the aim that was left at the last step from the model itself, and at those of the last `RECENT` attacks.
        done: how many steps were tried.
        taken: how many of those moved the model.
        attacked: how many of these started from an attacked model.
        predicted: what K-FAC predicted of all that were taken, nats a retain token.
    """

    model_config = ConfigDict(frozen=False)
    level: list[float]
    ridges: list[float]
    left: list[float | None]
    done: int = 0
    taken: int = 0
    attacked: int = 0
    predicted: float = 0.0

    @property
    def is_close(self) -> bool:
        """Whether nothing is left to do: the model itself was where it should be, and under the last attacks in the mean."""
        known = [left for left in self.left if left is not None]
        return len(known) == len(self.left) and known[0] < CLOSE and fsum(known[1:]) <= CLOSE * len(known[1:])


class Kept(Record):
    """A state on disk: its numbers, and the file of its tensors."""

    tally: Tally
    file: File


@dataclass
class State:
    """All that the next step depends on, beside the rows and the models.

    Attributes:
        tally: the numbers.
        moved: Δ.
        slopes: of every kind of retain rows: mean gradient of their loss over the last steps, whitened.
        relearnt: turn of the attacks → losses of the reference under that attack.
    """

    tally: Tally
    moved: Moves
    slopes: list[Moves]
    relearnt: dict[int, Losses] = field(default_factory=dict)

    def write(self, path: Path) -> File:
        """Write its tensors; the file appears when it is whole."""
        relearnt = {f"{RELEARNT}{turn}": torch.from_numpy(losses.flat) for turn, losses in self.relearnt.items()}
        return File.of(write_tensors(path, self._large() | relearnt, FILE_MODE))

    def read(self, path: Path, like: Losses) -> None:
        """Take over the tensors of a state that was written; `like` has as many losses in every row."""
        large = self._large()
        with Checkpoint.open(path) as held:
            relearnt = [name for name in held.tensors if name.startswith(RELEARNT)]
            if {*held.tensors} != {*large, *relearnt}:
                raise BadInput("it is of other tensors")
            for name, tensor in large.items():
                tensor.copy_(held.load(name))
            for name in relearnt:
                self.relearnt[int(name.removeprefix(RELEARNT))] = like.filled(held.load(name).numpy())

    @property
    def nbytes(self) -> int:
        """What its large tensors take on the disk."""
        return sum(tensor.nbytes for tensor in self._large().values())

    def _large(self) -> dict[str, torch.Tensor]:
        every = {MOVED: self.moved} | {f"{SLOPE}{kind}/": slope for kind, slope in enumerate(self.slopes)}
        return {prefix + name: tensor for prefix, moves in every.items() for name, tensor in moves.tensors.items()}


class Keeper:
    """Keeps states in the directory of an edit; each takes the place of the one before.

    Attributes:
        pace: how often.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        """Keep nothing yet.

        Args:
            folder: private; it is there.
            console: is told when there is no room.
        """
        self._folder, self._console, self.pace = folder, console, Pace("step", console.note)

    def keep(self, state: State) -> None:
        """Keep a state, when one is due and the disk has room."""
        self.pace.done()
        if not self.pace.is_due:
            return
        if lack := self.pace.lack_of_room(self._folder, state.nbytes):
            self._console.note(f"{lack}: a stopped run takes all steps again")
            return
        with self.pace.keeping():
            file = state.write(self._folder / f"{STEM}-{state.tally.done}.safetensors")
            write_file(self._folder / FILE, Kept(tally=state.tally, file=file).model_dump_json().encode(), FILE_MODE)
            clear(self._folder, but=(FILE, file.name))

    def find(self, state: State, like: Losses) -> bool:
        """Put what a stopped run has left into a state; False where it has left nothing, or nothing that is whole."""
        if not (self._folder / FILE).exists():
            return False
        try:
            kept = fit(Kept, load_json(self._folder / FILE), FILE)
            if File.of(hash_file(self._folder / kept.file.name)) != kept.file:
                raise BadInput("it was changed since")
            state.read(self._folder / kept.file.name, like)
        except LiborthError as error:
            self._console.warn(f"the state of the stopped run cannot be used ({error}); all steps are taken again")
            return False
        state.tally = kept.tally
        return True


def clear(folder: Path, but: Sequence[str] = ()) -> None:
    """Remove what was kept in a directory, but for some files."""
    for path in folder.glob(f"{STEM}*"):
        if path.name not in but:
            path.unlink(missing_ok=True)
