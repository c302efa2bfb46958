"""Rows of token ids with loss masks, from text files, JSON lines, tables, token arrays or a hub dataset."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from liborth_cli.errors import BadInput, PairMismatch, UsageError
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.records import Record, read_records

HUB = "hub:"


@dataclass(frozen=True)
class Row:
    """One sequence.

    Attributes:
        ids: tokens, (n + 1,), int64: the model reads all but the last and predicts all but the first.
        keep: which of the n predictions carry loss, (n,), bool; the last one always does.
        weight: how often every token counts.
        where: file and record, for messages.
    """

    ids: np.ndarray
    keep: np.ndarray
    weight: float
    where: str

    @property
    def tokens(self) -> int:
        """Positions the model reads: n."""
        return len(self.keep)


@dataclass(frozen=True)
class DataFile:
    """One `--data` argument.

    Attributes:
        path: the file, or the name of a hub dataset.
        weight: how often its tokens count.
        hub: whether `path` names a dataset on the hub.
    """

    path: Path
    weight: float = 1.0
    hub: bool = False

    @classmethod
    def parse(cls, text: str, option: str = "--data") -> DataFile:
        """Read `FILE`, `FILE=WEIGHT` or `hub:org/name[:split]`.

        Args:
            text: what the user wrote.
            option: after which option, for messages.

        Raises:
            BadInput: when the file is not there.
            UsageError: when the weight is not a positive number.
        """
        weight = 1.0
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
            return cls(Path(text.removeprefix(HUB)), weight, True)
        path = Path(text).expanduser()
        if not path.is_file():
            what = "a directory" if path.is_dir() else "no such file"
            raise BadInput(f"{path}: {what}; {option} takes a text, JSON lines, table or token file, or hub:org/name")
        return cls(path, weight)

    @property
    def title(self) -> str:
        """A name fit for publishing: never a local directory."""
        if not self.hub:
            return self.path.name
        folder, colon, split = str(self.path).partition(":")
        return f"{HUB}{Path(folder).name if Path(folder).exists() else folder}{colon}{split}"

    def sha256(self) -> str | None:
        """Hash the file; None for a hub dataset."""
        if self.hub:
            return None
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def read_rows(
    files: Sequence[DataFile],
    encoder: TextEncoder | None,
    vocabulary: int,
    length: int,
    truncate: bool = False,
    tokens: int | None = None,
) -> list[Row]:
    """Read all rows, in the order of the files.

    A text without a prompt is cut into windows of `length` tokens that overlap by one, so every token but the first is
    predicted once. Rows with a prompt and token rows are never cut in silence.

    Args:
        files: where from.
        encoder: the model's tokenizer; None when only token files are read.
        vocabulary: ids must be below this.
        length: most positions a row may have.
        truncate: cut rows that are longer, at their end, in place of refusing them.
        tokens: stop when so many positions are read; the last row is shortened to fit.

    Returns:
        The rows; at least one.

    Raises:
        BadInput: when nothing is left to learn from, or a row is too long.
        PairMismatch: when an id is outside the vocabulary.
    """
    rows: list[Row] = []
    left = tokens if tokens is not None else 1 << 62
    for file in files:
        for row in _file_rows(file, encoder, length, truncate):
            if left <= 0:
                return rows
            _check_ids(row, vocabulary, encoder)
            short = _trim(row, left)
            if short is not None:
                rows.append(short)
                left -= short.tokens
    if not rows:
        names = ", ".join(file.title for file in files)
        raise BadInput(f"{names}: nothing to learn from; every row has fewer than two tokens, or no token that carries loss")
    return rows


def data_hash(rows: Iterable[Row]) -> str:
    """Hash the rows, whatever their order: the sha256 of the sorted sha256 of each."""
    each = sorted(
        hashlib.sha256(row.ids.tobytes() + b"|" + np.packbits(row.keep).tobytes() + f"|{row.weight!r}".encode()).hexdigest()
        for row in rows
    )
    return hashlib.sha256("".join(each).encode()).hexdigest()


def _file_rows(file: DataFile, encoder: TextEncoder | None, length: int, truncate: bool) -> Iterator[Row]:
    suffix = file.path.suffix.lower()
    if not file.hub and suffix in (".npy", ".safetensors"):
        pairs: Iterable[tuple[Record | np.ndarray, str]] = _token_rows(file.path)
    else:
        pairs = ((record, record.where) for record in read_records(file.path, file.hub))
    for item, where in pairs:
        if isinstance(item, np.ndarray):
            ids, keep = _unpad(item)
        else:
            if encoder is None:
                raise BadInput(f"{file.path}: the model has no tokenizer files beside it; give token ids as .npy instead")
            ids, keep = encoder.encode(item)
            if item.is_plain:
                yield from _windows(ids, length, file.weight, where)
                continue
        if len(ids) - 1 > length:
            if not truncate:
                raise BadInput(
                    f"{where}: {len(ids):,} tokens, and the model takes {length + 1:,} here (context or --seq-len); shorten "
                    "it, or cut such rows with --truncate"
                )
            ids, keep = ids[: length + 1], keep[: length + 1]
        yield Row(ids, keep[1:], file.weight, where)


def _windows(ids: np.ndarray, length: int, weight: float, where: str) -> Iterator[Row]:
    for start in range(0, max(len(ids) - 1, 0), length):
        window = ids[start : start + length + 1]
        if len(window) > 1:
            yield Row(window, np.ones(len(window) - 1, bool), weight, where)


def _trim(row: Row, left: int) -> Row | None:
    """Drop what cannot reach a loss: the positions after the last one that carries it, and what `--tokens` cuts off."""
    kept = np.flatnonzero(row.keep[:left])
    if not len(kept):
        return None
    count = int(kept[-1]) + 1
    return row if count == row.tokens else Row(row.ids[: count + 1], row.keep[:count], row.weight, row.where)


def _check_ids(row: Row, vocabulary: int, encoder: TextEncoder | None) -> None:
    low, high = (int(row.ids.min()), int(row.ids.max())) if len(row.ids) else (0, 0)
    if low < 0 or high >= vocabulary:
        whose = "the tokenizer does not belong to this model" if encoder is not None else "these tokens are another model's"
        raise PairMismatch(f"{row.where}: token id {high if low >= 0 else low}, and the model knows {vocabulary:,}; {whose}")


def _unpad(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take padding (negative ids) off the end of a token row."""
    real = np.flatnonzero(ids >= 0)
    ids = ids[: int(real[-1]) + 1 if len(real) else 0].astype(np.int64)
    return ids, np.ones(len(ids), bool)


