"""What is verified: the models a check may look at, the rows it may use, and every score of theirs, once."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.checkpoint.config import meaning
from liborth_cli.console import SILENT, Console, Progress
from liborth_cli.ranks import ALONE, World
from liborth_cli.verify.rows import Reader, RowSet, sample

if TYPE_CHECKING:
    from pathlib import Path

    from liborth_cli.checkpoint.delta import Memory
    from liborth_cli.checkpoint.hashing import BackgroundHasher
    from liborth_cli.checkpoint.hub import Source
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.checkpoint.views import Grown
    from liborth_cli.machine import Run
    from liborth_cli.manifest import Manifest
    from liborth_cli.measure.scores import Evaluator, RowScore
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.texts import Row
    from liborth_cli.stream.weights import Weights
    from liborth_cli.verify.result import Metric

NARROW = 128
"""Width of the residual stream below which threads wait for each other longer than they work."""
STATES = ("reference", "finetuned", "general")
"""W_r, W_f (where the memory is neurons: the wider model that has them) and W_g."""


MOMENTS = ("canaries", "fresh")
"""Rows of which Min-K%++ is computed: it needs what all of the vocabulary had."""
SAMPLE = "some retain rows"
"""Name of the retain rows that were drawn for pictures, where those are not all of them."""


class Need(enum.Flag):
    """What a check cannot do without; `A | B` is content with either."""

    RETAIN = enum.auto()
    CANARIES = enum.auto()
    FRESH = enum.auto()
    REFERENCE = enum.auto()
    FINETUNED = enum.auto()
    WHOLE = enum.auto()
    MANIFEST = enum.auto()

    @property
    def words(self) -> str:
        """What the user has to give."""
        return " or ".join(_GIVE[one] for one in Need if one in self)


_GIVE = {
    Need.RETAIN: "--retain-data, text of the skill that must stay",
    Need.CANARIES: "--canary, rows of what must be gone",
    Need.FRESH: "--fresh, rows like the canaries that were never trained on",
    Need.REFERENCE: "--reference, the checkpoint before fine-tuning",
    Need.FINETUNED: "the memory file or --finetuned",
    Need.WHOLE: "the memory or --finetuned",
    Need.MANIFEST: "liborth.manifest.json beside the weights, as `liborth split` writes it",
}
"""FINETUNED are weights of the general checkpoint's shapes; WHOLE may also be the wider model that neurons make."""


class Networks:
    """Models to run weights with, built when they are first needed; weights whose configurations mean the same share one.

    Attributes:
        world: the ranks that share the rows.
    """

    def __init__(self, run: Run) -> None:
        """Start without any."""
        self._run, self.world = run, run.world
        self._models: dict[str, BlockModel] = {}

    def of(self, weights: Weights) -> BlockModel:
        """Return the model for some weights; it need not have them in use."""
        key = meaning(weights.checkpoint.config)
        if key not in self._models:
            import torch

            from liborth_cli.stream.model import BlockModel

            model = self._models[key] = BlockModel(weights, torch.float32, self._run.device)
            if model.hidden < NARROW:
                torch.set_num_threads(1)
        return self._models[key]

    def close(self) -> None:
        """Stop reading ahead."""
        for model in self._models.values():
            model.close()


@dataclass(frozen=True)
class Sample:
    """Retain rows for what is drawn and decides nothing.

    Attributes:
        name: under which they are scored.
        numbers: which of all retain rows they are, ascending, (k,).
        of: how many those are.
    """

    name: str
    numbers: np.ndarray
    of: int

    @property
    def whole(self) -> bool:
        """Whether it is all of them."""
        return len(self.numbers) == self.of

    @property
    def words(self) -> str:
        """Which rows they are, for people."""
        return f"all {self.of:,} rows" if self.whole else f"{len(self.numbers):,} of the {self.of:,} rows, drawn by lot"


