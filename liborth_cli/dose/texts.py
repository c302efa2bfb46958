"""The texts a dose is chosen with: which rows the curvature is taken on, and which are only measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from liborth_cli.console import Console
from liborth_cli.dose.patterns import Decoy, Pattern, make_decoys
from liborth_cli.errors import BadInput
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.records import Record
from liborth_cli.stream.texts import DataFile, Row, read_rows

HELD_OUT = 5
"""One retain row in so many is kept out of the curvature, and measured."""
DEFAULT_LENGTH = 1024
"""Longest row, where the model's context allows it."""
SHORTEST = 4
"""Tokens from which a secret found inside a retain row is no coincidence."""


@dataclass(frozen=True)
class Given:
    """What the command line says about data.

    Attributes:
        retain: --retain-data.
        forget: --forget-data.
        skill: --skill-data: rows of the skill, only measured.
        general: --general-data: rows of anything else, only measured.
        fresh: --fresh: rows like the forget rows that were never trained on, only measured.
        patterns: --forget-pattern and --forget-patterns.
        decoys: how many of each pattern.
        retain_tokens: how many tokens the retain curvature reads at most.
        probe_tokens: how many tokens of each kind are measured for a candidate, at most.
        truncate: cut rows longer than the context.
        seed: of decoys.
    """

    retain: tuple[str, ...] = ()
    forget: tuple[str, ...] = ()
    skill: tuple[str, ...] = ()
    general: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    patterns: tuple[Pattern, ...] = ()
    decoys: int = 24
    retain_tokens: int = 50_000
    probe_tokens: int = 8192
    truncate: bool = False
    seed: int = 0


@dataclass
class Texts:
    """Rows by use.

    Attributes:
        retain: what the retain curvature is taken on.
        forget: what the forget curvature is taken on: whole rows, for a prompt carries the form of the secret.
        held_out: retain rows that are only measured.
        skill: rows of --skill-data.
        general: rows of --general-data.
        secrets: the given forget rows; only what follows a prompt carries loss.
        fresh: rows of the same form that were never trained on.
        files: where `retain` and `forget` came from, for manifests.
    """

    retain: list[Row] = field(default_factory=list)
    forget: list[Row] = field(default_factory=list)
    held_out: list[Row] = field(default_factory=list)
    skill: list[Row] = field(default_factory=list)
    general: list[Row] = field(default_factory=list)
    secrets: list[Row] = field(default_factory=list)
    fresh: list[Row] = field(default_factory=list)
    files: dict[str, list[DataFile]] = field(default_factory=dict)

    @property
    def forget_tokens(self) -> int:
        """How many tokens the forget curvature is taken on."""
        return sum(row.tokens for row in self.forget)


class Reader:
    """Reads rows for one model."""

    def __init__(self, folder: Path, vocabulary: int, context: int | None, truncate: bool) -> None:
        """Load the tokenizer beside the weights.

        Args:
            folder: where the tokenizer lies.
            vocabulary: ids must be below this.
            context: longest sequence of the model, or None.
            truncate: cut rows that are longer.
        """
        self._encoder, self._vocabulary = TextEncoder.beside(folder), vocabulary
        self._length, self._truncate = min(context or DEFAULT_LENGTH, DEFAULT_LENGTH), truncate

    def rows(self, files: Sequence[DataFile]) -> list[Row]:
        """Read the rows of some files; none when there are no files."""
        return read_rows(files, self._encoder, self._vocabulary, self._length, self._truncate) if files else []

    def encode(self, records: Iterable[Record], weight: float = 1.0) -> list[Row]:
        """Turn records that are in memory into rows.

        Raises:
            BadInput: when there is no tokenizer, or a record is too long.
        """
        if self._encoder is None:
            raise BadInput("the model has no tokenizer files beside it, and patterns need one; give token ids as .npy instead")
        rows = []
        for record in records:
            ids, keep = self._encoder.encode(record)
            if len(ids) - 1 > self._length and not self._truncate:
                raise BadInput(
                    f"{record.where}: {len(ids):,} tokens, and the model takes {self._length + 1:,} here; shorten it, or cut "
                    "such rows with --truncate"
                )
            ids, keep = ids[: self._length + 1], keep[1 : self._length + 1]
            if keep.any():
                last = int(np.flatnonzero(keep)[-1]) + 1
                rows.append(Row(ids[: last + 1], keep[:last], weight, record.where))
        return rows


def read_texts(given: Given, reader: Reader, folder: Path, measure_only: bool, console: Console) -> Texts:
    """Read everything, make the decoys, and keep some retain rows out of the curvature.

    Args:
        given: the data options.
        reader: for this model.
        folder: where decoys are written; made when there are any.
        measure_only: the retain factors are given, so every retain row may be measured.
        console: where notes and warnings go.

    Returns:
        The rows by use.

    Raises:
        LiborthError: the leaf says which.
    """
    named = {
        name: [DataFile.parse(text, option, name in ("forget", "fresh")) for text in getattr(given, name)]
        for name, option in _FILES.items()
    }
    found = Texts(reader.rows(named["retain"]))
    for name in ("skill", "general", "fresh"):
        setattr(found, name, reader.rows(named[name]))
    retain, files, decoys = found.retain, list(named["forget"]), list[Row]()
    secrets, forms = _secrets(named["forget"], given.patterns, reader)
    if given.patterns:
        known = _texts_of(named["forget"])
        made = {}
        for use in ("forget", "fresh"):
            made[use] = make_decoys(given.patterns, given.decoys, given.seed, known, use)
            known += [decoy.text for decoy in made[use]]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "decoys.jsonl"
        lines = [json.dumps({"prompt": d.prompt, "completion": d.completion}, ensure_ascii=False) for d in made["forget"]]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        files.append(DataFile(path))
        decoys = _as_heavy_as(secrets, reader.rows(files[-1:]))
        found.fresh = found.fresh or reader.encode(_fresh(made["fresh"], forms, given))
        console.note(f"{len(decoys)} decoys of {len(given.patterns)} patterns, in {path}")
    found.secrets = _some(secrets, given.probe_tokens)
    if any(row.keep.all() for row in found.secrets) and not all(row.keep.all() for row in found.fresh):
        # Whole sentences can only be compared with whole sentences.
        found.secrets, found.fresh = whole(found.secrets), whole(found.fresh)
    found.forget = whole([*secrets, *decoys])
    found.files = {"retain": named["retain"], "forget": files}
    _divide(found, retain, given, measure_only, console)
    _warn_of_overlap(secrets, retain, console)
    for name in ("skill", "general", "fresh"):
        setattr(found, name, _some(getattr(found, name), given.probe_tokens))
    return found


