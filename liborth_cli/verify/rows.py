"""Rows to verify with: public text in windows, and secrets row by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from liborth_cli.errors import BadInput
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.texts import DataFile, Row, read_rows

UNLIMITED = 1 << 40


def read_text(names: Sequence[str], option: str, encoder: TextEncoder | None, vocabulary: int, length: int) -> list[Row]:
    """Read rows for a mean over text: running text is cut into windows, other rows must fit.

    Args:
        names: the option's arguments.
        option: its name, for messages.
        encoder: the model's tokenizer, or None.
        vocabulary: ids must be below this.
        length: most positions a row may have.

    Raises:
        BadInput: when a file is missing or empty, a row is too long, or there is no tokenizer.
    """
    files = [DataFile.parse(name, option) for name in names]
    _check_encoder(files, option, encoder)
    return read_rows(files, encoder, vocabulary, length)


def read_pairs(
    name: str, option: str, encoder: TextEncoder | None, vocabulary: int, context: int | None, slide: bool
) -> list[Row]:
    """Read rows that are judged one by one, each whole; loss is carried by the completion only.

    A row without a prompt is prompted with the first half of its tokens: there is always something to go on from.

    Args:
        name: the option's argument.
        option: its name, for messages.
        encoder: the model's tokenizer, or None.
        vocabulary: ids must be below this.
        context: most positions the model reads, or None.
        slide: accept rows that are longer: they are scored in sliding windows.

    Raises:
        BadInput: when the file is missing or empty, a row is too long, or there is no tokenizer.
    """
    file = DataFile.parse(name, option, secret=True)
    _check_encoder([file], option, encoder)
    tokens_only = file.path.suffix.lower() in (".npy", ".safetensors") and not file.hub
    records = [] if tokens_only else list(file.records())
    if not tokens_only and not any(r.text.strip() or r.messages for r in records):
        raise BadInput(f"{file.path}: no rows; {option} takes one JSON object a line: prompt and completion, or text")
    plain = {record.where for record in records if record.is_plain}
    rows = [_second_half(row) if tokens_only or row.where in plain else row for row in _read(file, encoder, vocabulary, option)]
    for row in rows:
        if context is not None and row.tokens > context and not slide:
            raise BadInput(
                f"{row.where}: {row.tokens + 1:,} tokens, and the model's context is {context:,}; shorten it, or score such "
                "rows as a decoder would that drops the oldest token, with --slide"
            )
    return rows


def _read(file: DataFile, encoder: TextEncoder | None, vocabulary: int, option: str) -> list[Row]:
    try:
        return read_rows([file], encoder, vocabulary, UNLIMITED)
    except BadInput as error:
        if "nothing to learn from" in str(error):
            raise BadInput(f"{file.path}: {option}: every row has fewer than two tokens, or an empty completion") from None
        raise


def _second_half(row: Row) -> Row:
    keep = row.keep.copy()
    keep[: min(len(row.ids) // 2, row.tokens) - 1] = False
    return Row(row.ids, keep if keep.any() else np.ones_like(keep), row.weight, row.where)


def _check_encoder(files: Sequence[DataFile], option: str, encoder: TextEncoder | None) -> None:
    texts = [f for f in files if f.hub or f.path.suffix.lower() not in (".npy", ".safetensors")]
    if encoder is None and texts:
        raise BadInput(
            f"{option} {texts[0].title}: the model has no tokenizer files beside it, so texts cannot be read; copy them "
            "there, or give token ids as .npy"
        )