class States:
    """Weights by name, and their scores, each computed once: every check after the first gets the same numbers.

    Attributes:
        weights: by name: those of `STATES` that are there, and what checks put beside them.
        data: rows by name, likewise.
    """

    def __init__(
        self,
        weights: Mapping[str, Weights],
        data: Mapping[str, RowSet],
        networks: Networks,
        resident: bool | None = None,
        wide: Grown | None = None,
        console: Console = SILENT,
    ) -> None:
        """Take the weights and the rows; nothing is read yet.

        Args:
            weights: by name, with "general".
            data: rows by name.
            networks: that run them.
            resident: keep all weights in memory; None decides by what is free.
            wide: the model with the neurons of its memory, or None.
            console: where progress goes.
        """
        self._console = console
        self.weights, self.data = dict(weights), dict(data)
        self._networks, self._resident, self._wide = networks, resident, wide
        self._evaluators: dict[tuple[str, int], Evaluator] = {}
        self._scores: dict[tuple[str, str], list[RowScore]] = {}
        self._names: dict[str, str] = {}
        self._last: Weights | None = None

    def __contains__(self, name: object) -> bool:
        """Tell whether there are weights of this name."""
        return name in self.weights

    def of(self, names: Sequence[str]) -> list[str]:
        """Return those of the names that there are."""
        return [name for name in names if name in self.weights]

    def model(self, name: str) -> BlockModel:
        """Return the network that runs the weights of this name, with them in use."""
        found = self._networks.of(self.weights[name])
        found.use(self.weights[name])
        self._last = None  # whoever asked may change them
        return found

    def score(self, rows: str, name: str) -> list[RowScore]:
        """Score one list of rows at one of the states: one score a row, in the order of the rows."""
        name = self._names.get(name, name)
        if (rows, name) not in self._scores:
            self._scores[rows, name] = self.score_at(rows, self.weights[name])
        return self._scores[rows, name]

    def score_all(self, lists: Sequence[str], names: Sequence[str], advance: Callable[[int], None]) -> None:
        """Score some lists of rows at some states; of several ranks each takes some of the states, when there are enough.

        Args:
            lists: of rows.
            names: of states.
            advance: told of every state that is done.
        """
        world = self._networks.world
        states = dict.fromkeys(self._names.get(name, name) for name in names)
        todo = [name for name in states if any((rows, name) not in self._scores for rows in lists)]
        if 1 < world.size <= len(todo):
            import torch

            from liborth_cli.measure.scores import RowScore

            done = 0

            def tables(name: str) -> list[list[torch.Tensor]]:
                nonlocal done
                scores = [self.score_at(rows, self.weights[name], alone=True) for rows in lists]
                advance(1)
                done += 1
                return [[torch.from_numpy(score.table) for score in some] for some in scores]

            for name, found in zip(todo, world.each(todo, tables), strict=True):
                for rows, one in zip(lists, found, strict=True):
                    self._scores[rows, name] = [RowScore.of(table.numpy()) for table in one]
            advance(len(names) - done)
            return
        for name in names:
            for rows in lists:
                self.score(rows, name)
            advance(1)

    def score_at(self, rows: str, weights: Weights, alone: bool = False) -> list[RowScore]:
        """Score one list of rows at weights that have no name, and remember nothing; `alone`: this rank all of them."""
        model = self._networks.of(weights)
        evaluator = self._evaluator(rows, model)
        # What need not exist on disk is formed once for all lists of rows that are scored at it one after the other.
        new = None if self._last is weights is model.weights else weights
        share = evaluator.alone() if alone else nullcontext()
        with share, self._progress(evaluator, f"scoring {rows}") as progress:
            found = evaluator.score(new, progress.advance)
        self._last = weights
        return found

    def score_from(self, rows: str, base: Weights, patches: Sequence[tuple[int, Weights]]) -> Iterator[list[RowScore]]:
        """Score one list of rows at weights that are `base` up to a block, and remember nothing; see `Evaluator.score_from`."""
        self._last = None
        evaluator = self._evaluator(rows, self._networks.of(base))
        yield from evaluator.score_from(base, patches)
        self._last = None

    def _evaluator(self, rows: str, model: BlockModel) -> Evaluator:
        """Return what scores one list of rows with one network, made when it is first needed."""
        key = rows, id(model)
        if key not in self._evaluators:
            world, moments = self._networks.world, rows in MOMENTS
            self._evaluators[key] = evaluator_of(model, self.data[rows].rows, self._resident, world, moments=moments)
        return self._evaluators[key]

    def score_rows(self, rows: Sequence[Row], weights: Weights, advance: Callable[[int], None] | None = None) -> list[RowScore]:
        """Score rows of a check's own."""
        self._last = None
        evaluator = evaluator_of(self._networks.of(weights), rows, self._resident, self._networks.world)
        if advance is not None:
            return evaluator.score(weights, advance)
        with self._progress(evaluator, "scoring") as progress:
            return evaluator.score(weights, progress.advance)

    def _progress(self, evaluator: Evaluator, words: str) -> AbstractContextManager[Progress]:
        tokens = sum(row.tokens for row in evaluator.rows) // self._networks.world.size
        return self._console.progress(words, tokens, "tokens", brief=True)

    def point(self, start: str, end: str, t: float) -> str:
        """Name the point (1 − t)·start + t·end of two states, and add it to the states; the ends keep their names."""
        if t in (0.0, 1.0):
            return end if t else start
        from liborth_cli.stream.weights import between

        name = f"{start} → {end} {t:g}"
        self.weights.setdefault(name, between(self.weights[start], self.weights[end], t))
        return name

    def rename(self, known: str, name: str) -> None:
        """Give weights another name: what is scored under one of them is known under both."""
        self.weights[name], self._names[name] = self.weights[known], known

    def restored(self, beta: float) -> str:
        """Name the general checkpoint with a share β of its memory, and add it to the states.

        Where the memory is neurons, β multiplies what they write; elsewhere it blends the weights. β = 1 is "finetuned".
        """
        if self._wide is None or beta in (0.0, 1.0):
            return self.point("general", "finetuned", beta)
        from liborth_cli.stream.weights import Point

        name = f"neurons {beta:g}"
        self.weights.setdefault(name, Point(self._wide.at(beta)))
        return name


