"""Results of finished checks, kept so that a verification that was stopped goes on behind them.

They lie in the private cache (checkpoint/cache.py): a result tells of single rows. Each is sealed with the cache's own key, and
counts only for the very same weights, rows, options, seed, versions and arithmetic; otherwise its check is made anew. What
judges files (`Check.files`) is never kept: whether they are sound is asked again every time.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from liborth_cli import manifest
from liborth_cli.checkpoint import cache, sidecars
from liborth_cli.checkpoint.documents import NotJson, parse, read_small
from liborth_cli.checkpoint.files import hash_file, write_file
from liborth_cli.checkpoint.hashing import BackgroundHasher
from liborth_cli.checkpoint.private import FILE_MODE, identity
from liborth_cli.console import Json
from liborth_cli.errors import LiborthError
from liborth_cli.stream.texts import data_hash
from liborth_cli.verify.check import Options
from liborth_cli.verify.opening import Inputs
from liborth_cli.verify.result import Result
from liborth_cli.verify.subject import Subject

KIND, TUPLE = "kind", "tuple"
"""Key under which the JSON form of a record or a tuple says what it is."""
PACKAGE = "liborth_cli."
LARGEST = 1 << 30


class Kept:
    """The finished checks of one verification.

    Attributes:
        why_not: why nothing can be kept, or "".
    """

    def __init__(self, subject: Subject, inputs: Inputs, settings: Mapping[str, Options], resume: bool) -> None:
        """Find what an earlier run has left, and begin to hash what is verified.

        Args:
            subject: what is verified.
            inputs: how the user named it.
            settings: check → its options, of the checks that are going to run and may be kept.
            resume: take what was left.
        """
        self._subject, self._inputs, self._settings = subject, inputs, settings
        self._done: dict[str, Json] = {}
        self.why_not, self._said = "", ""
        self._hasher = subject.hasher or BackgroundHasher()
        if not settings or not subject.run.world.first:
            self._settings = {}
            return
        try:
            folder = cache.folder(cache.CHECKS)
            self._name: Callable[[str], str] = lambda text: identity(folder, text.encode())
            self._file = folder / f"{self._name(os.path.realpath(subject.source.path))[:16]}.json"
        except LiborthError as error:
            self.why_not = str(error)
            return
        for _, path, known in self._files():
            if not known:
                self._hasher.ask(path)
        if resume:
            self._done = self._read()

    @property
    def any(self) -> bool:
        """Whether there is something to go on with."""
        return bool(self._done) and not self.why_not

    def take(self, check: str) -> Result | None:
        """Return the result of a check that an earlier run finished on the same inputs; None when it has to be made."""
        entry = self._done.get(check)
        if self.why_not or not isinstance(entry, dict):
            return None
        if entry.get("inputs") != self._key(check):
            self._done.pop(check)
            self._subject.console.note(f"{check}: finished before on other weights, rows or options; made anew")
            return None
        return decode(entry["result"])

    def add(self, check: str, result: Result) -> None:
        """Keep what a check found; whatever is in the way of that ends the keeping, and not the run."""
        if self.why_not or check not in self._settings:
            return
        try:
            self._done[check] = {"inputs": self._key(check), "result": encode(result)}
            text = json.dumps(self._done)
            write_file(self._file, json.dumps({"seal": self._name(text), "checks": text}).encode(), FILE_MODE)
        except (LiborthError, OSError, TypeError) as error:
            self.why_not = f"{check} cannot be kept ({error})"

    def forget(self) -> None:
        """Remove what was kept: the verification is over."""
        if not self.why_not and self._settings:
            self._file.unlink(missing_ok=True)

    def _read(self) -> dict[str, Json]:
        """Return what the file holds; nothing, and a sentence, when it is damaged."""
        if not self._file.exists():
            self._subject.console.note("no check of a stopped run is kept for this model; begun anew")
            return {}
        try:
            found = parse(read_small(self._file, LARGEST))
            if self._name(found["checks"]) == found["seal"]:
                return parse(found["checks"].encode())
        except (LiborthError, NotJson, KeyError, TypeError, AttributeError):
            pass
        self._subject.console.warn(f"{self._file}: damaged; every check is made anew")
        return {}

    def _key(self, check: str) -> str:
        """Name everything that decides what a check finds, under the cache's key: rows that must go are among it."""
        if not self._said:
            subject, inputs = self._subject, self._inputs
            hashes = [(side, known or self._hasher.wait(path).sha256) for side, path, known in self._files()]
            beside = {name: hash_file(path).sha256 for name, path in sidecars.find(subject.folder).files.items()}
            rows = {name: (data_hash(some.rows), [r.where for r in some.rows]) for name, some in subject.data.items()}
            how = [subject.seed, inputs.show_text, inputs.slide, inputs.resident, str(subject.run.device)]
            told = subject.manifest.digest if subject.manifest else None
            maker = manifest.Maker(kind="verify").model_dump()
            self._said = json.dumps([hashes, beside, rows, how, subject.run.kernels, told, maker], sort_keys=True)
        options = {name: _of_file(value) for name, value in asdict(self._settings[check]).items()}
        return self._name(json.dumps([self._said, check, options], sort_keys=True, default=str))

    def _files(self) -> Iterator[tuple[str, Path, str]]:
        """List every file of weights that a check may read: its side, where it is, and its hash if it was located by that."""
        subject = self._subject
        memory = subject.memory.checkpoint if subject.memory else None
        retrained = subject.states.weights["retrained"].checkpoint if "retrained" in subject.states else None
        sides = {
            "general": subject.general, "reference": subject.reference, "finetuned": subject.finetuned, "memory": memory,
            "retrained": retrained,
        }  # fmt: skip
        for name, side in sides.items():
            for shard in side.shards.values() if side is not None else ():
                yield name, shard.path, subject.hashes.get(name, {}).get(shard.name, "")


def encode(value: Any) -> Json:
    """Write records, tuples and numbers as JSON that `decode` turns into the very same.

    Raises:
        TypeError: when something in it is neither.
    """
    if is_dataclass(value):
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return {KIND: kind, **{one.name: encode(getattr(value, one.name)) for one in fields(value)}}
    if isinstance(value, dict) and KIND not in value and all(isinstance(key, str) for key in value):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {KIND: TUPLE, "of": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, float):  # NumPy's, too
        return float(value)
    if value is None or (isinstance(value, str | int) and type(value) in (str, int, bool)):
        return value
    raise TypeError(f"a {type(value).__name__} in its result")


def decode(value: Any) -> Any:
    """Return what `encode` wrote; a record must be one of liborth's that is known here."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    rest = {key: decode(item) for key, item in value.items() if key != KIND}
    if KIND not in value:
        return rest
    if value[KIND] == TUPLE:
        return tuple(rest["of"])
    module, _, name = value[KIND].partition(":")
    found = getattr(importlib.import_module(module), name) if module.startswith(PACKAGE) else None
    if not isinstance(found, type) or not is_dataclass(found):
        raise TypeError(f"{value[KIND]} is no record of liborth")
    made = found.__new__(found)
    for key, item in rest.items():
        object.__setattr__(made, key, item)
    return made


def _of_file(value: Any) -> Any:
    """Add to the name of a file, or of a directory, what tells whether its contents changed."""
    if isinstance(value, list | tuple):
        return [_of_file(item) for item in value]
    if not isinstance(value, str | Path) or not (path := Path(value).expanduser()).exists():
        return value if not isinstance(value, float) or math.isfinite(value) else str(value)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [str(value), [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]]
