"""Files and datasets of texts, read as records: JSON lines, tables, token ids, plain text, and the hub's `datasets`.

What a file begins with counts for more than its suffix. A file is taken whole or refused in one line that quotes none of it.
"""

from __future__ import annotations

import csv
import inspect
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from liborth_cli.checkpoint.documents import NotJson, unique_keys
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput, LiborthError, UsageError, first_line, from_os
from liborth_cli.stream.fields import AS_NAMED, FieldMap
from liborth_cli.stream.records import BESIDE_IDS, KINDS, Record, to_record

TOKEN_FILES = (".npy", ".safetensors")
"""Suffixes of files of token ids, which need no tokenizer."""
MAX_TEXT_BYTES = 10**9
"""A file of texts is held in memory as a whole."""
_MAGIC = {b"PAR1": ".parquet", b"\x93NUMPY": ".npy", b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PK\x03\x04": ".zip"}
_PACKAGES = (".gz", ".zst", ".zip")
_BLANK = re.compile("[ \t\r\n\ufeff]*")
_JSON_BEGINS = re.compile(r'[ \t\r\n\ufeff]*(\{\s*"|\[\s*\{\s*")')


def read_records(
    path: Path,
    hub: bool = False,
    lines: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    names: FieldMap = AS_NAMED,
) -> Iterator[Record]:
    """Read the records of one file, or of a dataset on the hub.

    Args:
        path: the file; what it begins with counts for more than its suffix.
        hub: whether it is the name of a dataset.
        lines: of a plain text, make every line a record by itself; nothing may be left out.
        tell: told what the `datasets` library leaves of a dataset.
        names: what its fields are called.

    Raises:
        BadInput: when the file cannot be decoded, or a record is none of the known kinds or says something that would be
            passed over.
        UsageError: when a reader for it is not installed.
    """
    if hub:
        return (to_record(item, where, names) for where, item in _hub(str(path), lines, tell))
    begin = _read(path, 8)
    suffix = next((kind for magic, kind in _MAGIC.items() if begin.startswith(magic)), path.suffix.lower())
    if suffix in _PACKAGES:
        raise BadInput(f"{path}: compressed ({suffix[1:]}); unpack it first")
    if suffix in _READERS:
        headed = _READERS[suffix] is not _csv
        return (to_record(item, where, names, headed) for where, item in _READERS[suffix](path, names))
    text = _decode(path)
    if suffix in (".jsonl", ".json", ".ndjson") or _JSON_BEGINS.match(text):
        return (to_record(item, where, names) for where, item in _json_values(text, path))
    if names:
        raise BadInput(f"{path}: --map names fields, and a file of this kind has none")
    if suffix not in (".txt", ".text", ".md", ""):
        raise BadInput(f"{path}: unknown kind {suffix!r}; --data takes .txt .jsonl .csv .parquet .npy .safetensors")
    if not lines:
        return iter([Record(str(path), text)])
    # Not splitlines(): a line may hold U+2028, which splitlines would cut at.
    every = enumerate(text.replace("\r\n", "\n").split("\n"), 1)
    return (Record(f"{path}: line {number}", line) for number, line in every if line.strip())


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Read JSON lines: one value after the other, each on one line or over several, or one list of them.

    Yields:
        File and line, and the value.

    Raises:
        BadInput: when the file cannot be read, is not JSON, or an object has a field twice.
    """
    return _json_values(_decode(path), path)


def _read(path: Path, most: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(most)
    except OSError as error:
        raise from_os(error, path, "read", BadInput) from None


def _decode(path: Path) -> str:
    small = not path.is_file() or path.stat().st_size <= MAX_TEXT_BYTES
    raw = _read(path, MAX_TEXT_BYTES + 1) if small else b""
    if not small or len(raw) > MAX_TEXT_BYTES:
        raise BadInput(f"{path}: larger than {MAX_TEXT_BYTES // 10**9} GB; give a part of it")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start:,}); convert it first") from None


def _json_values(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    decoder, place, line = json.JSONDecoder(object_pairs_hook=unique_keys), 0, 1
    while True:
        # A byte order mark may stand before any line: files are joined with `cat`.
        start = _BLANK.match(text, place).end()  # type: ignore[union-attr]
        line += text.count("\n", place, start)
        if start == len(text):
            return
        where = f"{path}: line {line}"
        try:
            value, place = decoder.raw_decode(text, start)
        except NotJson:  # its own text would name the field, which may be private
            raise BadInput(f"{where}: an object has a field twice; which one counts?") from None
        except json.JSONDecodeError as error:
            at = f" (seen at line {error.lineno})" if error.lineno != line else ""
            raise BadInput(f"{where}: not JSON{at}") from None
        except (ValueError, RecursionError):
            raise BadInput(f"{where}: not JSON that can be read: nested too deep, or a number of too many digits") from None
        if isinstance(value, list) and not text[:start].strip("\ufeff \t\r\n") and _BLANK.fullmatch(text, place):
            for number, item in enumerate(value, 1):
                yield f"{path}: record {number}", item
            return
        yield where, value
        line += text.count("\n", start, place)


def _csv(path: Path, fields: FieldMap) -> Iterator[tuple[str, Any]]:
    text = _decode(path)
    names = {name for kind in KINDS for name in kind}.union(*(given for _, given in fields.sources))
    first = text.split("\n", 1)[0].strip()
    delimiter = next((d for d in ",;\t" if names & {cell.strip(' "') for cell in first.split(d)}), ",")
    csv.field_size_limit((1 << 31) - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        if len(set(header)) != len(header):
            raise BadInput(f"{path}: two columns have one name")
        for number, cells in enumerate((cells for cells in reader if cells), 2):
            if len(cells) != len(header):
                raise BadInput(
                    f"{path}: row {number}: {len(cells)} fields, and the header has {len(header)}; put a text that holds "
                    f"{'a tab' if delimiter == chr(9) else delimiter!r} in double quotes"
                )
            yield f"{path}: row {number}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise BadInput(f"{path}: not a table: {error}") from None


def _parquet(path: Path, _: FieldMap) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"{path}: reading parquet needs pyarrow: pip install 'liborth[parquet]'") from None
    with _damaged(f"{path}: not a parquet file, or damaged"):
        file = pyarrow.parquet.ParquetFile(path)
        batches, number = file.iter_batches(batch_size=1024), 0
        if len(set(file.schema_arrow.names)) != len(file.schema_arrow.names):
            raise BadInput(f"{path}: two columns have one name")
    while True:
        with _damaged(f"{path}: not a parquet file, or damaged"):
            batch = next(batches, None)
            items = batch.to_pylist() if batch is not None else None
        if items is None:
            return
        for item in items:
            number += 1
            yield f"{path}: row {number}", item


@contextmanager
def _damaged(message: str) -> Iterator[None]:
    """Say one thing of everything that a library raises on a damaged file."""
    try:
        yield
    except LiborthError:
        raise
    except Exception:
        raise BadInput(message) from None


def _tokens(path: Path, _: FieldMap) -> Iterator[tuple[str, Any]]:
    if _read(path, 6) == b"\x93NUMPY" or path.suffix.lower() == ".npy":
        with warnings.catch_warnings(), _damaged(f"{path}: not a .npy file of numbers (object arrays are never loaded)"):
            warnings.simplefilter("ignore")
            arrays = {"input_ids": np.load(path, mmap_mode="r", allow_pickle=False)}
    else:
        with Checkpoint.open(path) as file:
            names = [name for name in ("input_ids", "tokens", "ids") if name in file.tensors] or list(islice(file.tensors, 2))
            if len(names) != 1:
                raise BadInput(f"{path}: which tensor holds the token ids? name it input_ids")
            beside = [name for name in file.tensors if name != names[0]]
            strange = sorted(set(beside) - BESIDE_IDS)
            if strange:
                raise BadInput(f"{path}: tensor {strange[0]!r} beside the token ids is not understood; take it out")
            arrays = {"input_ids": _tensor(file, names[0]), **{name: _tensor(file, name) for name in beside}}
    ids = arrays["input_ids"]
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise BadInput(f"{path}: token ids must be integers, (rows, tokens) or (tokens,), not {ids.dtype} {list(ids.shape)}")
    tables = {name: np.atleast_2d(array) for name, array in arrays.items()}
    for name, table in tables.items():
        if table.shape != tables["input_ids"].shape:
            raise BadInput(f"{path}: {name} is {list(arrays[name].shape)}, and the token ids are {list(ids.shape)}")
    for number in range(len(tables["input_ids"])):
        yield f"{path}: row {number + 1}", {name: table[number] for name, table in tables.items()}


def _tensor(file: Checkpoint, name: str) -> np.ndarray:
    with _damaged(f"{file.path}: tensor {name!r} holds no integers"):
        return file.load(name).numpy()


def _hub(name: str, whole: bool, tell: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError(f"hub:{name}: reading datasets of the hub needs the datasets package: pip install datasets") from None
    repo, config, split = _dataset(name)
    datasets.disable_progress_bars()  # they would ignore --quiet
    try:
        # Before datasets 4 a dataset could bring code along, and a person was asked about it.
        asks = "trust_remote_code" in inspect.signature(datasets.load_dataset_builder).parameters
        told: dict[str, Any] = {"trust_remote_code": False} if asks else {}
        told |= {"name": config} if config else {}
        if "@" in repo and not Path(repo).exists():
            repo, _, told["revision"] = repo.partition("@")
        builder = datasets.load_dataset_builder(repo, **told)
        builder.download_and_prepare()
        items = builder.as_dataset(split=split or "train")
    except Exception as error:  # datasets raises its own kinds, the hub's and the file system's
        several = re.search(r"available configs: \[(.*?)\]", str(error))
        if several:
            names = ", ".join(re.findall("'(.*?)'", several[1])[:8])
            raise BadInput(f"hub:{name}: it has the configurations {names}; write hub:org/name:CONFIG:SPLIT") from None
        raise BadInput(f"hub:{name}: {_reason(error)}") from None
    splits = {other: info.num_examples for other, info in (builder.info.splits or {}).items()}
    read = {other: [str(file) for file in files] for other, files in (builder.config.data_files or {}).items()}
    title = f"hub:{Path(repo).name if Path(repo).exists() else repo}"
    others = [f"{other} ({count:,} rows)" for other, count in splits.items() if other != (split or "train")]
    if others:
        tell(f"{title}: split {split or 'train'} is read, and not {', '.join(others)}")
    for line in _left_by_datasets(Path(repo), split or "train", splits, read):
        if whole:
            raise BadInput(f"{title}: {line}, and no such row is left out in silence; give the files themselves")
        tell(f"{title}: {line}")
    for number, item in enumerate(items, 1):
        yield f"hub:{name}: record {number}", dict(item)


def _dataset(name: str) -> tuple[str, str, str]:
    """Take `org/name[@revision][[:config]:split]` apart: name, config and split; "" for what is not said."""
    repo, *parts = name.rsplit(":", 2) if name.count(":") > 1 else name.split(":")
    return repo, parts[0] if len(parts) == 2 else "", parts[-1] if parts else ""


def _left_by_datasets(folder: Path, split: str, splits: Mapping[str, int], read: Mapping[str, list[str]]) -> Iterator[str]:
    """Say what the `datasets` library left of a split without a word: files of other kinds, and rows.

    Args:
        folder: the dataset's name, or a directory, whose files can be looked at.
        split: what was asked for.
        splits: rows of every split it made.
        read: the files of every split.
    """
    if not folder.is_dir():
        return
    known = {Path(file).resolve() for files in read.values() for file in files}
    kinds = (*_READERS, ".jsonl", ".json", ".ndjson", ".txt")
    left = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in kinds and f.is_file() and f.resolve() not in known]
    if known and left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        yield f"datasets left out {left[0].relative_to(folder)}{more}"
    there = [_rows_in(Path(file)) for file in read.get(split, ())]
    if split in splits and there and None not in there and sum(filter(None, there)) != splits[split]:
        yield f"datasets read {splits[split]:,} rows of {sum(filter(None, there)):,} in the files"


def _rows_in(path: Path) -> int | None:
    """Count the rows of a file as it is written; None where only a library can tell."""
    try:
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            return sum(1 for _ in read_json_lines(path))
        if path.suffix.lower() == ".csv":
            csv.field_size_limit((1 << 31) - 1)
            return max(sum(1 for cells in csv.reader(io.StringIO(_decode(path), newline="")) if cells) - 1, 0)
    except (BadInput, csv.Error):
        return None
    return None


def _reason(error: BaseException) -> str:
    """Return the first line of what began it: datasets wraps that in "an error occurred while generating the dataset"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error, 1000)


_READERS = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet, **dict.fromkeys(TOKEN_FILES, _tokens)}