def evaluator_of(
    model: BlockModel, rows: Sequence[Row], resident: bool | None = None, world: World = ALONE, *, moments: bool = False
) -> Evaluator:
    """Return an evaluator of the kind that the rows' lengths need."""
    from liborth_cli.measure.scores import Evaluator, SlidingEvaluator

    if model.context is not None and any(row.tokens > model.context for row in rows):
        return SlidingEvaluator(model, rows, model.context, resident, world, moments=moments)
    return Evaluator(model, rows, resident, world, moments=moments)


@dataclass(frozen=True)
class Subject:
    """Everything `verify` knows. It is built once and does not change; what checks add are states.

    Attributes:
        source: the directory that is verified.
        general: its weights, W_g.
        memory: its memory, or None.
        reference: W_r, or None.
        finetuned: W_f in weights of the general checkpoint's shapes: its files, or `general` and `memory` laid over each other.
        grown: the model with the neurons that its memory holds, or None: wider than `general`.
        manifest: of the split, or None.
        data: rows by name: "retain", "canaries", "fresh"; those that were given.
        states: the weights by name, and their scores.
        reader: reads further rows.
        seed: for everything random.
        show_text: whether texts may be printed.
        run: device and threads.
        console: where progress goes.
        unavailable: what is not there → why, where the manifest tells more than that it was not given.
        hashes: of the files of "reference" and "finetuned", by name.
        hasher: of other files, each once, whoever asks; None: everybody has one of their own.
    """

    source: Source
    general: Checkpoint
    states: States
    reader: Reader
    run: Run
    console: Console
    memory: Memory | None = None
    reference: Checkpoint | None = None
    finetuned: Checkpoint | None = None
    grown: Grown | None = None
    manifest: Manifest | None = None
    data: Mapping[str, RowSet] = field(default_factory=dict)
    seed: int = 0
    show_text: bool = False
    unavailable: Mapping[Need, str] = field(default_factory=dict)
    hashes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    hasher: BackgroundHasher | None = None

    def has(self, need: Need) -> bool:
        """Tell whether one of several things is there."""
        there = {
            Need.RETAIN: "retain" in self.data, Need.CANARIES: "canaries" in self.data, Need.FRESH: "fresh" in self.data,
            Need.REFERENCE: self.reference is not None, Need.FINETUNED: self.finetuned is not None,
            Need.WHOLE: "finetuned" in self.states, Need.MANIFEST: self.manifest is not None,
        }  # fmt: skip
        return any(there[one] for one in need)

    def why(self, need: Need) -> str:
        """Say why something is not there, where more is known than that it was not given."""
        return "".join(f"; {why}" for one, why in self.unavailable.items() if one & need)

    def rows(self, name: str) -> tuple[Row, ...]:
        """Return the rows of one kind; none when they were not given."""
        return self.data[name].rows if name in self.data else ()

    def groups(self, name: str) -> np.ndarray:
        """Return which rows of one kind say the same thing, (n,)."""
        return self.data[name].groups

    def score(self, rows: str, state: str) -> list[RowScore]:
        """Score one list of rows at one of the states; see `States.score`."""
        return self.states.score(rows, state)

    def loss(self, rows: str, state: str) -> float:
        """Return the mean loss a token of one list of rows at one of the states."""
        from liborth_cli.measure.scores import mean_loss

        return mean_loss(self.score(rows, state))

    @cached_property
    def sample(self) -> Sample:
        """The retain rows that pictures are drawn from; the seed decides which."""
        rows = self.data["retain"]
        numbers = sample(rows, self.seed)
        found = Sample("retain" if len(numbers) == len(rows) else SAMPLE, numbers, len(rows))
        if not found.whole:
            self.states.data[SAMPLE] = RowSet(tuple(rows.rows[i] for i in numbers), rows.groups[numbers])
        return found

    def drawn(self, state: str, base: np.ndarray) -> Metric:
        """Return the mean loss a token of the retain rows at a state, from those of the sample.

        Args:
            state: its name.
            base: summed loss of all rows, (n,), at something near: what the sample differs from that is added to its mean.
        """
        from liborth_cli.verify import statistics

        sums, some = statistics.totals(self.score(self.sample.name, state))
        if self.sample.whole:
            return statistics.curve(sums[None], some, self.groups("retain"), self.seed)[0]
        return statistics.by_sample(sums, base, self.sample.numbers, self._kept(), self.groups("retain"), self.seed)

    def about(self, state: str, base: np.ndarray) -> float:
        """Return what `drawn` does, without an interval."""
        from liborth_cli.verify import statistics

        if self.sample.whole:
            return self.loss("retain", state)
        sums, _ = statistics.totals(self.score(self.sample.name, state))
        once = np.ones((1, len(base)))
        return float(statistics.difference(once, sums, base, self.sample.numbers, self._kept())[0])

    def _kept(self) -> np.ndarray:
        """Return how many tokens of each retain row carry loss, (n,)."""
        return np.array([float(row.keep.sum()) for row in self.rows("retain")])

    @property
    def folder(self) -> Path:
        """The directory with the weights."""
        return self.source.path if self.source.path.is_dir() else self.source.path.parent

    def label(self, number: int, row: Row) -> str:
        """Name a row where anybody may read it: its line in its file, never what it says (docs/decisions/0023).

        Args:
            number: of the row, from 0.
            row: the row.
        """
        place = row.where.rpartition(": ")[2]
        text = place if place != row.where else f"row {number + 1}"
        if self.show_text and self.reader.encoder is not None:
            text += f": {self.reader.encoder.decode(row.ids)}"
        return text