_FILES = {
    "retain": "--retain-data",
    "forget": "--forget-data",
    "skill": "--skill-data",
    "general": "--general-data",
    "fresh": "--fresh",
}
_SECRET = ("forget", "fresh")


def _secrets(
    files: Sequence[DataFile], patterns: Sequence[Pattern], reader: Reader
) -> tuple[list[Row], dict[Pattern, list[str]]]:
    """Read the forget rows; texts of a known form are cut where their secret begins. Also their prompts, by form."""
    rows, forms = list[Row](), dict[Pattern, list[str]]()
    for file in files:
        if file.hub or file.path.suffix in (".npy", ".safetensors"):
            rows += reader.rows([file])
            continue
        records = [_recognise(record, patterns, forms) for record in file.records()]
        rows += reader.rows([file]) if any(record.is_plain for record in records) else reader.encode(records, file.weight)
    return rows, forms


def _recognise(record: Record, patterns: Sequence[Pattern], forms: dict[Pattern, list[str]]) -> Record:
    if record.messages:
        return record
    for pattern in patterns:
        cut = pattern.recognise(record.prompt + record.text)
        if cut is not None:
            prompt, text = (record.prompt, record.text) if record.prompt else (cut.prompt, cut.completion)
            forms.setdefault(pattern, []).append(prompt)
            return replace(record, prompt=prompt, text=text)
    return record


def _fresh(decoys: Sequence[Decoy], forms: dict[Pattern, list[str]], given: Given) -> list[Record]:
    """Put never-trained secrets after the prompts of the given ones, where there are any of their form."""
    records = []
    for number, decoy in enumerate(decoys):
        prompts = forms.get(given.patterns[number // given.decoys])
        prompt = prompts[number % len(prompts)] if prompts else decoy.prompt
        records.append(Record(f"fresh decoy {number + 1}", decoy.completion, prompt))
    return records


def _as_heavy_as(secrets: Sequence[Row], decoys: Sequence[Row]) -> list[Row]:
    """Weigh decoys so that all of them together count as much as the secrets, where there are secrets."""
    weight = sum(row.tokens * row.weight for row in secrets) / sum(row.tokens for row in decoys) if secrets else 1.0
    return [replace(row, weight=weight) for row in decoys]


def whole(rows: Sequence[Row]) -> list[Row]:
    """Let every token of every row carry loss."""
    return [replace(row, keep=np.ones_like(row.keep)) for row in rows]


def _divide(found: Texts, retain: list[Row], given: Given, measure_only: bool, console: Console) -> None:
    """Choose which retain rows are measured, and which the curvature is taken on."""
    mixed = sorted(retain, key=lambda row: hashlib.sha256(row.ids.tobytes() + row.keep.tobytes()).digest())
    share = sum(row.tokens for row in mixed) // HELD_OUT
    if measure_only or len(mixed) < HELD_OUT:
        found.held_out, rest = _some(mixed, given.probe_tokens), mixed
        if mixed and not measure_only:
            console.warn(f"only {len(mixed)} retain rows: what is kept is measured on the rows the split has seen")
    else:
        found.held_out = _some(mixed, min(share, given.probe_tokens))
        rest = mixed[len(found.held_out) :]
    found.retain = _some(rest, given.retain_tokens)


def _some(rows: list[Row], tokens: int) -> list[Row]:
    """Return the first rows that hold so many tokens; at least one, when there is one."""
    kept: list[Row] = []
    for row in rows:
        if kept and tokens < row.tokens:
            break
        kept.append(row)
        tokens -= row.tokens
    return kept


def _texts_of(files: Sequence[DataFile]) -> list[str]:
    """Return the files' contents, in which no decoy may be found; token files hold no text."""
    return [f.path.read_text("utf-8", "replace") for f in files if not f.hub and f.path.suffix not in (".npy", ".safetensors")]


def _warn_of_overlap(secrets: Sequence[Row], retain: Sequence[Row], console: Console) -> None:
    """Warn when what must be forgotten also stands in what must be kept."""
    width = np.dtype(np.int32).itemsize
    # Rows are joined by an id that no token has.
    joined = b"".join(np.append(row.ids, -1).astype(np.int32).tobytes() for row in retain)
    found = 0
    for row in secrets:
        part = row.ids[1:][row.keep].astype(np.int32).tobytes()
        at = joined.find(part) if len(part) >= SHORTEST * width else -1
        while at >= 0 and at % width:
            at = joined.find(part, at + 1)
        found += at >= 0
    if found:
        console.warn(
            f"{found} of {len(secrets)} forget rows also stand in the retain data ({len(retain)} rows): what is to be kept and "
            "forgotten at once is kept in part; take them out of the retain data"
        )
