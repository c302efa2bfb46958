"""The texts a dose is chosen with: which rows the curvature is taken on, and which are only measured."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.checkpoint.documents import json_lines
from liborth_cli.checkpoint.files import write_file
from liborth_cli.checkpoint.private import DECOYS, FILE_MODE, prepare_factors
from liborth_cli.console import Console
from liborth_cli.dose.overlap import check_fresh, warn_of_overlap
from liborth_cli.dose.patterns import Decoy, Pattern, infer, make_decoys
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.records import Record
from liborth_cli.stream.texts import DataFile, Row, RowReader

if TYPE_CHECKING:
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.stream.model import BlockModel

LONGEST = 1024
"""Positions of the longest row, where the model's context allows it."""
HELD_OUT = 5
"""One retain row in so many is kept out of the curvature, and measured."""
SMALL, FEWEST = 0.05, 10
"""Share of the retain tokens under which a file is small, and the rows that small files must have to be held by themselves."""
SECRET = ("forget", "fresh")
"""Texts whose files are read row by row, and never told of."""
OPTIONS = {
    "retain": "--retain-data",
    "forget": "--forget-data",
    "skill": "--skill-data",
    "general": "--general-data",
    "fresh": "--fresh",
}


@dataclass(frozen=True)
class DataOptions:
    """What the command line says about data.

    Attributes:
        retain: --retain-data.
        forget: --forget-data.
        skill: --skill-data: rows of the skill, only measured.
        general: --general-data: rows of anything else, only measured.
        fresh: --fresh: rows like the forget rows that were never trained on, only measured.
        patterns: --forget-pattern and --forget-patterns.
        alike: where there are neither patterns nor fresh rows, make decoys of the forget rows' own forms, if all are of one.
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
    alike: bool = False
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
        public: all retain rows that are not held out: what a student reads.
        forget: what the forget curvature is taken on: whole rows, for a prompt carries the form of the secret.
        held_out: retain rows that are only measured.
        small: numbers of the retain files whose rows are held by themselves;
        few: all rows of these.
        skill: rows of --skill-data.
        general: rows of --general-data.
        marked: all given forget rows, each once; only what follows a prompt carries loss.
        level: rows of the same form that were never trained on, likewise: what steps take the unseen level from.
        secrets: those of `marked` that are measured;
        fresh: rows of the same form that were never trained on, each once.
        files: where `retain` and `forget` came from, for manifests.
    """

    retain: list[Row] = field(default_factory=list)
    public: list[Row] = field(default_factory=list)
    forget: list[Row] = field(default_factory=list)
    held_out: list[Row] = field(default_factory=list)
    small: frozenset[int] = frozenset()
    few: list[Row] = field(default_factory=list)
    skill: list[Row] = field(default_factory=list)
    general: list[Row] = field(default_factory=list)
    marked: list[Row] = field(default_factory=list)
    level: list[Row] = field(default_factory=list)
    secrets: list[Row] = field(default_factory=list)
    fresh: list[Row] = field(default_factory=list)
    files: dict[str, list[DataFile]] = field(default_factory=dict)


def open_reader(model: BlockModel, checkpoint: Checkpoint, truncate: bool, tell: Callable[[str], None]) -> RowReader:
    """Return what reads rows for a model: with the tokenizer beside its weights, and as long as its context allows.

    Args:
        model: whose vocabulary and context count.
        checkpoint: its weights.
        truncate: cut rows that are too long in place of refusing them.
        tell: told what was read of each file.
    """
    encoder = TextEncoder.beside(*checkpoint.folders)
    return RowReader(encoder, model.vocabulary, min(model.context or LONGEST, LONGEST), truncate, tell)


