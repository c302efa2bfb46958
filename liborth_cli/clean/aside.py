"""Rows to verify with, where only texts to keep and texts to remove are given: set aside before a split sees any of them.

A split that was judged by the rows it was made with is not judged. One public record in `HELD_OUT` is kept out, by its content,
so that copies stay together; never-trained rows are drawn from the form of the private ones, or are half of those given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from liborth_cli.checkpoint.documents import json_lines
from liborth_cli.checkpoint.files import write_file
from liborth_cli.checkpoint.private import FILE_MODE, close
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.console import JsonObject
from liborth_cli.dose.patterns import Pattern, make_decoys
from liborth_cli.dose.texts import HELD_OUT, as_cut, forms_of, open_reader
from liborth_cli.errors import BadInput, UsageError
from liborth_cli.extract.alike import forms as forms_of_prompts
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.records import Record
from liborth_cli.stream.texts import DataFile
from liborth_cli.stream.weights import Point

FRESH = 48
"""Never-trained rows that are drawn to verify with: more make intervals narrower, and the attack longer."""
RETAIN, HELD, LEVEL, UNSEEN, FORMS = "retain.jsonl", "held_out.jsonl", "level.jsonl", "unseen.jsonl", "patterns.txt"


@dataclass(frozen=True)
class Given:
    """Texts as they were named.

    Attributes:
        private: what must go.
        public: what must stay.
        held_out: what must stay and only verifies; empty: set aside from `public`.
        fresh: rows like the private ones that nobody trained on, or None.
        patterns: forms of the private rows.
        decoys: how many the split makes of each pattern.
        seed: of what is drawn.
    """

    private: str
    public: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    fresh: str | None = None
    patterns: tuple[str, ...] = ()
    decoys: int = 24
    seed: int = 0


@dataclass(frozen=True)
class Public:
    """What must stay, divided.

    Attributes:
        retain: files that the split reads.
        held_out: the skill, to verify with.
        files: name → records, of what was made of the given texts.
        notes: what was made.
    """

    retain: tuple[str, ...]
    held_out: tuple[str, ...]
    files: dict[str, Sequence[JsonObject]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def divide(cls, given: Given, folder: Path, tell: Callable[[str], None]) -> Public:
        """Set one record in `HELD_OUT` aside, where nothing to verify with was named."""
        if given.held_out:
            return cls(given.public, given.held_out)
        kept, held = _divide(given.public, given.seed, tell)
        names = [RETAIN] if len(kept) == 1 else [RETAIN.replace(".", f"-{number}.") for number in range(1, len(kept) + 1)]
        files = {name: [r.fields() for r in some] for name, some in zip(names, kept, strict=True) if some}
        retain, every = tuple(str(folder / name) for name in files), sum(map(len, (*kept, held)))
        note = f"{len(held):,} of {every:,} public records are set aside: only verify reads them"
        return cls(retain, (str(folder / HELD),), {**files, HELD: [r.fields() for r in held]}, (note,))


@dataclass(frozen=True)
class Aside:
    """The files of a split, and those that only verify it.

    Attributes:
        public: what must stay.
        level: never-trained rows that the split may see, or None.
        fresh: never-trained rows that it does not see, or None.
        forms: a file of patterns, where they were inferred, or None.
        files: name → content, of what was made for the private rows.
        notes: what that was, and what is missing.
    """

    public: Public
    level: str | None
    fresh: str | None
    forms: str | None
    files: dict[str, Sequence[JsonObject] | str]
    notes: tuple[str, ...]

    @property
    def retain(self) -> tuple[str, ...]:
        """Files that the split reads."""
        return self.public.retain

    @property
    def held_out(self) -> tuple[str, ...]:
        """The skill, to verify with."""
        return self.public.held_out

    def write(self, folder: Path) -> None:
        """Write the files into a directory that is made for them, readable by their owner alone."""
        close(folder)
        for name, content in {**self.public.files, **self.files}.items():
            raw = content.encode() if isinstance(content, str) else json_lines(content)
            write_file(folder / name, raw, FILE_MODE)


def set_aside(given: Given, folder: Path, tell: Callable[[str], None], public: Public | None = None) -> Aside:
    """Decide which rows a split sees, and which only verify it; nothing is written yet.

    Args:
        given: the texts.
        folder: where the files will be.
        tell: told what a library leaves of a dataset.
        public: how what must stay was divided before, where it was.

    Raises:
        BadInput: when a file cannot be read.
        UsageError: when there are too few rows to set some aside.
    """
    secrets = list(DataFile.parse(given.private, "--private", secret=True).records(tell))
    public = public or Public.divide(given, folder, tell)
    files, notes = dict[str, Sequence[JsonObject] | str](), list[str]()
    patterns, forms = as_cut([Pattern.parse(text, "--pattern") for text in given.patterns], secrets), None
    if not patterns and (patterns := forms_of(secrets)):
        forms, files[FORMS] = str(folder / FORMS), "".join(f"{pattern.text}\n" for pattern in patterns)
        count = "one form" if len(patterns) == 1 else f"{len(patterns)} forms"
        notes.append(f"the private rows are of {count}, and decoys of that form are made")
    level, fresh = None, given.fresh
    if fresh is None and patterns:
        files[UNSEEN], fresh = _draw(patterns, given, secrets), str(folder / UNSEEN)
        notes.append(f"{len(files[UNSEEN])} rows of that form that nobody trained on are drawn: only verify reads them")
    elif fresh is not None and not patterns:
        seen, unseen = _halves(list(DataFile.parse(fresh, "--fresh", secret=True).records(tell)), given.seed, 2, "--fresh")
        files |= {LEVEL: [r.fields() for r in seen], UNSEEN: [r.fields() for r in unseen]}
        level, fresh = str(folder / LEVEL), str(folder / UNSEEN)
        notes.append(f"{len(unseen)} of {len(seen) + len(unseen)} fresh rows are set aside: only verify reads them")
    if fresh is None:
        notes.append(
            "NO fresh rows, and not all private rows are of a form: leaks and relearning cannot be decided. Give --fresh, "
            'rows like the private ones that nobody trained on, or --pattern "The code of {name} is {digits:8}."'
        )
    return Aside(public, level, fresh, forms, files, tuple(notes))


def check_readable(given: Given, aside: Aside, finetuned: Checkpoint) -> str:
    """Read the model's configuration, its tokenizer and all rows that a split is going to see, as the split will.

    Returns:
        Why the private rows are none that the model can be asked for more of; "" when they are.

    Raises:
        LiborthError: what the split would say, before anything is written.
    """
    with closing(BlockModel(Point(finetuned), torch.float32, torch.device("cpu"))) as model:
        reader = replace(open_reader(model, finetuned, False, lambda line: None), too_long="; shorten it")
        secret = [("--private", given.private), *([("--fresh", given.fresh)] if aside.level and given.fresh else [])]
        files = [DataFile.parse(name, option, secret=True) for option, name in secret]
        private = reader.read(files[:1])
        for file in (*files[1:], *(DataFile.parse(name, "--public") for name in given.public)):
            reader.read([file])
        try:
            forms_of_prompts(private, model.context)
        except BadInput:
            return "every row must have a prompt of two tokens or more, and fit into the context"
        return ""


def weighed(file: DataFile, tell: Callable[[str], None]) -> list[Record]:
    """Read the records of a file, each with the file's weight in its own: they go into a file without one."""
    return [replace(record, weight=record.weight * file.weight) for record in file.records(tell)]


