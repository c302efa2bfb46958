"""The student that `--method distill` ends at, taught by the split itself; what moved lies where private data do."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from liborth_cli.checkpoint.private import identity
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.writer import write_file
from liborth_cli.console import duration
from liborth_cli.curvature.factors import FILE_MODE
from liborth_cli.dose.passes import Passes
from liborth_cli.dose.steps import COURSE, KIND, TRAINED, StepsJob
from liborth_cli.dose.texts import Texts
from liborth_cli.errors import OutOfResources, UsageError
from liborth_cli.machine import TRAINING_BYTES, too_large
from liborth_cli.measure.scores import Evaluator, mean_loss
from liborth_cli.methods import METHODS, Amount
from liborth_cli.methods.distill import Distill
from liborth_cli.recall.moves import Moves, Stepped
from liborth_cli.recall.student import FRESH, schedule, teach
from liborth_cli.split import SplitOptions
from liborth_cli.split.edits import EditSet
from liborth_cli.split.split import Opened
from liborth_cli.stream import work
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Patched, Point

TEACHER_BYTES = 4
"""Of every weight: the teacher, in float32."""


@dataclass(frozen=True)
class Taught:
    """What became of a student; losses in nats a token, of the reference, of the teacher and of the student.

    Attributes:
        held_out: of retain rows that nobody read.
        forget: of the rows that must go.
        fresh: of rows of their form that were never trained on.
        epochs: how often it read its rows.
        rows: how many these were.
    """

    held_out: list[float]
    forget: list[float]
    fresh: list[float]
    epochs: int
    rows: int

    def __str__(self) -> str:
        """Say it in one line."""
        kept, gone, never = (
            " → ".join(f"{x:.2f}" for x in (some[0], some[2])) for some in (self.held_out, self.forget, self.fresh)
        )
        return (
            f"distill: the reference read {self.rows:,} rows {self.epochs:,} times, taught by the model that recall made; "
            f"held-back retain rows: {kept} nats a token (teacher: {self.held_out[1]:.2f}); "
            f"forget rows: {gone} (teacher: {self.forget[1]:.2f}); fresh rows: {never} (teacher: {self.fresh[1]:.2f})"
        )


@dataclass
class StudentJob:
    """A student that a split needs, and the steps that make its teacher.

    Attributes:
        method: with its settings.
        epochs: how often it reads its rows.
        steps: of the teacher.
        names: stored tensors that the student learns.
    """

    method: Distill
    epochs: int
    steps: StepsJob
    names: list[str]

    @classmethod
    def of(cls, inputs: Opened, options: SplitOptions, texts: Texts) -> StudentJob:
        """Plan the teacher and the student of a split.

        Args:
            inputs: what is divided.
            options: the split; its amount counts where it is one of epochs.
            texts: the rows.

        Raises:
            UsageError: when there is no reference, a row it needs is missing, or an option does not go with it.
        """
        method, default = options.rule, METHODS["distill"].default
        assert isinstance(method, Distill)
        assert default is not None
        if inputs.alone:
            raise UsageError("distill starts at the checkpoint before fine-tuning: give it, or use --method recall")
        amount = options.amount if options.amount.kind == "epochs" else default
        steps = StepsJob.of(inputs, replace(options, method="recall", amount=Amount("steps", method.teacher_steps)), texts)
        return cls(method, int(amount.value or 1), steps, steps.names)

    @property
    def rows(self) -> list[Row]:
        """What the student reads in an epoch: retain rows that factors were taken on too, and fresh rows some times."""
        return [*self.steps.rows.retain, *FRESH * self.steps.rows.fresh]

    @property
    def caveat(self) -> str:
        """What to know of the teacher's aim before its steps are taken."""
        return self.steps.caveat

    def told(self, model: BlockModel) -> tuple[str, float]:
        """Return what would be done and how long that takes, in words, and the seconds."""
        words, seconds = self.steps.told(model)
        tokens = sum(row.tokens for row in self.rows)
        mine = self.epochs * tokens * (1 + TRAINED) * work.multiplied(model) / work.rate(model.device)
        read = f"{len(self.rows):,} rows, {tokens:,} tokens, {self.epochs} times"
        return f"the teacher: {words}; the student reads {read}: {duration(mine)}", seconds + mine

    def memory_bytes(self, model: BlockModel) -> int:
        """Return what it takes of memory, about: while the teacher is made, or while the student learns."""
        return max(self.steps.memory_bytes(model), (TRAINING_BYTES + TEACHER_BYTES) * model.elements)

    def check_memory(self, model: BlockModel) -> None:
        """Refuse what does not fit, before anything is measured.

        Raises:
            OutOfResources: when both models, or the attack inside the teacher's steps, do not fit into memory.
        """
        self.steps.check_memory(model)
        if too_much := too_large(self.memory_bytes(model)):
            raise OutOfResources(f"distill, which trains all weights beside their teacher, takes about {too_much}")

    def take(self, passes: Passes, inputs: Opened, stack: ExitStack, lasting: bool) -> str:
        """Make the teacher and the student, or find them, and put how the student differs from W_f into `inputs`.

        Args:
            passes: with the folder where private data lie.
            inputs: what is divided.
            stack: closes what is opened.
            lasting: the folder is there for a later run.

        Returns:
            What became of both, as sentences.

        Raises:
            LiborthError: the leaf says which.
        """
        told = self.steps.take(passes, inputs, stack, lasting)
        teacher, console = inputs.edit, passes.console
        assert teacher is not None
        key = json.dumps([teacher.path.name, asdict(self.method), self.epochs, self.names, self.steps.seed], sort_keys=True)
        place = passes.folder / f"{KIND}-{identity(passes.folder, key.encode())[:12]}"
        passes.used.append(place)
        if (place / COURSE).is_file():
            console.note(f"student: reusing {place}")
        else:
            place.mkdir(mode=0o700, exist_ok=True)
            self._teach(place, teacher, passes, inputs)
        inputs.edit = stack.enter_context(EditSet.open(place))
        became = str(Taught(**json.loads((place / COURSE).read_text(encoding="ascii"))))
        console.note(became)
        return f"{told}. {became}"

    def _teach(self, place: Path, edit: EditSet, passes: Passes, inputs: Opened) -> None:
        model, finetuned = passes.model, Point(inputs.finetuned)
        reference, device = Point(inputs.finetuned, inputs.reference, 0.0), passes.run.device
        forgotten = Stepped(finetuned, _read(edit, inputs.finetuned, place))
        model.unload()
        rows, width = self.rows, model.hidden
        how = schedule(len(rows), self.epochs, self.method.student_rate / width, self.steps.seed)
        learnt = set(self.names)
        student = teach((finetuned, reference), forgotten, learnt, rows, (how, device), passes.console)
        moved = Moves({name: inputs.finetuned.tensors[name].shape for name in self.names}, place)
        for name in self.names:
            old = torch.empty(inputs.finetuned.tensors[name].shape)
            finetuned.read_into(old.view(-1), inputs.finetuned.tensors[name])
            moved.tensors[name].copy_(student.value(name).cpu()).sub_(old)
        del student
        ends = Patched(finetuned, reference, learnt.__contains__), forgotten, Stepped(finetuned, moved)
        given = self.steps.rows
        found = [[mean_loss(Evaluator(model, some).score(end)) if some else math.nan for end in ends]
                 for some in (given.held_out, given.forget, given.fresh)]  # fmt: skip
        EditSet.write(place, moved.tensors)
        write_file(place / COURSE, json.dumps(asdict(Taught(*found, self.epochs, len(rows)))).encode(), FILE_MODE)


def _read(edit: EditSet, checkpoint: Checkpoint, folder: Path) -> Moves:
    """Read a whole edit."""
    names = [name for name in checkpoint.tensors if edit.holds(name)]
    moves = Moves({name: checkpoint.tensors[name].shape for name in names}, folder)
    for name in names:
        matrices = moves.tensors[name].view(-1, *checkpoint.tensors[name].shape[-2:])
        for number, matrix in enumerate(matrices):
            matrix.copy_(edit.of(name, number))
    return moves
