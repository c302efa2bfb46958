"""The student that `--method distill` ends at, taught by the split itself; what moved lies where private data do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from liborth_kernels.rounding import round_to

from liborth_cli.checkpoint.dtypes import torch_dtype
from liborth_cli.checkpoint.files import write_file
from liborth_cli.checkpoint.pair import Policy, match
from liborth_cli.checkpoint.private import prepare_factors
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import duration
from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.factors import FILE_MODE
from liborth_cli.dose.overlap import apart
from liborth_cli.dose.passes import Pass, Passes, retain_options
from liborth_cli.dose.steps import COURSE, TRAINED, Start, StepsJob, edit_folder, tensors
from liborth_cli.dose.texts import Texts
from liborth_cli.errors import OutOfResources, PairMismatch, UsageError
from liborth_cli.machine import TRAINING_BYTES, too_large
from liborth_cli.measure.scores import Evaluator, mean_loss
from liborth_cli.methods import Amount
from liborth_cli.methods.distill import Distill
from liborth_cli.recall.moves import Moves, Stepped
from liborth_cli.recall.steps import Rows
from liborth_cli.recall.student import Lessons, by_heart, epochs, schedule, teach
from liborth_cli.split import SplitOptions
from liborth_cli.split.edits import EditSet
from liborth_cli.split.split import Opened
from liborth_cli.stream import work
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row, data_hash
from liborth_cli.stream.weights import Patched, Point, Weights
from liborth_cli.tune.options import LoopOptions

TEACHER_BYTES = MOVED_BYTES = 4
"""Of every weight: the teacher, or what the student differs by from the fine-tuned model, in float32."""
RETAIN = "retain"
"""The factors of the retain data at the student, in its folder."""
LEVELLED = 3
"""Place of the levelled student among the losses of an outcome."""


@dataclass(frozen=True)
class Outcome:
    """What became of a student; losses in nats a token, of the reference, the teacher, the student, and the levelled student.

    Attributes:
        held_out: of retain rows that nobody read.
        forget: of the rows that must go; empty where they were not given.
        fresh: of rows of their form that were never trained on; likewise.
        rows: how many it had to read.
        times: how often it read each, on average.
        facts: rows that it learnt as they stand.
    """

    held_out: list[float]
    forget: list[float]
    fresh: list[float]
    rows: int
    times: float
    facts: int = 0

    def __str__(self) -> str:
        """Say it in one line."""
        told = [
            f"{name}: {' → '.join(f'{loss:.2f}' for loss in (some[0], *some[2:]))}{unit} (teacher: {some[1]:.2f})"
            for name, some, unit in (
                ("held-back retain rows", self.held_out, " nats a token"),
                ("forget rows", self.forget, ""),
                ("fresh rows", self.fresh, ""),
            )
            if some
        ]
        facts = f" and learnt {self.facts:,} as they stand" if self.facts else ""
        levelled = ", and was levelled by steps of recall" if len(self.held_out) > LEVELLED else ""
        return (
            f"distill: the reference read {self.rows:,} rows {self.times:.3g} times each{facts}, taught by a model that has "
            f"forgotten{levelled}; {'; '.join(told)}"
        )

    def then(self, losses: Sequence[list[float]]) -> Outcome:
        """Return it with losses of one model more: on held-out, forget and fresh rows."""
        held_out, forget, fresh = losses
        return replace(self, held_out=[*self.held_out, *held_out], forget=[*self.forget, *forget], fresh=[*self.fresh, *fresh])


@dataclass
class StudentJob:
    """A student that a split needs, and its teacher.

    Attributes:
        method: with its settings.
        epochs: how often the student reads its rows, at most.
        teacher: a checkpoint that has forgotten, or the steps that make one.
        level: steps that the student takes when it has learnt; None: none.
        rows: what the student reads; the teacher's steps may read fewer.
        facts: rows of small retain files that are no secrets; those that the fine-tuned model knows by heart, when that was
            measured. The student learns them as they stand.
        names: stored tensors that the student learns.
        seed: of the order of the rows.
    """

    method: Distill
    epochs: int
    teacher: Path | StepsJob
    level: StepsJob | None
    rows: Rows
    facts: list[Row]
    names: list[str]
    seed: int

    @classmethod
    def of(cls, inputs: Opened, options: SplitOptions, texts: Texts, teacher: Path | None) -> StudentJob:
        """Plan the teacher and the student of a split.

        Args:
            inputs: what is divided.
            options: the split; its amount counts where it is one of epochs.
            texts: the rows.
            teacher: a checkpoint that has forgotten; None has one made.

        Raises:
            UsageError: when there is no reference, a row it needs is missing, or an option does not go with it.
        """
        method = options.rule
        assert isinstance(method, Distill)
        options.check_steps()
        if inputs.alone:
            raise UsageError("distill starts at the checkpoint before fine-tuning: give it, or use --method recall")
        if teacher is None and not texts.marked:
            raise UsageError("distill needs a teacher that has forgotten: --forget-data has one made, --teacher DIR names one")
        if not (texts.retain and texts.held_out):
            raise UsageError("distill teaches on --retain-data: it is missing, or has too few rows to hold one back")
        if not (names := tensors(inputs, options)):
            raise UsageError("distill teaches what fine-tuning changed: of the tensors that are divided it changed none")
        amount = options.amount if options.amount.kind == "epochs" else method.suggested

        def steps(most: int) -> StepsJob:
            return StepsJob.of(inputs, replace(options, method="recall", amount=Amount("steps", most)), texts)

        return cls(
            method,
            epochs=int(amount.value or 1),
            teacher=teacher or steps(method.teacher_steps),
            level=steps(method.level_steps) if texts.marked and method.level_steps else None,
            rows=Rows(texts.marked, texts.level, texts.public, texts.held_out, small=texts.small),
            facts=apart(texts.few, texts.marked),
            names=names,
            seed=options.seed,
        )

    @property
    def steps(self) -> StepsJob | None:
        """The steps that make the teacher; None where it is there."""
        return self.teacher if isinstance(self.teacher, StepsJob) else None

    @property
    def lessons(self) -> Lessons:
        """What the student reads."""
        return Lessons.of(self.rows.without(self.facts).retain, self.rows.fresh, self.facts)

    @property
    def caveat(self) -> str:
        """What to know before anything is done; ""."""
        if self.steps is not None:
            return self.steps.caveat
        if not self.rows.fresh:
            return "distill: without --fresh rows or --forget-pattern the student learns nothing of the form of what must go"
        return ""

    def told(self, model: BlockModel, dtype: str = "float32") -> tuple[str, float]:
        """Return what would be done and how long that takes, in words, and the seconds; training is in `dtype`."""
        words, seconds = self.steps.told(model, dtype) if self.steps is not None else (str(self.teacher), 0.0)
        read, facts = self.lessons, self.facts
        rows = read.taught
        tokens, how = sum(row.tokens for row in rows), self._schedule(model, len(rows))
        times = epochs(how, len(rows))
        mine = times * tokens * (1 + TRAINED) * work.multiplied(model) / work.rate(model.device, dtype)
        mine += work.comparing(model, times * tokens) + work.updating(model, how.steps)
        beside = how.steps * read.beside * sum(row.tokens for row in facts) / max(len(facts), 1)
        mine += beside * TRAINED * work.multiplied(model) / work.rate(model.device, dtype)
        told = f"{len(rows):,} rows, {tokens:,} tokens, {times:.3g} times"
        told += f", and {len(facts):,} as they stand, where they are known by heart" if facts else ""
        students = self.method.generations
        taught = f"the teacher: {words}; the student reads {told}: {duration(mine)}"
        again = f"; {students} students in turn, each taught by the one before" if students > 1 else ""
        if self.level is None:
            return taught + again, seconds + students * mine
        words, last = self.level.told(model, dtype)
        walked = sum(row.tokens for row in self.level.rows.retain) * (2 + work.BACK + work.AGAIN)  # and sums: like a product
        each = mine + last + walked * work.multiplied(model) / work.rate(model.device, dtype)
        return f"{taught}; then {words}{again}", seconds + students * each

    def memory_bytes(self, model: BlockModel) -> int:
        """Return what it takes of memory, about: while the teacher is made, the student learns, or takes steps itself."""
        before = self.steps.memory_bytes(model) if self.steps is not None else 0
        after = self.level.memory_bytes(model) + MOVED_BYTES * model.elements if self.level is not None else 0
        return max(before, (TRAINING_BYTES + TEACHER_BYTES) * model.elements, after)

    def check_memory(self, model: BlockModel) -> None:
        """Refuse what does not fit, before anything is measured.

        Raises:
            OutOfResources: when both models, or the attack inside the teacher's steps, do not fit into memory.
        """
        if self.steps is not None:
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
        prepare_factors(passes.folder)
        return self._decided(passes.model, inputs)._take(passes, inputs, stack, lasting)

    def _decided(self, model: BlockModel, inputs: Opened) -> StudentJob:
        """Return it with the facts that are some; other rows are retain rows like any.

        The teacher need not keep facts: where it must, it does not forget what looks like them.
        """
        facts = by_heart(model, self.facts, (Point(inputs.finetuned), Point(inputs.finetuned, inputs.reference, 0.0)))
        teacher = self.teacher
        if isinstance(teacher, StepsJob):
            teacher = replace(teacher, rows=replace(teacher.rows, improved=self.rows.improved).without(facts))
        return replace(self, teacher=teacher, rows=self.rows.without(facts), facts=facts)

    def _take(self, passes: Passes, inputs: Opened, stack: ExitStack, lasting: bool) -> str:
        console = passes.console
        told, known, teacher = self._teacher(passes, inputs, stack, lasting)
        settings = asdict(replace(self.method, level_steps=0, generations=1))
        how = [settings, self.epochs, self.names, self.seed, data_hash(self.facts) if self.facts else ""]
        every = [told]
        for _ in range(self.method.generations):
            place = edit_folder(passes, "distill", known, self.rows, how)
            if (place / COURSE).is_file():
                console.note(f"student: reusing {place}")
            else:
                place.mkdir(mode=0o700, exist_ok=True)
                self._teach(place, teacher(place), passes, inputs)
            inputs.edit = stack.enter_context(EditSet.open(place))
            outcome = Outcome(**json.loads((place / COURSE).read_text(encoding="ascii")))
            console.note(str(outcome))
            level = self.level
            every += self._level(level, outcome, passes, inputs, stack, lasting) if level is not None else [str(outcome)]
            known, teacher = _teaches(inputs)
        return "; ".join(filter(None, every))

    def _schedule(self, model: BlockModel, rows: int) -> LoopOptions:
        method = self.method
        return schedule(rows, self.epochs, method.student_steps, method.student_rate / model.hidden, self.seed)

    def _teacher(
        self, passes: Passes, inputs: Opened, stack: ExitStack, lasting: bool
    ) -> tuple[str, Sequence[object], Callable[[Path], Weights]]:
        """Return what became of the teacher, what identifies it, and its weights, made with a private folder for scratch."""
        if isinstance(self.teacher, StepsJob):
            return self.teacher.take(passes, inputs, stack, lasting), *_teaches(inputs)
        checkpoint = stack.enter_context(Checkpoint.open(self.teacher))
        if odd := _unlike(checkpoint, inputs.finetuned):
            raise PairMismatch(
                f"--teacher {self.teacher}: {odd!r} is missing there or has another shape than in the fine-tuned model; "
                "give that model, edited"
            )
        names = inputs.finetuned.tensors
        if all(name in checkpoint.tensors and _same(checkpoint, inputs.finetuned, name) for name in names):
            raise UsageError(
                f"--teacher {self.teacher}: that is the fine-tuned model, and what it says carries the secrets over"
            )
        known = [shard.identity for shard in checkpoint.shards.values()]
        return "", known, lambda folder: Point(inputs.finetuned, checkpoint, 0.0)

    def _teach(self, place: Path, teacher: Weights, passes: Passes, inputs: Opened) -> None:
        model, finetuned = passes.model, Point(inputs.finetuned)
        reference, read, learnt = Point(inputs.finetuned, inputs.reference, 0.0), self.lessons, set(self.names)
        model.unload()
        how = replace(self._schedule(model, len(read.taught)), dtype=passes.training)
        student = teach((finetuned, reference), teacher, learnt, read, (how, passes.run.device), passes.console)
        moved = Moves({name: inputs.finetuned.tensors[name].shape for name in self.names}, place)
        for name, move in moved.tensors.items():
            old = torch.empty(move.numel())
            finetuned.read_into(old, inputs.finetuned.tensors[name])
            # What is stored is the student rounded: steps that begin there add to that.
            move.copy_(round_to(student.value(name), torch_dtype(inputs.finetuned.tensors[name].dtype))).sub_(old.view_as(move))
        del student
        ends = Patched(finetuned, reference, learnt.__contains__), teacher, Stepped(finetuned, moved)
        count = len(read.taught)
        taught = Outcome(*self._losses(model, ends), rows=count, times=epochs(how, count), facts=len(read.facts))
        EditSet.write(place, moved.tensors)
        write_file(place / COURSE, json.dumps(asdict(taught)).encode(), FILE_MODE)

    def _level(
        self, steps: StepsJob, outcome: Outcome, passes: Passes, inputs: Opened, stack: ExitStack, lasting: bool
    ) -> list[str]:
        """Take steps of recall on the student, by factors that are its own, and return what became of it and of them."""
        taught, finetuned = _edit(inputs), Point(inputs.finetuned)
        factors, moved = taught.path / RETAIN, _read(taught, inputs.finetuned, taught.path)

        def measure() -> FactorSet:
            job = Pass(RETAIN, steps.rows.retain, [], retain_options((), self.seed, passes.dtype))
            return stack.enter_context(FactorSet.open(passes.measure_at(Stepped(finetuned, moved), job, factors)))

        told = steps.take(passes, inputs, stack, lasting, Start(moved, taught.path.name, measure))
        shutil.rmtree(factors, ignore_errors=True)
        end = _read(_edit(inputs), inputs.finetuned, taught.path)
        became = str(outcome.then(self._losses(passes.model, [Stepped(finetuned, end)])))
        passes.console.note(became)
        return [became, f"the student, levelled by {told}"]

    def _losses(self, model: BlockModel, ends: Sequence[Weights]) -> list[list[float]]:
        """Return what models lose on held-out, forget and fresh rows; nothing where there are none."""
        every = self.rows.held_out, self.rows.forget, self.rows.fresh
        return [[mean_loss(Evaluator(model, rows).score(end)) for end in ends] if rows else [] for rows in every]


def _unlike(teacher: Checkpoint, finetuned: Checkpoint) -> str:
    """Return the first tensor that a teacher lacks, in whole or in part, "" when there is none: W_f would stand in for it."""
    try:
        pairs = [(item.tensor, item.reference) for item in match(teacher, finetuned, Policy()).items]
    except PairMismatch:
        pairs = [(tensor, teacher.tensors.get(name)) for name, tensor in finetuned.tensors.items()]
    return next((mine.name for mine, its in pairs if its is None or its.shape != mine.shape), "")


def _same(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Tell whether a tensor is the same in two checkpoints."""
    return one.tensors[name].shape == other.tensors[name].shape and bool(np.array_equal(one.read(name), other.read(name)))


def _edit(inputs: Opened) -> EditSet:
    """Return the edit that was put into `inputs`."""
    assert inputs.edit is not None
    return inputs.edit


def _teaches(inputs: Opened) -> tuple[Sequence[object], Callable[[Path], Weights]]:
    """Return what identifies W_f after the edit in `inputs`, and its weights, made with a private folder for scratch."""
    edit, finetuned = _edit(inputs), inputs.finetuned
    return [edit.path.name], lambda folder: Stepped(Point(finetuned), _read(edit, finetuned, folder))


def _read(edit: EditSet, checkpoint: Checkpoint, folder: Path) -> Moves:
    """Read a whole edit."""
    names = [name for name in checkpoint.tensors if edit.holds(name)]
    moves = Moves({name: checkpoint.tensors[name].shape for name in names}, folder)
    for name in names:
        matrices = moves.tensors[name].view(-1, *checkpoint.tensors[name].shape[-2:])
        for number, matrix in enumerate(matrices):
            matrix.copy_(edit.of(name, number))
    return moves
