"""Rows of token ids with loss masks, from text files, JSON lines, tables, token arrays or a hub dataset."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from liborth_cli.errors import BadInput, PairMismatch, UsageError
from liborth_cli.manifest import Data, DataPart
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.fields import AS_NAMED, FieldMap
from liborth_cli.stream.files import TOKEN_FILES, read_records
from liborth_cli.stream.records import Record

HUB = "hub:"


@dataclass(frozen=True)
class Row:
    """One sequence.

    Attributes:
        ids: tokens, (n + 1,), int64: the model reads all but the last and predicts all but the first.
        keep: which of the n predictions carry loss, (n,), bool; the last one always does.
        weight: how often every token counts.
        where: file and record, for messages.
        file: number of the file among those that were read together.
        ended: the last token was put there to end it, and is none of its text.
    """

    ids: np.ndarray
    keep: np.ndarray
    weight: float
    where: str
    file: int = 0
    ended: bool = False

    @property
    def tokens(self) -> int:
        """Positions the model reads: n."""
        return len(self.keep)

    def ending(self, token: int) -> Row:
        """Return it with a token behind it that ends it, and carries loss."""
        return replace(self, ids=np.append(self.ids, token), keep=np.append(self.keep, True), ended=True)


@dataclass(frozen=True)
class DataFile:
    """One `--data` argument.

    Attributes:
        path: the file, or the name of a hub dataset.
        weight: how often its tokens count.
        hub: whether `path` names a dataset on the hub.
        secret: its rows are judged or forgotten one by one: a line of a text is a row of its own, and a row that carries no
            loss is refused, not left out.
        names: what its fields are called, where a record's own are not there.
    """

    path: Path
    weight: float = 1.0
    hub: bool = False
    secret: bool = False
    names: FieldMap = AS_NAMED

    @classmethod
    def parse(cls, text: str, option: str = "--data", secret: bool = False) -> DataFile:
        """Read `FILE`, `FILE=WEIGHT` or `hub:org/name[@revision][[:config]:split]`, and `@FIELD=NAME,…` behind any of them.

        Args:
            text: what the user wrote.
            option: after which option, for messages.
            secret: as the attribute.

        Raises:
            BadInput: when the file is not there.
            UsageError: when the weight is not a positive number, or a field is none.
        """
        weight, (text, names) = 1.0, FieldMap.behind(text)
        found = re.fullmatch(r"(.+)=([0-9.eE+-]+)", text)
        if found and not Path(text).exists():
            text = found[1]
            try:
                weight = float(found[2])
            except ValueError:
                weight = 0.0
            if not 0.0 < weight < float("inf"):
                raise UsageError(f"{option} {text}={found[2]}: the weight must be a positive number")
        if text.startswith(HUB):
            return cls(Path(text.removeprefix(HUB)), weight, True, secret, names)
        path = Path(text).expanduser()
        if not path.is_file():
            what = "a directory" if path.is_dir() else "no such file"
            front = str(path).partition("@")[0]
            if front != str(path) and Path(front).is_file():
                raise BadInput(f"{path}: no such file; behind the @ of one that is there, write FIELD=NAME, as prompt=question")
            raise BadInput(f"{path}: {what}; {option} takes a text, JSON lines, table or token file, or hub:org/name")
        return cls(path, weight, False, secret, names)

    @property
    def title(self) -> str:
        """A name fit for publishing: never a local directory."""
        if not self.hub:
            return self.path.name
        folder, colon, split = str(self.path).partition(":")
        return f"{HUB}{Path(folder).name if Path(folder).exists() else folder}{colon}{split}"

    @property
    def needs_tokenizer(self) -> bool:
        """False for files of token ids."""
        return self.hub or self.path.suffix.lower() not in TOKEN_FILES

    def records(self, tell: Callable[[str], None] = lambda line: None) -> Iterator[Record]:
        """Read its records; see `read_records`."""
        return read_records(self.path, self.hub, self.secret, tell, self.names)

    def sha256(self) -> str | None:
        """Hash the file; None for a hub dataset, and for a secret: who can count finds a short one from its hash."""
        if self.hub or self.secret:
            return None
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class Tally:
    """What became of the records of a file: how many there were, and what was left of them and why."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.records = self.rows = self.tokens = 0
        self.left: Counter[str] = Counter()
        self._seen: set[bytes] = set()

    def take(self, row: Row) -> None:
        """Count a row."""
        self.rows += 1
        self.tokens += row.tokens
        digest = hashlib.sha256(row.ids.tobytes() + row.keep.tobytes()).digest()
        self.left["rows are copies of others, and count as often as they stand"] += digest in self._seen
        self._seen.add(digest)

    def say(self, title: str) -> str:
        """Put it in one line."""
        text = f"{title}: {self.records:,} records read, {self.rows:,} rows of {self.tokens:,} tokens"
        return "; ".join([text, *(f"{count:,} {what}" for what, count in self.left.items() if count)])