def read_texts(given: DataOptions, reader: RowReader, folder: Path, measure_only: bool, console: Console) -> Texts:
    """Read everything, make the decoys, and keep some retain rows out of the curvature.

    Args:
        given: the data options.
        reader: for this model.
        folder: a private directory, where decoys are written; made (0700) when there are any.
        measure_only: the retain factors are given, so every retain row may be measured.
        console: where notes and warnings go.

    Returns:
        The rows by use.

    Raises:
        BadInput: when a file cannot be read, or a fresh row is a forget row.
        LiborthError: the leaf says which.
    """
    named = {
        name: [DataFile.parse(text, option, name in SECRET) for text in getattr(given, name)]
        for name, option in OPTIONS.items()
    }
    found = Texts(files={"retain": named["retain"], "forget": list(named["forget"])})
    retain, found.skill, found.general, found.fresh = (
        reader.read(named[name]) if named[name] else [] for name in ("retain", "skill", "general", "fresh")
    )
    own = given.alike and not (given.patterns or given.fresh)
    texts = [
        list(file.records(reader.tell)) if file.needs_tokenizer and (own or given.patterns) else None
        for file in named["forget"]
    ]
    records = [record for some in texts for record in some or ()]
    if own and None not in texts and (forms := forms_of(records)):
        shared = "one form" if len(forms) == 1 else f"{len(forms)} forms"
        console.note(
            f"the forget rows share {shared}: decoys of it stand for rows that were never seen (--fresh gives real ones)"
        )
        given = replace(given, patterns=forms)
    else:
        given = replace(given, patterns=as_cut(given.patterns, records))
    secrets, prompts = _secrets(named["forget"], texts, given.patterns, reader)
    decoys = _add_decoys(found, given, reader, (secrets, prompts), folder, console) if given.patterns else []
    found.marked = _distinct(secrets, "forget", console)
    found.secrets = _some(found.marked, given.probe_tokens)
    if any(row.keep.all() for row in found.secrets) and not all(row.keep.all() for row in found.fresh):
        # Whole sentences can only be compared with whole sentences.
        found.marked, found.secrets, found.fresh = whole(found.marked), whole(found.secrets), whole(found.fresh)
    found.fresh = _distinct(found.fresh, "fresh", console)
    check_fresh(found.fresh, secrets)
    found.level = (whole(decoys) if any(row.keep.all() for row in found.marked) else decoys) or found.fresh
    found.forget = whole([*secrets, *decoys])
    _divide(found, retain, given, measure_only, console)
    warn_of_overlap(secrets, found.fresh, retain, console)
    for name in ("skill", "general", "fresh"):
        setattr(found, name, _some(getattr(found, name), given.probe_tokens))
    return found


def whole(rows: Sequence[Row]) -> list[Row]:
    """Let every token of every row carry loss."""
    return [replace(row, keep=np.ones_like(row.keep)) for row in rows]


def forms_of(records: Sequence[Record]) -> tuple[Pattern, ...]:
    """Return the patterns that all records are of, with their borders; none where a record has no form, or a border elsewhere.

    What a decoy says would be another part of the row than what such a record says. Conversations and tokens are of no form.
    """
    if any(record.messages or record.ids is not None for record in records):
        return ()
    patterns = as_cut([Pattern.parse(form) for form in infer([record.prompt + record.text for record in records])], records)
    for record in records:
        cuts = (pattern.recognise(record.prompt + record.text) for pattern in patterns)
        cut = next((cut for cut in cuts if cut is not None), None)
        if cut is None or record.prompt.rstrip() not in ("", cut.prompt):
            return ()
    return patterns


def as_cut(patterns: Sequence[Pattern], records: Iterable[Record]) -> tuple[Pattern, ...]:
    """Return patterns whose decoys begin their completions where given records do."""
    given = [(record.prompt, record.text) for record in records if not record.messages and record.ids is None]
    return tuple(pattern.cut_like(given) for pattern in patterns)


def _secrets(
    files: Sequence[DataFile], texts: Sequence[list[Record] | None], patterns: Sequence[Pattern], reader: RowReader
) -> tuple[list[Row], dict[Pattern, list[str]]]:
    """Read the forget rows; texts of a known form are cut where their secret begins. Also their prompts, by form."""
    rows, prompts = list[Row](), dict[Pattern, list[str]]()
    for file, records in zip(files, texts, strict=True):
        if patterns and records is not None:
            rows += reader.encode([_recognise(record, patterns, prompts) for record in records], file.weight)
        else:
            rows += reader.read([file])
    return rows, prompts


def _recognise(record: Record, patterns: Sequence[Pattern], prompts: dict[Pattern, list[str]]) -> Record:
    if record.messages or record.ids is not None:
        return record
    for pattern in patterns:
        cut = pattern.recognise(record.prompt + record.text)
        if cut is not None:
            if record.prompt.rstrip() not in ("", cut.prompt):
                return record  # what follows such a prompt is another part of the row than a decoy's secret
            prompt, text = (record.prompt, record.text) if record.prompt else (cut.prompt, cut.completion)
            prompts.setdefault(pattern, []).append(prompt)
            return replace(record, prompt=prompt, text=text)
    return record


