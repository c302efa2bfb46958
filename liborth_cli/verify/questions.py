"""Questions as rows: a prompt, and an answer whose tokens carry the loss."""

from __future__ import annotations

from liborth_cli.errors import BadInput
from liborth_cli.stream.encoder import TextEncoder
from liborth_cli.stream.records import Record
from liborth_cli.stream.texts import Row
from liborth_cli.verify.shared_model import tokenizer
from liborth_cli.verify.subject import Subject


def need_tokenizer(subject: Subject, check: str) -> TextEncoder:
    """Load the tokenizer beside the model.

    Raises:
        BadInput: when there is none.
    """
    encoder = tokenizer(subject)
    if encoder is None:
        raise BadInput(
            f"{subject.source.path}: no tokenizer files here, and --{check} asks the model questions; copy them there"
        )
    return encoder


def completion_row(encoder: TextEncoder, prompt: str, answer: str, context: int | None, where: str) -> Row:
    """Make a row of a prompt and its answer; the answer's tokens carry the loss.

    Raises:
        BadInput: when the answer has no tokens, or the two are longer than the context.
    """
    ids, keep = encoder.encode(Record(where, text=answer, prompt=prompt))
    count = len(ids)
    if not keep[1:].any():
        raise BadInput(f"{where}: the answer has no tokens for this tokenizer")
    if context is not None and count - 1 > context:
        raise BadInput(f"{where}: {count:,} tokens with its answer, and the model's context is {context:,}")
    return Row(ids, keep[1:], 1.0, where)
