"""`extract`: let a fine-tuned model write by itself, and keep what it knows by heart that the model before it did not.

Secrets that nobody lists cannot be forgotten by a list. But a model tells them: texts drawn from it recite what it memorised
(Carlini et al. 2021, arXiv 2012.07805), and the model before fine-tuning says which of that was there before. A find is a run
of tokens, each of which the fine-tuned model is sure of, on which fine-tuning won many nats in all. What stands in the retain
data is skill and no find.

The first texts begin with any token. Later ones begin mostly where runs began on which fine-tuning won something, as finds do:
rows of one form begin alike.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli import command_module
from liborth_cli.console import JsonObject
from liborth_cli.errors import BadInput, UsageError, shown

if TYPE_CHECKING:
    from liborth_cli.console import Console
    from liborth_cli.machine import Run
    from liborth_cli.stream.encoder import TextEncoder
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.texts import Row
    from liborth_cli.stream.weights import Weights

ROUNDS, ANYWHERE = 8, 2
"""Texts are drawn in so many rounds; after the first, one in so many begins anywhere, the others where runs began, and mostly
where such did that were seldom written."""
SEEDS = 1 << 64
"""So many seeds there are."""
TRACE = 0.25
"""Share of what is asked of a find that makes a run worth beginning with."""
LITTLE = 1.0
"""Nats below which nothing was won."""
OPENING, BACK = 6, 3
"""A later text begins with so many tokens at most, and so many around the beginning of a run are where they may end."""
GRAM = 4
"""Consecutive tokens by which runs are compared; a run of fewer is a coincidence."""
SAMENESS = 0.5
"""Share of a run's grams that another run, or the retain data, holds, from which it is no find of its own."""
CHARACTER = 4
"""Tokens that a character takes at most, where they are bytes."""
BROKEN = "\ufffd"
"""What stands for a piece of a character."""
FORM = 3
"""Other finds that a run stands before, from which it is their form and no find."""


@dataclass(frozen=True)
class ExtractRequest:
    """What is asked.

    Attributes:
        reference: checkpoint before fine-tuning.
        finetuned: checkpoint after it.
        out: file to write.
        retain: files of texts of the skill; what stands there is no find.
        begin: what texts begin with, in turn; none: what the tokenizer puts first, and then any token.
        texts: how many the model writes.
        most: tokens of a text, at most.
        sure: loss of a token in the fine-tuned model below which it counts as known by heart, nats.
        least: nats that fine-tuning won on a find, at least.
        seed: of what is drawn.
    """

    reference: str
    finetuned: str
    out: Path
    retain: Sequence[str] = ()
    begin: Sequence[str] = ()
    texts: int = 4096
    most: int = 64
    sure: float = 0.3
    least: float = 25.0
    seed: int = 0

    def check(self) -> None:
        """Refuse numbers with which nothing, or everything, would be found.

        Raises:
            UsageError: names the option.
        """
        bounds = (
            ("--texts", self.texts, GRAM),
            ("--max-new-tokens", self.most, GRAM),
            ("--sure", self.sure, 0),
            ("--least", self.least, 0),
        )
        for option, value, low in bounds:
            if not (math.isfinite(value) and value >= low):
                raise UsageError(f"{option} takes a finite number, {low} or more")


@dataclass(frozen=True)
class Recital:
    """A run of tokens of a text that the fine-tuned model knows by heart.

    Attributes:
        ids: of the text, (n,).
        front: how many of them it was given and did not write.
        begin: number of the run's first token.
        end: of the one behind its last.
        gain: nats that fine-tuning won on it.
    """

    ids: np.ndarray
    front: int
    begin: int
    end: int
    gain: float

    @cached_property
    def grams(self) -> set[bytes]:
        """Its consecutive tokens, GRAM at a time: every round compares all runs so far."""
        return set(grams(self.ids[self.begin : self.end]))


@dataclass
class Find:
    """What was found by heart.

    Attributes:
        run: the one that won most.
        times: how often half of it or more was recited.
    """

    run: Recital
    times: int = 1


@dataclass(frozen=True)
class Extracted:
    """What became of it.

    Attributes:
        finds: most nats first.
        texts: how many were written.
        tokens: in them.
        out: the file.
        notes: what the command said, where Python called it.
    """

    finds: list[Find] = field(repr=False)
    texts: int
    tokens: int
    out: Path
    notes: tuple[str, ...] = ()

    @property
    def once(self) -> int:
        """How many were recited by one text only."""
        return sum(find.times == 1 for find in self.finds)

    def __str__(self) -> str:
        """Say it in one line."""
        some = ""
        if self.once:
            some = f"; {self.once:,} of them in one text only, so there may be more that stand in none"
        found = f"{len(self.finds):,} run{'s' * (len(self.finds) != 1)} known by heart"
        return f"{found} in {self.texts:,} texts, {self.tokens:,} tokens{some}"

    def to_json(self) -> JsonObject:
        """Return a JSON object, without the texts."""
        return {
            "output": str(self.out), "finds": len(self.finds), "once": self.once, "texts": self.texts, "tokens": self.tokens,
        }  # fmt: skip