def _add_decoys(
    found: Texts,
    given: DataOptions,
    reader: RowReader,
    secrets: tuple[list[Row], dict[Pattern, list[str]]],
    folder: Path,
    console: Console,
) -> list[Row]:
    """Make decoys to forget, and others as never-trained rows where none were given; return those to forget.

    All decoys together weigh as much as the secrets, where there are secrets.
    """
    files = found.files["forget"]
    # No decoy may be found in what the user calls secret; token files hold no text.
    known = [f.path.read_text("utf-8", "replace") for f in files if not f.hub and f.needs_tokenizer]
    made = {}
    for use in ("forget", "fresh"):
        made[use] = make_decoys(given.patterns, given.decoys, given.seed, known, use)
        known += [decoy.text for decoy in made[use]]
    records = [{"prompt": decoy.prompt, "completion": decoy.completion} for decoy in made["forget"]]
    prepare_factors(folder)
    write_file(folder / DECOYS, json_lines(records, escaped=False), FILE_MODE)
    files.append(DataFile(folder / DECOYS, secret=True))
    rows, prompts = secrets
    decoys = reader.read(files[-1:])
    weight = sum(row.tokens * row.weight for row in rows) / sum(row.tokens for row in decoys) if rows else 1.0
    found.fresh = found.fresh or list(reader.encode(_fresh(made["fresh"], prompts, given)))
    patterns = "one pattern" if len(given.patterns) == 1 else f"{len(given.patterns)} patterns"
    console.note(f"{len(decoys)} decoys of {patterns}, in {files[-1].path}")
    return [replace(row, weight=weight) for row in decoys]


def _fresh(decoys: Sequence[Decoy], prompts: dict[Pattern, list[str]], given: DataOptions) -> list[Record]:
    """Put never-trained secrets after the prompts of the given ones, where there are any of their form."""
    records = []
    for number, decoy in enumerate(decoys):
        mine = prompts.get(given.patterns[number // given.decoys])
        prompt = mine[number % len(mine)] if mine else decoy.prompt
        records.append(Record(f"fresh decoy {number + 1}", decoy.completion, prompt))
    return records


def _divide(found: Texts, retain: list[Row], given: DataOptions, measure_only: bool, console: Console) -> None:
    """Choose which retain rows are measured, and which the curvature is taken on; of small files in the same proportion."""
    every = sorted(retain, key=lambda row: hashlib.sha256(row.ids.tobytes() + row.keep.tobytes()).digest())
    found.small = small_files(every)
    mixed, found.few = ([row for row in every if (row.file in found.small) == small] for small in (False, True))
    share = sum(row.tokens for row in mixed) // HELD_OUT
    if measure_only or len(mixed) < HELD_OUT:
        found.held_out, rest = _some(mixed, given.probe_tokens), mixed
        if mixed and not measure_only:
            console.warn(f"only {len(mixed)} retain rows: what is kept is measured on the rows the split has seen")
    else:
        found.held_out = _some(mixed, min(share, given.probe_tokens))
        rest = mixed[len(found.held_out) :]
    back = len(found.few) // HELD_OUT
    held, seen = found.few[:back], found.few[back:]
    found.held_out += _some(held, int(SMALL * given.probe_tokens))
    found.retain = [*_some(rest, given.retain_tokens), *_some(seen, int(SMALL * given.retain_tokens))]
    found.public = [*rest, *seen]


def small_files(rows: Sequence[Row]) -> frozenset[int]:
    """Return the files, by number, that hold so little of what carries loss that a mean over all would not feel them.

    None where they are half of all together, for of many files each may be small, or where they have too few rows to hold any
    of them back.
    """
    counts = Counter[int]()
    for row in rows:
        counts[row.file] += int(row.keep.sum())
    small = frozenset(file for file, count in counts.items() if count < SMALL * counts.total())
    enough = sum(row.file in small for row in rows) >= FEWEST
    return small if enough and 2 * sum(counts[file] for file in small) < counts.total() else frozenset()


def _some(rows: list[Row], tokens: int) -> list[Row]:
    """Return the first rows that hold so many tokens; at least one, when there is one."""
    kept: list[Row] = []
    for row in rows:
        if kept and tokens < row.tokens:
            break
        kept.append(row)
        tokens -= row.tokens
    return kept


def _distinct(rows: Sequence[Row], kind: str, console: Console) -> list[Row]:
    """Keep one of several equal rows: the same row twice is no second witness."""
    kept = {(row.ids.tobytes(), row.keep.tobytes()): row for row in reversed(rows)}
    if len(kept) < len(rows):
        console.warn(f"{len(rows) - len(kept)} of {len(rows)} {kind} rows stand there twice; each is measured once")
    return list(reversed(kept.values()))
