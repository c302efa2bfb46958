"""Records out of files, before any tokenizer: a text, a prompt with its completion, or a conversation."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liborth_cli.errors import BadInput, UsageError


@dataclass(frozen=True)
class Record:
    """One thing to learn from.

    Attributes:
        where: file and line, for messages.
        text: what is read; all of it carries loss unless there is a prompt.
        prompt: what stands before `text` and carries no loss.
        messages: a conversation in place of both.
    """

    where: str
    text: str = ""
    prompt: str = ""
    messages: tuple[dict[str, str], ...] = ()

    @property
    def is_plain(self) -> bool:
        """True for running text, which may be cut into windows."""
        return not self.prompt and not self.messages


def read_records(path: Path, hub: bool = False) -> Iterator[Record]:
    """Read the records of one file, or of a dataset on the hub.

    Raises:
        BadInput: when the file cannot be decoded or a record is none of the known kinds.
        UsageError: when a reader for it is not installed.
    """
    suffix = path.suffix.lower()
    if hub:
        yield from _hub(str(path))
    elif suffix in (".txt", ".text", ".md", ""):
        yield Record(str(path), text=_decode(path))
    elif suffix in (".jsonl", ".json", ".ndjson"):
        yield from _jsonl(path)
    elif suffix == ".csv":
        yield from _csv(path)
    elif suffix == ".parquet":
        yield from _parquet(path)
    else:
        raise BadInput(f"{path}: unknown kind {suffix!r}; --data takes .txt .jsonl .csv .parquet .npy .safetensors")


def to_record(fields: dict[str, Any], where: str) -> Record:
    """Recognise the kind of a record by its fields.

    Raises:
        BadInput: when it is none of the known kinds.
    """
    if isinstance(fields, dict):
        if isinstance(fields.get("messages"), (list, tuple)):
            messages = fields["messages"]
            if messages and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages):
                return Record(where, messages=tuple({"role": str(m["role"]), "content": m["content"]} for m in messages))
            raise BadInput(f"{where}: messages must be a list of objects with role and content")
        if _texts(fields, "prompt", "completion"):
            return Record(where, prompt=fields["prompt"], text=fields["completion"])
        if _texts(fields, "question", "answer"):
            return Record(where, prompt=f"Question: {fields['question']}\nAnswer: ", text=fields["answer"])
        if _texts(fields, "text"):
            return Record(where, text=fields["text"])
    known = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
    raise BadInput(f"{where}: has {known}; a record needs text, prompt and completion, question and answer, or messages")


def _texts(fields: dict[str, Any], *names: str) -> bool:
    return all(isinstance(fields.get(name), str) for name in names)


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start:,}); convert it first") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def _jsonl(path: Path) -> Iterator[Record]:
    text = _decode(path)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except (ValueError, RecursionError):
            raise BadInput(f"{path}: not JSON") from None
        for number, item in enumerate(items, 1):
            yield to_record(item, f"{path}: record {number}")
        return
    # Not splitlines(): a JSON string may hold U+2028, which splitlines would cut at.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                item = json.loads(line)
            except (ValueError, RecursionError):
                raise BadInput(f"{path}: line {number}: not JSON") from None
            yield to_record(item, f"{path}: line {number}")


def _csv(path: Path) -> Iterator[Record]:
    lines = _decode(path).splitlines(keepends=True)
    try:
        for number, item in enumerate(csv.DictReader(lines, strict=True), 2):
            yield to_record(item, f"{path}: row {number}")
    except csv.Error as error:
        raise BadInput(f"{path}: not a table: {error}") from None


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"{path}: reading parquet needs pyarrow: pip install 'liborth[parquet]'") from None
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for item in batch.to_pylist():
                number += 1
                yield to_record(item, f"{path}: row {number}")
    except (pyarrow.ArrowException, OSError):
        raise BadInput(f"{path}: not a parquet file, or damaged") from None


def _hub(name: str) -> Iterator[Record]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError(f"hub:{name}: reading datasets of the hub needs the datasets package: pip install datasets") from None
    repo, _, split = name.partition(":")
    datasets.disable_progress_bars()  # they would ignore --quiet
    try:
        items = datasets.load_dataset(repo, split=split or "train", trust_remote_code=False)
    except Exception as error:  # datasets raises its own kinds, the hub's and the file system's
        raise BadInput(f"hub:{name}: {_reason(error)}") from None
    for number, item in enumerate(items, 1):
        yield to_record(dict(item), f"hub:{name}: record {number}")


def _reason(error: BaseException) -> str:
    """Return the first line of what began it: datasets wraps that in "an error occurred while generating the dataset"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