@dataclass(frozen=True)
class RowReader:
    """Reads rows for one model.

    Attributes:
        encoder: the model's tokenizer; None when only token files are read.
        vocabulary: ids must be below this.
        length: most positions a row may have.
        truncate: cut rows that are longer, at their end, in place of refusing them.
        tell: told, for each file, how much was read, what was left out or cut, and why.
        too_long: what to do about a row that is refused for its length, for the end of the line that refuses it.
        ended: a completion ends with the token that ends a text, where the tokenizer has one: who learns it learns to stop.
    """

    encoder: TextEncoder | None
    vocabulary: int
    length: int
    truncate: bool = False
    tell: Callable[[str], None] = lambda line: None
    too_long: str = " (context or --seq-len); shorten it, or cut such rows with --truncate"
    ended: bool = False

    def read(self, files: Sequence[DataFile], tokens: int | None = None) -> list[Row]:
        """Read all rows, in the order of the files.

        A text without a prompt is cut into windows of `length` tokens that overlap by one, so every token but the first is
        predicted once. Other rows, and those of secret files, are whole.

        Args:
            files: where from.
            tokens: stop when so many positions are read; the last row is shortened to fit.

        Returns:
            The rows; at least one.

        Raises:
            BadInput: when nothing is left to learn from, a row is too long, or a secret row carries no loss.
            PairMismatch: when an id is outside the vocabulary.
        """
        rows: list[Row] = []
        said: list[str] = []
        records = 0
        left = tokens if tokens is not None else 1 << 62
        for number, file in enumerate(files):
            tally = Tally()
            for row in self.encode(file.records(said.append), file.weight, file.secret, tally):
                short = _trim(row, left)
                if short is not None:
                    rows.append(replace(short, file=number))
                    tally.take(short)
                    left -= short.tokens
                if left <= 0:
                    tally.left["tokens are what --tokens allows: the rest is left"] = tokens or 0
                    break
            said.append(tally.say(file.title))
            records += tally.records
            if left <= 0:
                break
        if not rows:
            names = ", ".join(file.title for file in files)
            why = "every row has fewer than two tokens, or no token that carries loss" if records else "no rows in it"
            raise BadInput(f"{names}: nothing to learn from; {why}")
        for line in said:
            self.tell(line)
        return rows

    def encode(
        self, records: Iterable[Record], weight: float = 1.0, secret: bool = True, tally: Tally | None = None
    ) -> Iterator[Row]:
        """Turn records into rows.

        Args:
            records: from a file, or made in memory.
            weight: how often each counts, beside its own weight.
            secret: as `DataFile.secret`.
            tally: counts the records, and what is left out of them.

        Raises:
            BadInput, PairMismatch: as `read`.
        """
        tally = tally or Tally()
        for record in records:
            tally.records += 1
            ids, keep = self._tokens(record, secret, tally)
            if record.is_plain and not secret:
                windows = [ids[start : start + self.length + 1] for start in range(0, max(len(ids) - 1, 0), self.length)]
                tally.left["with fewer than two tokens left out"] += not windows
                yield from (Row(w, np.ones(len(w) - 1, bool), weight * record.weight, record.where) for w in windows)
                continue
            if len(ids) - 1 > self.length:
                if not self.truncate:
                    raise BadInput(
                        f"{record.where}: {len(ids):,} tokens, and the model takes {self.length + 1:,} here{self.too_long}"
                    )
                tally.left["cut at their end, as --truncate says"] += 1
                ids, keep = ids[: self.length + 1], keep[: self.length + 1]
            row = _trim(Row(ids, keep[1:], weight * record.weight, record.where), self.length)
            if row is not None and row.weight > 0.0:
                end = self._end_of(record, row)
                yield row if end is None else row.ending(end)
                continue
            why = (
                "of weight 0" if row else "without a token that carries loss" if len(ids) > 1 else "with fewer than two tokens"
            )
            if secret:
                raise BadInput(f"{record.where}: a row {why}, and no such row is left out in silence; mend it, or take it out")
            tally.left[f"{why} left out"] += 1

    def _end_of(self, record: Record, row: Row) -> int | None:
        """Return the token that ends a completion which has room for it, lacks it, and is read to be learnt; else None."""
        end = self.encoder.end if self.ended and self.encoder is not None and record.prompt else None
        return None if end is None or end >= self.vocabulary or row.tokens >= self.length or row.ids[-1] == end else end

    def _tokens(self, record: Record, secret: bool, tally: Tally) -> tuple[np.ndarray, np.ndarray]:
        if self.encoder is None:
            if record.ids is None or record.keep is None:
                raise BadInput(f"{record.where}: the model has no tokenizer files beside it; give token ids as .npy instead")
            ids, keep = record.ids, record.keep
        else:
            ids, keep = self.encoder.encode(record)
            for what in self.encoder.passed_over(record):
                if secret:
                    raise BadInput(f"{record.where}: the chat template does not show its {what}, so they would be left out")
                tally.left[f"conversations have {what} that the chat template does not show"] += 1
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        if low < 0 or high >= self.vocabulary:
            whose = "the tokenizer does not belong to this model" if self.encoder else "these tokens are another model's"
            raise PairMismatch(
                f"{record.where}: token id {high if low >= 0 else low}, and the model knows {self.vocabulary:,}; {whose}"
            )
        return ids, keep


