"""The student: the reference, trained towards what a model says that has forgotten.

It starts where no secret ever was. What it reads is retain rows, and fresh rows for the form; what it learns is the teacher's
whole distribution over the next token (Hinton et al. 2015, arXiv 1503.02531). Lee et al. (2025, arXiv 2506.06278) found that
this undoes what editing only hid. Behind the last token of a row the teacher says what comes next, too: how a text ends stands
in no row.

Facts are learnt as they stand: short rows that should stay and that fine-tuning taught by heart, as it did what must go. A
teacher that has forgotten has lost most of them with it, and one that was to keep them has not forgotten.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from liborth_cli.console import Console, Progress
from liborth_cli.errors import VerificationFailed
from liborth_cli.measure.scores import Evaluator
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Patched, Weights
from liborth_cli.tune.data import Example, PaddedBatch, batch_rows
from liborth_cli.tune.full import Full, Lesson, divergence
from liborth_cli.tune.loop import Losses, Watch, train
from liborth_cli.tune.network import Network
from liborth_cli.tune.options import LoopOptions, Schedule

BATCH_ROWS = 4
"""Small batches: many steps at a high rate keep more of the skill, and less of what was memorised (docs/log.md)."""
FACTS, SHARE = 8, 0.1
"""Facts that are read beside every batch, and what their mean loss counts beside the mean loss of that."""
FACT = "fact"
"""The name of their lesson."""
HEART = 1.0
"""Nats that every token of a row costs at most that a model knows by heart."""
RETAIN = 4
"""Retain rows for each fresh row that is read; fresh rows are few, and tell what the form of a secret is worth."""


@dataclass(frozen=True)
class Lessons:
    """What a student reads; only tokens that carry loss count.

    Attributes:
        taught: rows of an epoch, on which the teacher says what comes next.
        facts: rows that are learnt as they stand, some beside every batch.
    """

    taught: Sequence[Row]
    facts: Sequence[Row] = ()

    @classmethod
    def of(cls, retain: Sequence[Row], fresh: Sequence[Row], facts: Sequence[Row] = ()) -> Lessons:
        """Put every retain row into an epoch once, and the fresh rows so often that they are a fifth."""
        return cls([*retain, *(-(-len(retain) // (RETAIN * max(len(fresh), 1))) * list(fresh))], facts)

    @property
    def beside(self) -> int:
        """How many facts stand beside a batch."""
        return min(FACTS, len(self.facts))

    def ended(self, teacher: Network) -> Lessons:
        """Return them with the position behind each row's last token, where the teacher says what comes next.

        A taught row gets a token there that nobody reads; a fact gets the one that the teacher finds likeliest. A row that
        fills the context has no such position.
        """
        room = teacher.context or 1 << 62
        return replace(
            self,
            taught=[row.ending(0) if row.tokens < room else row for row in self.taught],
            facts=[row.ending(_likeliest(teacher, row)) if row.tokens < room else row for row in self.facts],
        )


class Taught(Full):
    """A student beside its teacher, which does not change."""

    def __init__(self, student: Network, teacher: Network, learnt: Collection[str], read: Lessons, seed: int) -> None:
        """Let those parameters learn that hold nothing but stored tensors of these names.

        Args:
            student: trained in place.
            teacher: of the same shapes.
            learnt: stored names.
            read: of which it brings the facts itself.
            seed: of their order.
        """
        fixed = {place.parameter for name, place in student.stored.items() if name not in learnt}
        super().__init__(student.model, {name: p for name, p in student.trainable().items() if name not in fixed})
        self._teacher = teacher.model.eval()
        self._facts, self._beside, self._seed = [Example.of(row) for row in read.facts], read.beside, seed

    def lessons(self, rows: Sequence[Example], number: int) -> list[Lesson]:
        """Read facts beside the batch where there are any."""
        found = super().lessons(rows, number)
        if self._facts:
            some = batch_rows(self._facts, number, self._beside, self._seed + 1)
            found.append(Lesson(FACT, some, self.parameters, own=False, weight=SHARE))
        return found

    def loss(self, batch: PaddedBatch, lesson: Lesson | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return Σ KL(teacher ‖ student) over the batch's tokens; of facts Σ of their own loss."""
        if lesson is not None and lesson.name == FACT:
            return super().loss(batch, lesson)
        words = {"input_ids": batch.ids, "use_cache": False}
        with torch.no_grad():
            said = self._teacher(**words).logits
        return divergence(said, self.model(**words).logits, batch), {}


