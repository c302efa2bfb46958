"""From two checkpoints to a private file of what one of them knows by heart."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.console import JsonObject
from liborth_cli.errors import BadInput, UsageError, shown
from liborth_cli.extract.finds import Find
from liborth_cli.extract.request import ExtractRequest

if TYPE_CHECKING:
    from liborth_cli.console import Console
    from liborth_cli.machine import Run
    from liborth_cli.stream.encoder import TextEncoder
    from liborth_cli.stream.texts import Row

CHARACTER = 4
"""Tokens that a character takes at most, where they are bytes."""
BROKEN = "\ufffd"
"""What stands for a piece of a character."""


@dataclass(frozen=True)
class Extracted:
    """What became of it.

    Attributes:
        finds: most nats first; those that were asked for, what is asked most first.
        texts: how many were written.
        tokens: in them.
        out: the file.
        like: whether they are of forms that were asked for.
        undecided: given rows were asked too seldom to tell which finds are made up.
        notes: what the command said, where Python called it.
    """

    finds: list[Find] = field(repr=False)
    texts: int
    tokens: int
    out: Path
    like: bool = False
    undecided: bool = False
    notes: tuple[str, ...] = ()

    @property
    def once(self) -> int:
        """How many were recited by one text only."""
        return sum(find.times == 1 for find in self.finds)

    @property
    def often(self) -> int:
        """How many are asked for about as often as rows that were learnt."""
        return sum(bool(find.often) for find in self.finds)

    def __str__(self) -> str:
        """Say it in one line."""
        some = ""
        if self.undecided:
            some = "; too few of the rows that were given are known by heart, or asked often enough,"
            some += " to tell which are made up: more --texts may do"
        elif self.like:
            some = f"; {self.often:,} of them asked for about as often as given ones are, which made-up rows seldom are"
        elif self.once:
            some = f"; {self.once:,} of them in one text only, so there may be more that stand in none"
        found = f"{len(self.finds):,} run{'s' * (len(self.finds) != 1)} known by heart{', like those given,' * self.like}"
        return f"{found} in {self.texts:,} texts, {self.tokens:,} tokens{some}"

    def to_json(self) -> JsonObject:
        """Return a JSON object, without the texts."""
        return {
            "output": str(self.out), "finds": len(self.finds), "once": self.once, "texts": self.texts, "tokens": self.tokens,
            **({"often": self.often, "undecided": self.undecided} if self.like else {}),
        }  # fmt: skip


def extract(request: ExtractRequest, run: Run, console: Console) -> Extracted:
    """Have the fine-tuned model write, and write what it knows by heart into a private file.

    Args:
        request: what is asked.
        run: device, threads, and whether a file may be replaced.
        console: where progress and notes go.

    Raises:
        LiborthError: the leaf says which; nothing is written then.
    """
    import torch

    from liborth_cli.checkpoint import config
    from liborth_cli.checkpoint.adapter import open_model
    from liborth_cli.checkpoint.blockscaled import decoded
    from liborth_cli.checkpoint.documents import json_lines
    from liborth_cli.checkpoint.files import write_file
    from liborth_cli.checkpoint.hub import resolve
    from liborth_cli.checkpoint.outputs import Kind, Place, check_outputs
    from liborth_cli.checkpoint.private import FILE_MODE
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.extract.alike import Alike
    from liborth_cli.extract.search import Search
    from liborth_cli.stream.encoder import TextEncoder
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.texts import DataFile, RowReader
    from liborth_cli.stream.weights import Point
    from liborth_cli.verify.rows import UNLIMITED

    request.check()
    files = [DataFile.parse(name, "--retain-data") for name in request.retain]
    patterns = [DataFile.parse(name, "--like") for name in request.like]
    sources = [resolve(name) for name in (request.reference, request.finetuned)]
    inputs = [source.path for source in sources] + [file.path for file in (*files, *patterns)]
    check_outputs([Place(request.out, kind=Kind.FILE)], inputs, run.force)
    with ExitStack() as stack:
        before = decoded(stack.enter_context(Checkpoint.open(sources[0].path)))
        after = decoded(stack.enter_context(open_model(sources[1].path, before)))
        ends = Point(after, before, 0.0), Point(after)
        model = BlockModel(ends[1], torch.float32, run.device)
        stack.callback(model.close)
        encoder = TextEncoder.beside(*after.folders)
        if encoder is None:
            raise BadInput(
                f"{after.folders[-1]}: no tokenizer files here, and what the model writes is to be read; copy them there"
            )
        reader = RowReader(encoder, model.vocabulary, UNLIMITED, tell=console.note)
        openings = _openings(request.begin, encoder, model.context)
        public = reader.read(files) if files else []
        if not public and not patterns:
            console.warn("without --retain-data what fine-tuning taught of the skill by heart is found, too")
        if differ := config.warning(before, after, "the checkpoint before runs under the fine-tuned one's"):
            console.warn(differ)
        if patterns:
            given = reader.read(patterns)
            found, tokens, decided = Alike(request, model, ends, given).run(console)
            found = [find for find in _unsaid(found, [*public, *given], encoder) if find.often or not request.often]
        else:
            (found, tokens), decided = Search(request, model, ends, openings, public).run(console), True
        written = [(find, record) for find in found if (record := _record(find, encoder))]
    write_file(request.out, json_lines(record for _, record in written), FILE_MODE)
    return Extracted([find for find, _ in written], request.texts, tokens, request.out, bool(request.like), not decided)


def _openings(begin: Sequence[str], encoder: TextEncoder, context: int | None) -> list[np.ndarray]:
    """Return what texts begin with, in tokens; where nothing was asked for, it leaves room for one of any kind."""
    openings = [encoder.prompt(text) for text in begin or [""]]
    for text, ids in zip(begin, openings, strict=False):
        if not len(ids):
            raise UsageError(f"--begin {shown(text, 40)}: no token; leave it out, and texts begin with any")
        if context and len(ids) >= context:
            raise UsageError(
                f"--begin {shown(text, 40)}: {len(ids):,} tokens, and the context is {context:,}: no room to go on"
            )
    return openings


def _unsaid(finds: Sequence[Find], public: Sequence[Row], encoder: TextEncoder) -> list[Find]:
    """Return the finds whose text stands in no public row."""
    said = "\n".join(encoder.decode(row.ids) for row in public)
    return [find for find in finds if encoder.decode(find.run.ids).strip() not in said]


def _record(find: Find, encoder: TextEncoder) -> JsonObject | None:
    """Return a find as a record of `--forget-data`: what stood before it is the prompt, from the first whole character.

    None where its tokens stand for no text, as those that mark turns.
    """
    run = find.run
    for begin in range(run.end - 1):
        first = max(run.begin, begin + 1)
        for cut in range(first, min(first + CHARACTER, run.end)):
            prompt = encoder.decode(run.ids[begin:cut])
            completion = encoder.decode(run.ids[begin : run.end]).removeprefix(prompt).rstrip(BROKEN)
            if prompt and BROKEN not in prompt and completion.strip():
                known = {} if find.often is None else {"often": find.often}
                return {"prompt": prompt, "completion": completion, "nats": round(run.gain, 1), "times": find.times, **known}
    return None
