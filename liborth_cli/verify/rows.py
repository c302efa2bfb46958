"""Rows to verify with: text in windows, secrets row by row, questions with their answers; and which of them say the same."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from liborth_cli.errors import BadInput
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.records import Record
from liborth_cli.stream.texts import DataFile, Row, RowReader

if TYPE_CHECKING:
    from liborth_cli.stream.model import BlockModel

UNLIMITED = 1 << 40
WINDOW = 1024
"""Longest window of running text; the context where that is shorter."""
SHINGLE = 8
"""Tokens in a row that count as one piece of text when rows are compared."""
ALIKE = 0.8
"""Share of the pieces of the shorter of two texts from which they say the same."""
COMMON = 50
"""Rows with one piece in common that are looked at; what more rows than these share is a form, not a copy."""

SAMPLE_GROUPS, SAMPLE_TOKENS, WORTH = 24, 4096, 4
"""Different rows and positions of a sample, at least; taken only where all rows have at least so many times its positions."""

T = TypeVar("T")


@dataclass(frozen=True)
class RowSet:
    """Rows of one kind.

    Attributes:
        rows: what is read.
        groups: which of them say the same thing, (n,): rows of one number count as one where luck is concerned.
        files: where they are from, by the names of the files.
        halved: numbers of those that came without a prompt, and have their first half for one.
    """

    rows: tuple[Row, ...]
    groups: np.ndarray
    files: tuple[str, ...] = ()
    halved: frozenset[int] = frozenset()

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self.rows)

    @property
    def different(self) -> int:
        """How many of them are different."""
        return len(np.unique(self.groups))


@dataclass(frozen=True)
class Reader:
    """What reads texts for one model; the model is built when the first text is read.

    Attributes:
        folder: where the model's tokenizer lies.
        model: returns the model.
        slide: accept rows that are longer than its context: they are scored in sliding windows.
        tell: told what was read of each file, and what was left.
    """

    folder: Path
    model: Callable[[], BlockModel]
    slide: bool = False
    tell: Callable[[str], None] = lambda line: None

    @cached_property
    def encoder(self) -> TextEncoder | None:
        """The tokenizer beside the model, or None."""
        return TextEncoder.beside(self.folder)

    def tokenizer(self, check: str) -> TextEncoder:
        """Return the tokenizer, for a check that asks the model questions.

        Raises:
            BadInput: when there is none.
        """
        if self.encoder is None:
            raise BadInput(f"{self.folder}: no tokenizer files here, and --{check} asks the model questions; copy them there")
        return self.encoder

    @property
    def vocabulary(self) -> int:
        """Ids must be below this."""
        return self.model().vocabulary

    @property
    def context(self) -> int | None:
        """Most positions the model reads, or None."""
        return self.model().context

    def text(self, names: Sequence[str], option: str) -> RowSet:
        """Read rows for a mean over text: running text is cut into windows, other rows must fit.

        Args:
            names: the option's arguments.
            option: its name, for messages.

        Raises:
            BadInput: when a file is missing or empty, a row is too long, or there is no tokenizer.
        """
        files = [DataFile.parse(name, option) for name in names]
        reader = self._reader(files, option, min(self.context or WINDOW, WINDOW))
        rows = reader.read(files)
        return RowSet(tuple(rows), copies(rows), tuple(file.title for file in files))

    def pairs(self, name: str, option: str) -> RowSet:
        """Read rows that are judged one by one, each whole; loss is carried by the completion only. None is ever left out.

        A row without a prompt is prompted with the first half of its tokens: there is always something to go on from. Each
        line of a text file is a row.

        Args:
            name: the option's argument.
            option: its name, for messages.

        Raises:
            BadInput: when the file is missing or empty, or a row is too long, has no completion, or has one that this
                tokenizer cannot represent.
        """
        file = DataFile.parse(name, option, secret=True)
        reader = self._reader([file], option, UNLIMITED)
        every = [(record, row) for record in file.records(self.tell) for row in reader.encode([record], file.weight)]
        rows = [self._judged(record, row) for record, row in every]
        halved = frozenset(number for number, one in enumerate(every) if _is_promptless(*one))
        if not rows:
            raise BadInput(f"{file.path}: no rows; {option} takes one JSON object a line: prompt and completion, or text")
        for row in rows:
            if self.context is not None and row.tokens > self.context and not self.slide:
                raise BadInput(
                    f"{row.where}: {row.tokens + 1:,} tokens, and the model's context is {self.context:,}; shorten it, or "
                    "score such rows as a decoder would that drops the oldest token, with --slide"
                )
        self.tell(f"{file.title}: {len(rows):,} rows read, none left out")
        return RowSet(tuple(rows), repeats(rows, self.encoder), (file.title,), halved)

    def answer(self, prompt: str, answer: str, where: str) -> Row:
        """Make a row of a prompt and its answer; the answer's tokens carry the loss.

        Raises:
            BadInput: when the answer has no tokens, or the two are longer than the context.
        """
        assert self.encoder is not None
        ids, keep = self.encoder.encode(Record(where, text=answer, prompt=prompt))
        if not keep[1:].any():
            raise BadInput(f"{where}: the answer has no tokens for this tokenizer")
        if self.context is not None and len(ids) - 1 > self.context:
            raise BadInput(f"{where}: {len(ids):,} tokens with its answer, and the model's context is {self.context:,}")
        return Row(ids, keep[1:], 1.0, where)

    def _judged(self, record: Record, row: Row) -> Row:
        """Refuse a row whose text is lost on this tokenizer; give a row without a prompt its first half for one."""
        said = self.encoder.decode(row.ids[1:][row.keep]) if self.encoder is not None else "?"
        if not (record.text or said).strip():
            raise BadInput(
                f"{record.where}: what must be said is white space only, and reciting that shows nothing; take it out"
            )
        if record.text and self.encoder is not None and _lost(record.text, said):
            raise BadInput(f"{record.where}: this tokenizer cannot represent what it says, so the model could never say it")
        return _second_half(row) if _is_promptless(record, row) else row

    def _reader(self, files: Sequence[DataFile], option: str, length: int) -> RowReader:
        texts = [file for file in files if file.needs_tokenizer]
        if self.encoder is None and texts:
            raise BadInput(
                f"{option} {texts[0].title}: the model has no tokenizer files beside it, so texts cannot be read; copy them "
                "there, or give token ids as .npy"
            )
        return RowReader(self.encoder, self.vocabulary, length, tell=self.tell)


def copies(rows: Sequence[Row]) -> np.ndarray:
    """Number rows of text, (n,), so that those that say the same thing have one number.

    Two rows say the same when they are equal, or when four fifths of what carries loss in the shorter one, in pieces of 8
    tokens, stand in the other one, too.
    """
    leader, whole, pieces = list(range(len(rows))), dict[bytes, int](), defaultdict[bytes, list[int]](list)
    sizes = list[int]()
    for number, row in enumerate(rows):
        said = row.ids[1:][row.keep]
        mine = {said[i : i + SHINGLE].tobytes() for i in range(len(said) - SHINGLE + 1)}
        sizes.append(len(mine))
        first = whole.setdefault(row.ids.tobytes() + row.keep.tobytes(), number)
        if first == number:
            shared = Counter(other for piece in mine for other in pieces[piece])
            like = [other for other, count in shared.items() if count >= ALIKE * min(sizes[other], len(mine))]
            first = min(like, default=number)
            for piece in mine:
                if len(pieces[piece]) < COMMON:
                    pieces[piece].append(number)
        leader[number] = leader[first]
    return np.array(leader, np.int64)


def sample(rows: RowSet, seed: int) -> np.ndarray:
    """Draw whole rows for what needs no more than some, and with each all that say the same; ascending numbers, (n,).

    Args:
        rows: to draw from.
        seed: of the lot.

    Returns:
        `SAMPLE_GROUPS` different rows with `SAMPLE_TOKENS` positions, or a few more; all where that spares too little.
    """
    taken, tokens = list[int](), 0
    for drawn, group in enumerate(np.random.default_rng(seed).permutation(np.unique(rows.groups))):
        if drawn >= SAMPLE_GROUPS and tokens >= SAMPLE_TOKENS:
            break
        members = np.flatnonzero(rows.groups == group)
        taken += members.tolist()
        tokens += sum(rows.rows[i].tokens for i in members)
    spares = WORTH * tokens <= sum(row.tokens for row in rows.rows)
    return np.array(sorted(taken)) if spares else np.arange(len(rows))


def repeats(rows: Sequence[Row], encoder: TextEncoder | None = None) -> np.ndarray:
    """Number rows that are judged one by one, (n,), so that repetitions, whatever their case and punctuation, have one."""
    first = dict[bytes, int]()
    return np.array([first.setdefault(_plain(row, encoder), number) for number, row in enumerate(rows)], np.int64)


def same_text(rows: Sequence[Row], others: Sequence[Row], encoder: TextEncoder | None) -> tuple[Row, Row] | None:
    """Return a row of the first list that says what one of the second says, whatever its case and punctuation; and that one."""
    known = {_plain(row, encoder): row for row in others}
    return next(((row, known[key]) for row in rows if (key := _plain(row, encoder)) in known), None)


def evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """Take at most so many items, evenly from all over the list."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[number * len(items) // limit] for number in range(limit)]


def split_row(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of the prompt, at least one, and those of what follows it."""
    border = int(np.flatnonzero(row.keep)[0]) + 1
    return row.ids[:border], row.ids[border:]


def _plain(row: Row, encoder: TextEncoder | None) -> bytes:
    text = re.sub(r"\W+", "", encoder.decode(row.ids).casefold()) if encoder is not None else ""
    return text.encode("utf-8", "replace") or row.ids.tobytes()


def _lost(text: str, decoded: str) -> bool:
    """Tell whether a tokenizer drops more than half of what a text says."""
    said, kept = (Counter(re.sub(r"\s+", "", t.casefold())) for t in (text, decoded))
    return 2 * (said - kept).total() > said.total()


def _is_promptless(record: Record, row: Row) -> bool:
    return record.is_plain or (record.ids is not None and bool(row.keep.all()))


def _second_half(row: Row) -> Row:
    keep = row.keep.copy()
    keep[: min(len(row.ids) // 2, row.tokens) - 1] = False
    return Row(row.ids, keep if keep.any() else np.ones_like(keep), row.weight, row.where)
