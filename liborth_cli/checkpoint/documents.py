"""Read JSON that a stranger may have written: how long, how deep and of what shape is settled here, once, for every file.

`json` alone would read gigabytes, keep the last of two equal keys, take UTF-16, and pass on strings that no file can hold.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from liborth_cli.errors import BadInput, from_os, shown

if TYPE_CHECKING:
    import pydantic

    Document = TypeVar("Document", bound=pydantic.BaseModel)

MAX_BYTES = 100_000_000
"""Larger than any index or manifest that exists; a configuration is a thousandth of it."""
MAX_DEPTH = 64


class NotJson(ValueError):
    """Bytes are not one sound JSON document; the text says why, fit to follow a file's name."""


def read_small(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Read a whole regular file whose size is looked at first.

    Raises:
        BadInput: when it cannot be read, is no regular file, or is larger than `limit` bytes.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would block
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise BadInput(f"{path}: not a regular file")
            raw = file.read(limit + 1) if status.st_size <= limit else None
    except OSError as error:
        raise from_os(error, path, "read", BadInput) from None
    except ValueError as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None
    if raw is None or len(raw) > limit:
        raise BadInput(f"{path}: larger than {limit:,} bytes, which no real file of this kind is; refusing to read it")
    return raw


def json_lines(rows: Iterable[object], escaped: bool = True) -> bytes:
    """Render JSON lines, one row each.

    Args:
        rows: plain data.
        escaped: write what is not ASCII as escapes, which can spell half a surrogate pair too; False writes UTF-8.
    """
    return "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows).encode()


def check_size(path: Path, limit: int = MAX_BYTES) -> None:
    """Raise BadInput when a file that a library is going to read as a whole is larger than `limit` bytes."""
    if path.is_file() and path.stat().st_size > limit:
        raise BadInput(f"{path}: larger than {limit:,} bytes, which no real file of this kind is; refusing to read it")


def parse(raw: bytes, depth: int = MAX_DEPTH) -> Any:
    """Parse one JSON document, in time linear in its length.

    Args:
        raw: UTF-8.
        depth: objects and arrays that may lie within each other.

    Raises:
        NotJson: when it is not JSON or not UTF-8, names a key twice in one object, is nested too deeply, or holds half a
            surrogate pair.
    """
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
        if b"\\u" in raw:
            json.dumps(document, ensure_ascii=False).encode()  # an escape can spell what UTF-8 cannot
    except NotJson:
        raise
    except UnicodeEncodeError:
        raise NotJson("holds half a surrogate pair, which is not text") from None
    except RecursionError:
        raise NotJson(f"more than {depth} objects lie within each other") from None
    except ValueError:
        raise NotJson("not JSON in UTF-8") from None
    level = [document]
    for _ in range(depth):
        level = [inner for outer in level for inner in _contents(outer) if isinstance(inner, dict | list)]
        if not level:
            return document
    raise NotJson(f"more than {depth} objects lie within each other")


def load_json(path: Path, limit: int = MAX_BYTES) -> Any:
    """Read and parse a JSON file.

    Raises:
        BadInput: when it cannot be read, is larger than `limit` bytes, or is not one sound document (see `parse`).
    """
    try:
        return parse(read_small(path, limit))
    except NotJson as error:
        raise BadInput(f"{path}: {error}") from None


def load_object(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds an object; see `load_json`."""
    document = load_json(path, limit)
    if not isinstance(document, dict):
        raise BadInput(f"{path}: not a JSON object")
    return document


def fit(model: type[Document], document: Any, where: object) -> Document:
    """Turn a parsed document into a typed record.

    Args:
        model: the record's class.
        document: what `load_json` returned.
        where: the file, for the error line.

    Raises:
        BadInput: when a field is missing, strange or of another type; names the first such field.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{where}: field {shown(place)}: {shown(first['msg'].lower(), 100)[1:-1]}") from None


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make an object of what stands in it; for `json`'s `object_pairs_hook`.

    Raises:
        NotJson: when a key stands twice; names it.
    """
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise NotJson(f"names {shown(key)} twice; refusing to guess which is meant")
            seen.add(key)
    return document


def _contents(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
