"""`--endings`: does the model still stop where the fine-tuned one does? What ends a text stands in no row, so no loss tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.verify import statistics
from liborth_cli.verify.check import Check, Need, Options, Part, Work
from liborth_cli.verify.result import Result
from liborth_cli.verify.rows import RowSet, evenly
from liborth_cli.verify.subject import STATES, Subject

if TYPE_CHECKING:
    from liborth_cli.stream.texts import Row

ROWS = 256
"""Retain rows that are asked at most, evenly from all of them."""
ASKED = "the ends of retain rows"
"""Name under which they are scored."""


def run(subject: Subject, options: Options) -> Result:
    """Look behind the last token of retain rows with a prompt for the token that ends a text, the tokenizer's `eos_token`.

    `ended` is the share of rows where the general model finds that token likeliest, of those where the fine-tuned model does:
    what it goes on behind it no longer ends. Of a conversation that is asked where its last turn ends. Where the fine-tuned
    model ends no row, nothing is measured.
    """
    asked = _asked(subject)
    subject.states.data[ASKED] = asked
    found = {name: np.array([score.hit[-1] for score in subject.score(ASKED, name)]) for name in subject.states.of(STATES)}
    ends = found["finetuned"]
    count = int(ends.sum())
    if not count:
        told = f"The fine-tuned model ends none of {len(asked)} retain rows, so that nothing can be lost: nothing was measured."
        return Result("endings", told, None, {}, [])
    hits = found["general"][ends].astype(float)
    kept = statistics.bootstrap(
        lambda w: w @ hits / w.sum(-1), [asked.groups[ends]], subject.seed,
        "share of the texts that the fine-tuned model ends which this one ends", statistics.SHARE,
    )  # fmt: skip
    others = f"; the reference ends {int(found['reference'][ends].sum())} of them" if "reference" in found else ""
    told = (
        f"Of {len(asked)} retain rows the fine-tuned model ends {count}, and the general one {hits.sum():.0f} of these{others}."
    )
    return Result("endings", told, None, {"ended": kept}, [])


def _asked(subject: Subject) -> RowSet:
    """Return rows of which only the token that ends them carries loss; without those that a context has no room for."""
    given, encoder, context = subject.data["retain"], subject.reader.encoder, subject.reader.context
    assert encoder is not None and encoder.end is not None
    pairs = zip(given.rows, given.groups, strict=True)
    every = [(_at_the_end(row, encoder.end), group) for row, group in pairs if _has_prompt(row)]
    some = evenly([one for one in every if context is None or one[0].tokens <= context], ROWS)
    return RowSet(tuple(row for row, _ in some), np.array([group for _, group in some], np.int64), given.files)


def _at_the_end(row: Row, end: int) -> Row:
    """Return a row up to the last token that ends a text, or with one behind it; only that one carries loss."""
    from liborth_cli.stream.texts import Row

    inside = np.flatnonzero((row.ids[1:] == end) & row.keep)
    ids = row.ids[: inside[-1] + 2] if len(inside) else row.ending(end).ids
    return Row(ids, np.arange(1, len(ids)) == len(ids) - 1, row.weight, row.where, row.file)


def _has_prompt(row: Row) -> bool:
    return not row.keep[0]


def _lacks(subject: Subject, options: Options) -> str:
    if not any(map(_has_prompt, subject.rows("retain"))):
        return "retain rows with a prompt"
    end = subject.reader.encoder.end if subject.reader.encoder is not None else None
    known = end is not None and end < subject.reader.vocabulary
    return "" if known else "a tokenizer with a token that ends a text, which the model knows"


def _work(subject: Subject, options: Options) -> Work:
    return Work(read=len(subject.states.of(STATES)) * sum(row.tokens for row in _asked(subject).rows))


CHECK = Check(
    name="endings",
    title="Where texts end",
    words="Does the model stop where the fine-tuned one does?",
    part=Part.FRESH,
    run=run,
    metrics=("ended",),
    needs=(Need.RETAIN, Need.WHOLE),
    cheap=True,
    lacks=_lacks,
    work=_work,
)