def extract(request: ExtractRequest, run: Run, console: Console) -> Extracted:
    """Have the fine-tuned model write, and write what it knows by heart into a private file.

    Args:
        request: what is asked.
        run: device, threads, and whether a file may be replaced.
        console: where progress and notes go.

    Raises:
        LiborthError: the leaf says which; nothing is written then.
    """
    import torch

    from liborth_cli.checkpoint import config
    from liborth_cli.checkpoint.adapter import open_model
    from liborth_cli.checkpoint.blockscaled import decoded
    from liborth_cli.checkpoint.hub import resolve
    from liborth_cli.checkpoint.outputs import Kind, Place, check_outputs
    from liborth_cli.checkpoint.private import FILE_MODE
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.checkpoint.writer import write_file
    from liborth_cli.stream.encoder import TextEncoder
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.texts import DataFile, RowReader
    from liborth_cli.stream.weights import Point
    from liborth_cli.verify.rows import UNLIMITED

    request.check()
    files = [DataFile.parse(name, "--retain-data") for name in request.retain]
    sources = [resolve(name) for name in (request.reference, request.finetuned)]
    inputs = [source.path for source in sources] + [file.path for file in files]
    check_outputs([Place(request.out, kind=Kind.FILE)], inputs, run.force)
    with ExitStack() as stack:
        before = decoded(stack.enter_context(Checkpoint.open(sources[0].path)))
        after = decoded(stack.enter_context(open_model(sources[1].path, before)))
        ends = Point(after, before, 0.0), Point(after)
        model = BlockModel(ends[1], torch.float32, run.device)
        stack.callback(model.close)
        encoder = TextEncoder.beside(*after.folders)
        if encoder is None:
            raise BadInput(
                f"{after.folders[-1]}: no tokenizer files here, and what the model writes is to be read; copy them there"
            )
        openings = _openings(request.begin, encoder, model.context)
        public = RowReader(encoder, model.vocabulary, UNLIMITED, tell=console.note).read(files) if files else []
        if not public:
            console.warn("without --retain-data what fine-tuning taught of the skill by heart is found, too")
        if differ := config.warning(before, after, "the checkpoint before runs under the fine-tuned one's"):
            console.warn(differ)
        found, tokens = _Search(request, model, ends, openings, public).run(console)
        written = [(find, record) for find in found if (record := _record(find, encoder))]
    lines = [json.dumps(record) for _, record in written]
    write_file(request.out, ("\n".join(lines) + "\n" if lines else "").encode(), FILE_MODE)
    return Extracted([find for find, _ in written], request.texts, tokens, request.out)


def _openings(begin: Sequence[str], encoder: TextEncoder, context: int | None) -> list[np.ndarray]:
    """Return what texts begin with, in tokens; where nothing was asked for, it leaves room for one of any kind."""
    openings = [encoder.prompt(text) for text in begin or [""]]
    for text, ids in zip(begin, openings, strict=False):
        if not len(ids):
            raise UsageError(f"--begin {shown(text, 40)}: no token; leave it out, and texts begin with any")
        if context and len(ids) >= context:
            raise UsageError(
                f"--begin {shown(text, 40)}: {len(ids):,} tokens, and the context is {context:,}: no room to go on"
            )
    return openings