def _divide(names: Sequence[str], seed: int, tell: Callable[[str], None]) -> tuple[list[list[Record]], list[Record]]:
    """Keep one public record in `HELD_OUT` out; of a file that is one text, its last part. The others stay file by file."""
    files = list[list[Record]]()
    for name in names:
        found = weighed(DataFile.parse(name, "--public"), tell)
        files.append(_parts(found[0]) if len(found) == 1 and found[0].is_plain else found)
    _, held = _halves([record for file in files for record in file], seed, HELD_OUT, "--public")
    out = {id(record) for record in held}
    return [[record for record in file if id(record) not in out] for file in files], held


def _parts(record: Record) -> list[Record]:
    """Cut running text into `HELD_OUT` parts of whole lines and about one length."""
    lines, parts = record.text.splitlines(keepends=True), list[str]()
    for line in lines:
        if parts and len(parts[-1]) * HELD_OUT < len(record.text):
            parts[-1] += line
        else:
            parts.append(line)
    return [replace(record, text=part) for part in parts if part.strip()]


def _halves(records: Sequence[Record], seed: int, share: int, option: str) -> tuple[list[Record], list[Record]]:
    """Return records to be seen, and one in `share` that is not; copies go the same way.

    Raises:
        UsageError: when there are fewer than `share` different ones.
    """
    ranks = [hashlib.sha256(f"{seed}\0{json.dumps(r.fields(), sort_keys=True)}".encode()).digest() for r in records]
    every = sorted(set(ranks))
    if len(every) < share:
        more = "give more, or name others with --held-out" if share == HELD_OUT else "give more"
        raise UsageError(f"{option}: {len(every)} different records are too few to set one in {share} aside; {more}")
    out = set(every[: len(every) // share])
    return [r for r, rank in zip(records, ranks, strict=True) if rank not in out], [
        r for r, rank in zip(records, ranks, strict=True) if rank in out
    ]


def _draw(patterns: Sequence[Pattern], given: Given, secrets: Sequence[Record]) -> list[JsonObject]:
    """Draw never-trained rows that are neither private nor among the decoys of the split."""
    known = [record.prompt + record.text for record in secrets]
    for use in ("forget", "fresh"):
        known += [decoy.text for decoy in make_decoys(patterns, given.decoys, given.seed, known, use)]
    drawn = make_decoys(patterns, -(-FRESH // len(patterns)), given.seed, known, "verify")
    return [{"prompt": decoy.prompt, "completion": decoy.completion} for decoy in drawn]