def read_rows(
    files: Sequence[DataFile],
    encoder: TextEncoder | None,
    vocabulary: int,
    length: int,
    truncate: bool = False,
    tokens: int | None = None,
) -> list[Row]:
    """Read all rows without a word; see `RowReader`."""
    return RowReader(encoder, vocabulary, length, truncate).read(files, tokens)


def data_hash(rows: Iterable[Row]) -> str:
    """Hash the rows, whatever their order: the sha256 of the sorted sha256 of each."""
    each = sorted(
        hashlib.sha256(row.ids.tobytes() + b"|" + np.packbits(row.keep).tobytes() + f"|{row.weight!r}".encode()).hexdigest()
        for row in rows
    )
    return hashlib.sha256("".join(each).encode()).hexdigest()


def _trim(row: Row, left: int) -> Row | None:
    """Drop what cannot reach a loss: the positions after the last one that carries it, and what `--tokens` cuts off."""
    kept = np.flatnonzero(row.keep[:left])
    if not len(kept):
        return None
    count = int(kept[-1]) + 1
    return row if count == row.tokens else Row(row.ids[: count + 1], row.keep[:count], row.weight, row.where)


def summary(files: Sequence[DataFile], rows: Sequence[Row], secret: bool = False) -> Data:
    """Sum up what was read, for a manifest.

    Args:
        files: where from.
        rows: what came of it.
        secret: keep no hash of anything, even of files that are not marked as secret.
    """
    secret = secret or any(file.secret for file in files)
    return Data(
        files=[DataPart(title=f.title, weight=f.weight, sha256=None if secret else f.sha256()) for f in files],
        rows=len(rows),
        tokens=sum(row.tokens for row in rows),
        loss_tokens=int(sum(row.keep.sum() for row in rows)),
        sha256=None if secret else data_hash(rows),
    )
