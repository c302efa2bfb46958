"""Records out of files, before any tokenizer: a text, a prompt with its completion, a conversation, or token ids.

A record is taken whole or refused, by file, line and field. What a record says is never quoted: an error line ends up in
logs, and the record may be the secret.
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
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from liborth_cli.checkpoint.documents import NotJson, unique_keys
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import Json, JsonObject
from liborth_cli.errors import BadInput, LiborthError, UsageError, from_os

TOKEN_FILES = (".npy", ".safetensors")
"""Suffixes of files of token ids, which need no tokenizer."""
IGNORED = -100
"""The label of a position that carries no loss, as in Transformers."""
FOREIGN_ROLES = {"gpt": "assistant", "model": "assistant", "bot": "assistant", "chatbot": "assistant", "human": "user"}
"""Roles of other formats, and what a chat template calls them."""
MOST_DEPTH = 64

_KINDS = (("messages",), ("prompt", "completion"), ("question", "answer"), ("text",), ("input_ids",))
_NEEDED = "text, prompt and completion, question and answer, messages, or input_ids"
_NOT_READ = {
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "only text is read"),
    **dict.fromkeys(("chosen", "rejected"), "preference pairs are not learned from; keep one answer, as completion"),
    "weight": "how often a row counts is called loss_weight here",
    "functions": "give them as tools",
}
"""Fields that change what a record means. One that is there and not empty is refused, never passed over."""
_NOT_IN_CHATS = {"system": "make it the first message", "chat_template_kwargs": "put what it says into the chat template"}
_NAMEABLE = {
    *_NOT_READ, *_NOT_IN_CHATS, *(name for kind in _KINDS for name in kind), "conversations", "instruction", "input", "output",
    "response", "content", "role", "from", "value", "title", "id", "source", "labels", "tools", "loss_weight",
}  # fmt: skip
"""Field names that an error line may repeat; any other might be a line of data in a file without a header."""
_MEDIA = {"image", "image_url", "audio", "input_audio", "video", "file", "tool_call", "tool_use", "tool_result", "thinking"}
_LOSS_FLAGS = ("weight", "train", "loss", "loss_weight")
_PACKED = ("position_ids", "cu_seqlens", "cu_seq_lens_q", "seq_lengths", "sequence_ids")
_LOSS_MASKS = ("completion_mask", "assistant_masks", "loss_mask")
_MAGIC = {b"PAR1": ".parquet", b"\x93NUMPY": ".npy", b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PK\x03\x04": ".zip"}
_PACKAGES = (".gz", ".zst", ".zip")
_BLANK = re.compile("[ \t\r\n\ufeff]*")
_JSON_BEGINS = re.compile(r'[ \t\r\n\ufeff]*(\{\s*"|\[\s*\{\s*")')


@dataclass(frozen=True)
class Record:
    """One thing to learn from.

    Attributes:
        where: file and line, for messages.
        text: what is read; all of it carries loss unless there is a prompt.
        prompt: what stands before `text` and carries no loss.
        messages: a conversation in place of both, as a chat template takes it.
        tools: what the template is told of tools.
        silent: numbers of the assistant's messages that carry no loss.
        ids: token ids in place of all that, (n,).
        keep: which of them carry loss when predicted, (n,), bool.
        weight: how often it counts.
    """

    where: str
    text: str = ""
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[Any, ...] = ()
    silent: frozenset[int] = frozenset()
    ids: np.ndarray | None = None
    keep: np.ndarray | None = None
    weight: float = 1.0

    @property
    def is_plain(self) -> bool:
        """True for running text, which may be cut into windows."""
        return not self.prompt and not self.messages and self.ids is None

    def fields(self) -> JsonObject:
        """Return the fields that are read as this record."""
        found: dict[str, Json]
        if self.ids is not None:
            keep = np.ones(len(self.ids), bool) if self.keep is None else self.keep
            found = {"input_ids": self.ids.tolist(), "labels": np.where(keep, self.ids, IGNORED).tolist()}
        elif self.messages:
            said = [{**message, "weight": 0} if i in self.silent else message for i, message in enumerate(self.messages)]
            found = {"messages": said, **({"tools": list(self.tools)} if self.tools else {})}
        else:
            found = {"prompt": self.prompt, "completion": self.text} if self.prompt else {"text": self.text}
        return {**found, **({"loss_weight": self.weight} if self.weight != 1.0 else {})}


def read_records(
    path: Path, hub: bool = False, lines: bool = False, tell: Callable[[str], None] = lambda line: None
) -> Iterator[Record]:
    """Read the records of one file, or of a dataset on the hub.

    Args:
        path: the file; what it begins with counts for more than its suffix.
        hub: whether it is the name of a dataset.
        lines: of a plain text, make every line a record by itself; nothing may be left out.
        tell: told what the `datasets` library leaves of a dataset.

    Raises:
        BadInput: when the file cannot be decoded, or a record is none of the known kinds or says something that would be
            passed over.
        UsageError: when a reader for it is not installed.
    """
    if hub:
        return _hub(str(path), lines, tell)
    begin = _read(path, 8)
    suffix = next((kind for magic, kind in _MAGIC.items() if begin.startswith(magic)), path.suffix.lower())
    if suffix in _PACKAGES:
        raise BadInput(f"{path}: compressed ({suffix[1:]}); unpack it first")
    if suffix in _READERS:
        return _READERS[suffix](path)
    text = _decode(path)
    if suffix in (".jsonl", ".json", ".ndjson") or _JSON_BEGINS.match(text):
        return (to_record(item, where) for where, item in _json_values(text, path))
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


def to_record(fields: Any, where: str) -> Record:
    """Recognise the kind of a record by its fields.

    Args:
        fields: an object, or a row of a table.
        where: file and line.

    Raises:
        BadInput: when it is none of the known kinds, or something in it is not understood.
    """
    if not isinstance(fields, Mapping):
        raise BadInput(f"{where}: {_what(fields)}, not an object with fields; a record needs {_NEEDED}")
    kind = next((kind for kind in _KINDS if all(fields.get(name) is not None for name in kind)), None)
    if kind is None:
        near = next((kind for kind in _KINDS if any(name in fields for name in kind)), ())
        for name in near:
            if name in fields and fields[name] is None:
                raise BadInput(f"{where}: {name} is empty (null)")
            if name not in fields:
                raise BadInput(f"{where}: has {' and '.join(n for n in near if n in fields)}, and no {name}")
        raise BadInput(f"{where}: {_describe(fields)}; a record needs {_NEEDED}")
    for name, why in {**_NOT_READ, **(_NOT_IN_CHATS if kind[0] in ("messages", "prompt") else {})}.items():
        if fields.get(name) not in (None, "", [], {}, ()):
            raise BadInput(f"{where}: {name} is not understood: {why}")
    weight = _number(fields["loss_weight"], f"{where}: loss_weight") if fields.get("loss_weight") is not None else 1.0
    if kind[0] == "input_ids":
        return token_record(fields, where, weight)
    if kind[0] == "messages":
        return _conversation(_list(fields["messages"], where, "messages"), 0, fields.get("tools"), where, weight)
    if kind == ("prompt", "completion") and isinstance(fields["prompt"], (list, tuple)):
        prompt, answer = (_list(fields[name], where, name) for name in kind)
        return _conversation([*prompt, *answer], len(prompt), fields.get("tools"), where, weight)
    if fields.get("tools"):
        raise BadInput(f"{where}: tools are for conversations, and this is {' and '.join(kind)}")
    *before, text = (_text(fields[name], f"{where}: {name}") for name in kind)
    prompt = before[0] if before else ""
    if kind == ("question", "answer"):
        prompt = f"Question: {prompt}\nAnswer: "
    return Record(where, text, prompt, weight=weight)


def token_record(fields: Mapping[str, Any], where: str, weight: float = 1.0) -> Record:
    """Make a record of token ids and what tokenisers write beside them.

    Args:
        fields: input_ids (n,); if there, attention_mask (n,), 0 for padding at either end; labels (n,), the ids themselves
            or −100 for no loss; or a mask of what carries loss. Without a mask, negative ids at the end are padding.
        where: file and row.
        weight: how often it counts.

    Raises:
        BadInput: when the parts do not fit together, or several sequences are packed into one row.
    """
    ids = _integers(fields["input_ids"], f"{where}: input_ids")
    real = np.flatnonzero(ids >= 0)
    span = slice(0, int(real[-1]) + 1 if len(real) else 0)

    def beside(name: str) -> np.ndarray | None:
        value = fields.get(name)
        found = None if value is None else _integers(value, f"{where}: {name}")
        if found is not None and len(found) != len(ids):
            raise BadInput(f"{where}: {len(ids):,} input_ids and {len(found):,} of {name}")
        return found

    mask = beside("attention_mask")
    if mask is not None:
        real = np.flatnonzero(mask)
        span = slice(int(real[0]), int(real[-1]) + 1) if len(real) else slice(0, 0)
        if not bool((mask[span] == 1).all()):
            raise BadInput(f"{where}: attention_mask must be 1 for the tokens and 0 for padding before or after them")
    for name in _PACKED:
        if fields.get(name) is None:
            continue
        order = beside(name) if name == "position_ids" else None
        if order is None or not np.array_equal(order[span], np.arange(len(order[span]))):
            raise BadInput(f"{where}: {name}: several sequences in one row; give every sequence a row of its own")
    keep = np.ones(len(ids), bool)
    labels = beside("labels")
    if labels is not None:
        keep = labels != IGNORED
        if not np.array_equal(labels[keep], ids[keep]):
            raise BadInput(f"{where}: labels are neither the input_ids nor {IGNORED}; give them as they are, not shifted")
    for name in _LOSS_MASKS:
        loss = beside(name)
        keep = keep if loss is None else keep & (loss != 0)
    return Record(where, ids=ids[span], keep=keep[span], weight=weight)


# Conversations ------------------------------------------------------------------------------------------------------------


def _conversation(messages: list[Any], first: int, tools: Any, where: str, weight: float) -> Record:
    """Make a record of messages; what stands before message `first` carries no loss."""
    if not messages:
        raise BadInput(f"{where}: messages is empty")
    clean, silent = [], set(range(first))
    for number, message in enumerate(messages):
        clean.append(_message(message, f"{where}: message {number + 1}"))
        if not _learns(message, f"{where}: message {number + 1}"):
            silent.add(number)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BadInput(f"{where}: tools is a text that is not JSON") from None
    known = _list(tools, where, "tools") if tools else []
    if not all(isinstance(tool, Mapping) for tool in known):
        raise BadInput(f"{where}: tools must be a list of objects")
    _check_unicode(known, f"{where}: tools")
    return Record(where, messages=tuple(clean), tools=tuple(known), silent=frozenset(silent), weight=weight)


def _message(message: Any, where: str) -> dict[str, Any]:
    """Check a message, and hand on all of it that is for the template."""
    if not isinstance(message, Mapping):
        raise BadInput(f"{where}: {_what(message)}, not an object with role and content")
    if not isinstance(message.get("role"), str):
        more = "; ShareGPT's from and value are called role and content here" if "from" in message else ""
        raise BadInput(f"{where}: has no role{more}")
    role = message["role"]
    if role in FOREIGN_ROLES:
        raise BadInput(f"{where}: role {role!r} is another format's; write {FOREIGN_ROLES[role]!r}")
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = "".join(_part(part, where) for part in content)
    elif content is None and not message.get("tool_calls"):
        raise BadInput(f"{where}: content is empty (null), and there are no tool_calls")
    elif content is not None:
        _text(content, f"{where}: content")
    rest = {k: v for k, v in message.items() if k not in ("role", "content", *_LOSS_FLAGS) and v is not None}
    _check_unicode(rest, where)
    return {"role": role, "content": content, **rest}


def _part(part: Any, where: str) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(part, Mapping):
        raise BadInput(
            f"{where}: content has a part that is {f'of type {kind}' if kind in _MEDIA else 'no text'}; only text is read"
        )
    return _text(part.get("text", part.get("value")), f"{where}: a part of content")


def _learns(message: Mapping[str, Any], where: str) -> bool:
    """Tell whether a message may carry loss, by the flags of OpenAI, Mistral, axolotl and LLaMA-Factory."""
    for name in _LOSS_FLAGS:
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadInput(f"{where}: {name} must be 0 or 1 (or false or true); a message carries its loss or none")
        if not value:
            return False
        if message["role"] != "assistant":
            raise BadInput(f"{where}: {name} asks for loss on what is not the assistant's; only the assistant is learned from")
    return True


# Values -------------------------------------------------------------------------------------------------------------------


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{where} is {_what(value)}, not a text")
    _check_unicode(value, where)
    return value


def _check_unicode(value: Any, where: str, depth: int = 0) -> None:
    """Refuse half a surrogate pair anywhere in a value: no tokenizer takes it."""
    if depth > MOST_DEPTH:
        raise BadInput(f"{where} is nested more than {MOST_DEPTH} deep")
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise BadInput(f"{where} holds half of a surrogate pair: a text was cut inside a character (or \\ud… is a typo)")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _check_unicode(key, where, depth + 1)
            _check_unicode(each, where, depth + 1)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _check_unicode(each, where, depth + 1)


def _list(value: Any, where: str, name: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise BadInput(f"{where}: {name} is {_what(value)}, not a list")
    return list(value)


def _number(value: Any, where: str) -> float:
    try:
        found = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = float("nan")
    if not 0.0 <= found < float("inf"):
        raise BadInput(f"{where} must be a number, 0 or more")
    return found


def _integers(value: Any, where: str) -> np.ndarray:
    """Return int64 numbers, (n,); a copy that the caller may keep."""
    try:
        found = np.asarray(value)
    except (ValueError, OverflowError):
        found = np.empty(0, object)
    if found.shape == (0,) and found.dtype != object:
        return np.empty(0, np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu" or (found.dtype == np.uint64 and int(found.max()) >> 63):
        raise BadInput(f"{where} must be a list of whole numbers")
    return found.astype(np.int64)


def _what(value: Any) -> str:
    kinds = {str: "a text", list: "a list", tuple: "a list", dict: "an object", bytes: "bytes", bool: "true or false"}
    return (
        "empty (null)"
        if value is None
        else kinds.get(type(value), "a number" if isinstance(value, (int, float)) else "no text")
    )


def _describe(fields: Mapping[Any, Any]) -> str:
    names = sorted(name for name in fields if name in _NAMEABLE)
    known = f", among them {', '.join(names)}" if names else ""
    return f"has {len(fields)} field{'s' if len(fields) != 1 else ''} of other names{known}"


# Files --------------------------------------------------------------------------------------------------------------------


MAX_TEXT_BYTES = 10**9
"""A file of texts is held in memory as a whole."""


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


def _csv(path: Path) -> Iterator[Record]:
    text = _decode(path)
    names = {name for kind in _KINDS for name in kind}
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
            yield to_record(dict(zip(header, cells, strict=True)), f"{path}: row {number}")
    except csv.Error as error:
        raise BadInput(f"{path}: not a table: {error}") from None


def _parquet(path: Path) -> Iterator[Record]:
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
            yield to_record(item, f"{path}: row {number}")


@contextmanager
def _damaged(message: str) -> Iterator[None]:
    """Say one thing of everything that a library raises on a damaged file."""
    try:
        yield
    except LiborthError:
        raise
    except Exception:
        raise BadInput(message) from None


def _tokens(path: Path) -> Iterator[Record]:
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
            strange = sorted(set(beside) - {"attention_mask", "labels", *_LOSS_MASKS, *_PACKED})
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
        yield token_record({name: table[number] for name, table in tables.items()}, f"{path}: row {number + 1}")


def _tensor(file: Checkpoint, name: str) -> np.ndarray:
    with _damaged(f"{file.path}: tensor {name!r} holds no integers"):
        return file.load(name).numpy()


def _hub(name: str, whole: bool, tell: Callable[[str], None]) -> Iterator[Record]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError(f"hub:{name}: reading datasets of the hub needs the datasets package: pip install datasets") from None
    repo, _, split = name.partition(":")
    datasets.disable_progress_bars()  # they would ignore --quiet
    try:
        # Before datasets 4 a dataset could bring code along, and a person was asked about it.
        asks = "trust_remote_code" in inspect.signature(datasets.load_dataset_builder).parameters
        told: dict[str, Any] = {"trust_remote_code": False} if asks else {}
        builder = datasets.load_dataset_builder(repo, **told)
        builder.download_and_prepare()
        items = builder.as_dataset(split=split or "train")
    except Exception as error:  # datasets raises its own kinds, the hub's and the file system's
        raise BadInput(f"hub:{name}: {_reason(error)}") from None
    splits = {other: info.num_examples for other, info in (builder.info.splits or {}).items()}
    read = {other: [str(file) for file in files] for other, files in (builder.config.data_files or {}).items()}
    title = f"hub:{Path(repo).name if Path(repo).exists() else repo}"
    for line in _left_by_datasets(Path(repo), split or "train", splits, read):
        if whole and not line.startswith("split"):
            raise BadInput(f"{title}: {line}, and no such row is left out in silence; give the files themselves")
        tell(f"{title}: {line}")
    for number, item in enumerate(items, 1):
        yield to_record(dict(item), f"hub:{name}: record {number}")


def _left_by_datasets(folder: Path, split: str, splits: Mapping[str, int], read: Mapping[str, list[str]]) -> Iterator[str]:
    """Say what the `datasets` library left without a word: other splits, files of other kinds, and rows.

    Args:
        folder: the dataset's name, or a directory, whose files can be looked at.
        split: what was asked for.
        splits: rows of every split it made.
        read: the files of every split.
    """
    others = [f"{name} ({count:,} rows)" for name, count in splits.items() if name != split]
    if others:
        yield f"split {split} is read, and not {', '.join(others)}"
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
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_READERS = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet, **dict.fromkeys(TOKEN_FILES, _tokens)}