def _token_rows(path: Path) -> Iterator[tuple[np.ndarray, str]]:
    array = _token_array(path)
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise BadInput(
            f"{path}: token ids must be integers, (rows, tokens) or (tokens,), not {array.dtype} {list(array.shape)}"
        )
    for number, row in enumerate(np.atleast_2d(array)):
        yield row.astype(np.int64), f"{path}: row {number + 1}"


def _token_array(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".npy":
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError):
            raise BadInput(f"{path}: not a .npy file of numbers (object arrays are never loaded)") from None
    from liborth_cli.checkpoint.reader import Checkpoint

    with Checkpoint.open(path) as file:
        names = [name for name in ("input_ids", "tokens", "ids") if name in file.tensors] or list(islice(file.tensors, 2))
        if len(names) != 1:
            raise BadInput(f"{path}: which tensor holds the token ids? name it input_ids")
        info = file.tensors[names[0]]
        return file.load(info.name).numpy()


def describe(files: Sequence[DataFile], rows: Sequence[Row]) -> dict[str, Any]:
    """Say what was read, for the manifest."""
    return {
        "files": [{"title": file.title, "weight": file.weight, "sha256": file.sha256()} for file in files],
        "rows": len(rows),
        "tokens": sum(row.tokens for row in rows),
        "loss_tokens": int(sum(row.keep.sum() for row in rows)),
        "sha256": data_hash(rows),
    }