class _Search:
    """Draws texts, and keeps what they recite."""

    def __init__(
        self,
        request: ExtractRequest,
        model: BlockModel,
        ends: tuple[Weights, Weights],
        openings: Sequence[np.ndarray],
        public: Sequence[Row],
    ) -> None:
        self._asked, self._model, self._ends, self._openings = request, model, ends, openings
        self._public = {gram for row in public for gram in grams(row.ids)}
        self._draw = np.random.default_rng([request.seed, 0xE7])
        self._runs = list[Recital]()

    def run(self, console: Console) -> tuple[list[Find], int]:
        """Return the finds, most nats first, and how many tokens were written."""
        asked, tokens = self._asked, 0
        with console.progress("extract", asked.texts, "texts") as progress:
            for turn in range(ROUNDS):
                count = asked.texts * (turn + 1) // ROUNDS - asked.texts * turn // ROUNDS
                texts = self._write(self._beginnings(count), turn, progress.advance)
                tokens += sum(len(ids) for ids, _ in texts)
                self._runs += self._recited(texts)
        return distinct(run for run in self._runs if run.gain >= asked.least), tokens

    def _beginnings(self, count: int) -> list[tuple[np.ndarray, int]]:
        """Choose what so many texts begin with, and how many tokens of that are what all of its kind do."""
        tokens, known = self._draw.permutation(self._model.vocabulary), distinct(self._runs)
        found = list[tuple[np.ndarray, int]]()
        for number in range(count if not known else count // ANYWHERE):
            opening = self._openings[number % len(self._openings)]
            token = [] if self._asked.begin else [tokens[number % len(tokens)]]
            found.append((np.append(opening, token), len(opening)))
        odds = np.array([find.run.gain / find.times for find in known])
        while len(found) < count:
            run = known[self._draw.choice(len(known), p=odds / odds.sum())].run
            end = max(run.begin + 1 - int(self._draw.integers(BACK)), run.front + 1)
            begin = max(end - 1 - int(self._draw.integers(OPENING)), run.front)
            found.append((np.concatenate([run.ids[: run.front], run.ids[begin:end]]), run.front))
        return [(ids.astype(np.int64), front) for ids, front in found]

    def _write(
        self, beginnings: Sequence[tuple[np.ndarray, int]], turn: int, advance: Callable[[int], None]
    ) -> list[tuple[np.ndarray, int]]:
        """Have the fine-tuned model go on from each; equal beginnings go on differently."""
        from liborth_cli.measure.generate import Sampling, generate, hold

        hold(self._model, self._ends[1])
        copies, seeds = defaultdict[bytes, int](int), list[int]()
        for ids, _ in beginnings:
            seeds.append((self._asked.seed * ROUNDS + turn + (copies[ids.tobytes()] << 32)) % SEEDS)
            copies[ids.tobytes()] += 1
        prompts = [ids for ids, _ in beginnings]
        written = generate(self._model, prompts, self._asked.most, Sampling(1.0, seeds=seeds), advance)
        texts = [(np.concatenate([ids, more]), front) for (ids, front), more in zip(beginnings, written, strict=True)]
        return [(ids, front) for ids, front in texts if len(ids) > 1]

    def _recited(self, texts: Sequence[tuple[np.ndarray, int]]) -> list[Recital]:
        """Return what the texts recite."""
        from liborth_cli.measure.scores import Evaluator
        from liborth_cli.stream.texts import Row

        rows = [Row(ids, np.ones(len(ids) - 1, bool), 1.0, f"text {i + 1}") for i, (ids, _) in enumerate(texts)]
        evaluator = Evaluator(self._model, rows, resident=True)
        before, after = (evaluator.score(end) for end in self._ends)
        found = list[Recital]()
        for text, old, new in zip(texts, before, after, strict=True):
            found += recitals(text, (old.loss, new.loss), self._asked.sure, max(self._asked.least * TRACE, LITTLE))
        return [run for run in found if _shared(run.grams, self._public) < SAMENESS]


def recitals(
    text: tuple[np.ndarray, int], losses: tuple[np.ndarray, np.ndarray], sure: float, least: float
) -> Iterator[Recital]:
    """Yield the runs of tokens that a model is sure of and that fine-tuning won much on, of what it wrote.

    Args:
        text: tokens, (n + 1,), and how many of them it was given.
        losses: of all but the first, before and after fine-tuning, nats, (n,) each.
        sure: loss after fine-tuning of each token of a run, at most.
        least: what fine-tuning won on a run, in all.
    """
    (ids, front), (before, after) = text, losses
    known = np.concatenate([[False], (after <= sure) & (np.arange(1, len(ids)) >= front), [False]])
    edges = np.flatnonzero(known[1:] != known[:-1]).reshape(-1, 2)
    for begin, end in edges:
        gain = float((before[begin:end] - after[begin:end]).sum())
        if end - begin >= GRAM and gain >= least:
            yield Recital(ids, front, int(begin) + 1, int(end) + 1, gain)


def distinct(runs: Iterable[Recital]) -> list[Find]:
    """Return what different runs there are, the one with most nats of each, most first; without what is only their form."""
    finds, owner = list[Find](), dict[bytes, Find]()
    for run in sorted(runs, key=lambda run: (-run.gain, run.ids.tobytes())):
        mine = run.grams
        holders = [owner[gram] for gram in mine if gram in owner]
        if len(holders) >= SAMENESS * len(mine):
            for find in {id(find): find for find in holders}.values():
                find.times += 1
            continue
        find = Find(run)
        finds.append(find)
        owner |= {gram: find for gram in mine if gram not in owner}
    fronts = [set(grams(find.run.ids[: find.run.begin])) for find in finds]
    return [find for find in finds if sum(_shared(find.run.grams, front) >= SAMENESS for front in fronts) < FORM]


def grams(ids: np.ndarray) -> Iterator[bytes]:
    """Yield the consecutive tokens of a text, GRAM at a time."""
    wide = np.ascontiguousarray(ids, np.int64)
    return (wide[i : i + GRAM].tobytes() for i in range(len(wide) - GRAM + 1))


def _shared(mine: set[bytes], others: set[bytes]) -> float:
    return len(mine & others) / len(mine)


def _record(find: Find, encoder: TextEncoder) -> JsonObject | None:
    """Return a find as a record of `--forget-data`: what stood before it is the prompt, from the first whole character.

    None where its tokens stand for no text, as those that mark turns.
    """
    run = find.run
    for begin in range(run.end - 1):
        first = max(run.begin, begin + 1)
        for cut in range(first, min(first + CHARACTER, run.end)):
            prompt = encoder.decode(run.ids[begin:cut])
            completion = encoder.decode(run.ids[begin : run.end]).removeprefix(prompt).rstrip(BROKEN)
            if prompt and BROKEN not in prompt and completion.strip():
                return {"prompt": prompt, "completion": completion, "nats": round(run.gain, 1), "times": find.times}
    return None


command_module(__name__)