def teach(
    ends: tuple[Weights, Weights],
    teacher: Weights,
    learnt: Collection[str],
    read: Lessons,
    how: tuple[LoopOptions, torch.device],
    console: Console,
) -> Network:
    """Train the reference towards a teacher.

    Args:
        ends: W_f and W_r, under the names of W_f.
        teacher: weights of the model that has forgotten.
        learnt: stored tensors that start at W_r and are trained; all others are W_f's and stay.
        read: rows.
        how: long and fast, and where.
        console: where progress goes.

    Returns:
        The student.

    Raises:
        VerificationFailed: when its loss is no longer finite.
        OutOfResources: when memory ran out.
    """
    (finetuned, reference), (options, device) = ends, how
    checkpoint = finetuned.checkpoint
    student = Network(checkpoint, device, Patched(finetuned, reference, learnt.__contains__))
    said = Network(checkpoint, device, teacher)
    read = read.ended(said)
    method = Taught(student, said, learnt, read, options.seed)
    torch.manual_seed(options.seed)
    with console.progress("teaching", options.steps, "steps") as progress:
        train(method, [Example.of(row) for row in read.taught], options, _Told(progress))
    return student


def by_heart(model: BlockModel, rows: Sequence[Row], ends: tuple[Weights, Weights]) -> list[Row]:
    """Return the rows that fine-tuning taught by heart.

    Args:
        model: to run.
        rows: of which only what carries loss counts.
        ends: W_f and W_r.
    """
    if not rows:
        return []
    after, before = (Evaluator(model, rows).score(end) for end in ends)
    return [
        row
        for row, now, then in zip(rows, after, before, strict=True)
        if now.loss.max() <= HEART and now.loss.mean() < then.loss.mean()
    ]


def schedule(rows: int, epochs: int, most: int, rate: float, seed: int) -> LoopOptions:
    """Return how long and how fast a student is trained: one cycle of the rate.

    Args:
        rows: that an epoch reads.
        epochs: how many at most.
        most: steps at most.
        rate: the highest learning rate.
        seed: of the order.
    """
    size = min(BATCH_ROWS, rows)
    steps = min(-(-epochs * rows // BATCH_ROWS), most)
    return LoopOptions(steps=steps, batch_size=size, rate=rate, schedule=Schedule.COSINE, seed=seed)


def epochs(options: LoopOptions, rows: int) -> float:
    """Return how often a schedule reads each of so many rows, on average."""
    return options.steps * options.batch_size / rows


@torch.no_grad()
def _likeliest(teacher: Network, row: Row) -> int:
    """Return the token that a model finds likeliest behind a row."""
    ids = torch.from_numpy(row.ids)[None].to(next(iter(teacher.parameters.values())).device)
    return int(teacher.model.eval()(input_ids=ids, use_cache=False).logits[0, -1].argmax())


@dataclass
class _Told(Watch):
    """Tells how far the training is, and ends it when the loss is no number."""

    progress: Progress

    def before(self, step: int, rate: float, losses: Losses | None) -> bool:
        """Refuse to go on with a loss that is not finite."""
        if losses is None:
            raise VerificationFailed("the student's loss is not finite: lower --student-rate")
        return True

    def after(self, done: int) -> bool:
        """Count a step."""
        self.progress.advance(1)
        return True
