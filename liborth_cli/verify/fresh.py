"""Whether the rows that are called never-trained can be: a control that was itself trained on makes a leak look small."""

from __future__ import annotations

import numpy as np

from liborth_cli.errors import BadInput
from liborth_cli.verify.memorisation import verbatim
from liborth_cli.verify.subject import Need, Subject

GUESS = 10.0
"""Nats of a whole completion, by the model before fine-tuning, that are not guessed: one chance in 22,000."""
SHARE = 0.5
"""Share of the canaries' drop in loss from which the fresh rows' own drop is said."""


def check_fresh(subject: Subject) -> None:
    """Refuse fresh rows that the fine-tuned model was trained on, where the models before and after are there to tell.

    It recites such a row, and the model before it would have had to guess: more than `GUESS` nats lie between the two.

    Raises:
        BadInput: when there are such rows; names the first, never what it says.
    """
    if not _can_tell(subject):
        return
    before, after = subject.score("fresh", "reference"), subject.score("fresh", "finetuned")
    known = [
        row
        for row, old, new in zip(subject.rows("fresh"), before, after, strict=True)
        if verbatim(new) and not verbatim(old) and old.loss.sum() - new.loss.sum() > GUESS
    ]
    if known:
        raise BadInput(
            f"--fresh: {known[0].where}: the fine-tuned model recites it and the reference does not, so it was trained on "
            f"({len(known)} of {len(before)} rows are like this); beside such rows a leak looks small: take them out"
        )


def weakness(subject: Subject) -> str:
    """Say what weakens a comparison with the fresh rows, in words for the first line of a certificate; "" when nothing does.

    Fine-tuning may have made them nearly as much likelier as the canaries: their form was learned, or they were.
    """
    if not (subject.has(Need.CANARIES) and _can_tell(subject)):
        return ""
    fresh, canaries = (_drop(subject, rows) for rows in ("fresh", "canaries"))
    if canaries <= 0 or fresh < SHARE * canaries:
        return ""
    return f"beside fresh rows that fine-tuning made {fresh:.1f} nats a token likelier (the canaries: {canaries:.1f})"


def _can_tell(subject: Subject) -> bool:
    return subject.has(Need.FRESH) and {"reference", "finetuned"} <= set(subject.states.weights)


def _drop(subject: Subject, rows: str) -> float:
    """Return the median, over rows, of the mean loss a token that fine-tuning took away, in nats."""
    pairs = zip(subject.score(rows, "reference"), subject.score(rows, "finetuned"), strict=True)
    return float(np.median([old.loss.mean() - new.loss.mean() for old, new in pairs]))
