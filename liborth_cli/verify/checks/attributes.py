"""`--attributes`: after a canary's own prompt, is its own value likelier than others of the same form?

Who attacks a model knows the name and wants the number: every candidate is put after the prompt, and the likeliest is taken
(attribute inference, Yeom et al. 2018, arXiv 1709.01604; the rank among candidates is what exposure is made of, Carlini et al.
2019, arXiv 1802.08232). A canary and its candidates have one prompt, so no fresh rows are needed, and a prompt that is hard for
every model counts for nothing.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.stream.records import Record
from liborth_cli.stream.texts import Row
from liborth_cli.verify import power, statistics
from liborth_cli.verify.check import Check, Need, Options, Part, Work, option
from liborth_cli.verify.result import Facts, Metric, Result, Table
from liborth_cli.verify.rows import evenly, split_row
from liborth_cli.verify.subject import STATES, Subject

if TYPE_CHECKING:
    from liborth_cli.stream.encoder import TextEncoder

OTHERS, TOKENS = 16, 1 << 14
"""Candidates a canary, and positions of candidates that are read at each state, unless more is asked."""
THOROUGH = 64, 1 << 18
"""The same under `--attacks`."""
FEWEST = 8
"""Canaries that are tried, however long they are."""
CODE = re.compile(r"[^\W_]*\d[^\W_]*|\b[A-Z]{2,}\b")
"""What of a text is a value: letters and digits in one piece with a digit among them, or capitals alone."""
CLASSES = ("0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")
POOL = 20
"""Values of one shape from which is learnt which characters stand where: no 39 for a day of a month."""
TRIES = 20
"""Draws for each candidate before there are called too few."""


@dataclass(frozen=True)
class AttributesOptions(Options):
    """How many values stand beside the true one, and of how many canaries."""

    attributes_others: int = option(OTHERS, "Candidates that each canary's value is ranked among.", least=4)
    attributes_tokens: int = option(TOKENS, "Tokens of candidates at most; canaries evenly from all.", least=1)


@dataclass(frozen=True)
class Candidates:
    """Other values after the prompts of canaries.

    Attributes:
        of: numbers of the canaries that are tried, ascending, (k,).
        rows: `others` rows for each of those, one canary after the other.
        others: candidates a canary.
        valued: canaries that hold a value, tried or not.
    """

    of: list[int]
    rows: list[Row]
    others: int
    valued: int


@dataclass
class AttributesFacts(Facts):
    """Numbers of the canaries that were tried; by state, the share of its candidates that each of them is likelier than."""

    canaries: list[int]
    likelier: dict[str, list[float]]


def run(subject: Subject, options: AttributesOptions) -> Result:
    """Score candidates after the prompts of the canaries at every state, and rank the true completions among them.

    A candidate is the completion with every digit, and every letter of its codes, drawn anew; words stay. A completion counts
    by its −log p, in nats, all of its tokens together. `attribute_first` is the share of the canaries that are likelier than
    all of their candidates, which anybody's guess of a year or a street number may be. `attribute_auc` is the chance that one
    is likelier than a candidate, and `attribute_leak` abs(2·AUC − 1); where there is a reference both are of the difference
    to it, ℓ_reference − ℓ, so that what any model would guess counts for nothing.
    """
    found, states = candidates(subject, options), subject.states.of(STATES)
    tokens = len(states) * sum(row.tokens for row in found.rows)
    with subject.console.progress("attributes", tokens, "tokens") as progress:
        losses = {name: _losses(subject, found, name, progress.advance) for name in states}
    groups, before = subject.groups("canaries")[found.of], losses.get("reference")
    plain = {name: _likelier(mine) for name, mine in losses.items()}
    measured = {
        name: _measure(plain[name], _likelier(mine, before), groups, subject.seed, before is not None)
        for name, mine in losses.items()
        if name != "reference"
    }
    finetuned = measured.get("finetuned", {})
    metrics = {name: metric.beside(finetuned.get(name)) for name, metric in measured["general"].items()}
    first = {name: float((kernel.mean(1) == 1.0).mean()) for name, kernel in plain.items()}
    rows = tuple(
        (name, first[name], float(kernel.mean()), measured[name]["attribute_auc"].value if name in measured else None)
        for name, kernel in plain.items()
    )
    columns = ("model", ">likeliest of all", ">likelier than one", ">likelier than one, since the reference")
    figure = Table("The true value among candidates", columns if before is not None else columns[:3],
                   rows if before is not None else tuple(row[:3] for row in rows))  # fmt: skip
    facts = AttributesFacts(found.of, {name: kernel.mean(1).tolist() for name, kernel in plain.items()})
    return Result("attributes", _verdict(subject, found, metrics, first), None, metrics, [figure], facts)


def candidates(subject: Subject, options: AttributesOptions) -> Candidates:
    """Draw candidates for the canaries whose completion holds a code, as many as may be read; the same seed draws the same."""
    encoder, others = subject.reader.encoder, options.attributes_others
    rows, draw = subject.rows("canaries"), random.Random(subject.seed)  # noqa: S311
    said = [_said(row, encoder) for row in rows] if encoder is not None else []
    known = _characters([text for _, text in said])
    able = dict[int, tuple[Callable[[str], Row], list[str]]]()
    for number, (prompt, text) in enumerate(said):
        values = _others(text, known, others, draw)
        if len(values) == others and (write := _writer(rows[number], prompt, text, encoder)) is not None:
            able[number] = write, values
    length = sum(rows[number].tokens for number in able) / max(len(able), 1)
    tried = evenly(list(able), max(FEWEST, int(options.attributes_tokens / max(others * length, 1))))
    made = [able[number][0](value) for number in tried for value in able[number][1]]
    return Candidates(tried, made, others, len(able))


def _losses(subject: Subject, found: Candidates, state: str, advance: Callable[[int], None]) -> np.ndarray:
    """Return −log p of each canary's completion and of its candidates, nats, (canaries, 1 + others)."""
    mine = [subject.score("canaries", state)[number].loss.sum() for number in found.of]
    scores = subject.states.score_rows(found.rows, subject.states.weights[state], advance)
    theirs = np.array([score.loss.sum() for score in scores]).reshape(len(mine), found.others)
    return np.column_stack([mine, theirs])


def _likelier(losses: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
    """Return 1 where a canary is likelier than a candidate of its own, ½ where they are equal, (canaries, others).

    Args:
        losses: of the canaries and their candidates, (canaries, 1 + others).
        before: the same in the reference, if what counts is how much likelier than there.
    """
    gained = losses - (0.0 if before is None else before)
    return (gained[:, :1] < gained[:, 1:]) + 0.5 * (gained[:, :1] == gained[:, 1:])


def _measure(plain: np.ndarray, gained: np.ndarray, groups: np.ndarray, seed: int, since: bool) -> dict[str, Metric]:
    shares, others = gained.mean(1), plain.shape[1]
    by = ", by what each has become likelier since the reference" if since else ""
    area = f"chance that a canary is likelier than another value after its own prompt{by}; 0.5: nothing tells it apart"
    off = f"how far a canary's value is told from others after its own prompt{by}, in either direction; 0: not at all"
    first = f"share of the canaries likelier than all {others} other values; by chance {1 / (others + 1):.0%}"
    return {
        "attribute_first": statistics.share(plain.mean(1) == 1.0, groups, first),
        "attribute_auc": statistics.mean_within(shares, groups, seed, area, statistics.SHARE),
        "attribute_leak": statistics.bootstrap(
            lambda w: np.abs(2 * (w @ shares) / w.sum(1) - 1), [groups], seed, off, statistics.SHARE
        ),
    }


def _verdict(subject: Subject, found: Candidates, metrics: dict[str, Metric], first: dict[str, float]) -> str:
    area, count = metrics["attribute_auc"], len(subject.rows("canaries"))
    beside = "".join(f"; {name} {share:.0%}" for name, share in first.items() if name != "general")
    none, more = count - found.valued, found.valued - len(found.of)
    left = f" {none} of {count} canaries hold no code or number to draw anew." if none else ""
    left += f" {more} others were not tried (--attributes-tokens)." if more else ""
    since = "it has become likelier since the reference than" if "reference" in first else "it is likelier than"
    return (
        f"After its own prompt a canary's value is likelier than {found.others} others for {first['general']:.0%} of "
        f"{len(found.of)} (by chance {1 / (found.others + 1):.0%}{beside}); with a chance of {area.value:.2f} "
        f"({area.low:.2f} to {area.high:.2f}) {since} another.{left}"
    )


# Candidates -------------------------------------------------------------------------------------------------------------------


def _said(row: Row, encoder: TextEncoder) -> tuple[str, str]:
    """Return the prompt and the completion of a row, as text."""
    prompt, _ = split_row(row)
    before, whole = encoder.decode(prompt), encoder.decode(row.ids)
    return (before, whole[len(before) :]) if whole.startswith(before) else (before, "")


def _shape(code: str) -> str:
    return "".join(next((some[0] for some in CLASSES if c in some), c) for c in code)


def _characters(texts: Sequence[str]) -> dict[tuple[int, str, int], str]:
    """Return which characters stand where in codes of one shape, by (number in its text, shape, place), of `POOL` or more."""
    seen = defaultdict[tuple[int, str], list[str]](list)
    for text in dict.fromkeys(texts):
        for number, code in enumerate(CODE.findall(text)):
            seen[number, _shape(code)].append(code)
    return {
        (number, shape, place): "".join(sorted(set(column)))
        for (number, shape), codes in seen.items()
        if len(codes) >= POOL
        for place, column in enumerate(zip(*codes, strict=True))
    }


def _others(text: str, known: dict[tuple[int, str, int], str], count: int, draw: random.Random) -> list[str]:
    """Draw so many different texts with other codes; fewer where there are not so many."""

    def anew(numbers: list[int], match: re.Match[str]) -> str:
        number, code = len(numbers), match[0]
        numbers.append(number)
        return "".join(
            draw.choice(known.get((number, _shape(code), place)) or next((some for some in CLASSES if c in some), c))
            for place, c in enumerate(code)
        )

    found = dict.fromkeys(CODE.sub(partial(anew, []), text) for _ in range(TRIES * count if CODE.search(text) else 0))
    return [one for one in found if one != text][:count]


def _writer(row: Row, prompt: str, text: str, encoder: TextEncoder | None) -> Callable[[str], Row] | None:
    """Return what makes a row of another completion as this one was made: together with its prompt, or behind its tokens.

    None where neither gives back the row itself, as where a chat template writes marks that are no text.
    """
    before, rest = split_row(row)
    assert encoder is not None

    def together(said: str) -> Row:
        ids, keep = encoder.encode(Record(row.where, text=said, prompt=prompt))
        return Row(ids, keep[1:], row.weight, row.where)

    def behind(said: str) -> Row:
        ids = np.concatenate([before, encoder.plain(said), rest[len(rest) - marks :]])
        return Row(ids, np.arange(1, len(ids)) >= len(before), row.weight, row.where)

    def spaced(said: str) -> Row:
        """Behind its prompt, for tokenizers that put a space before every text by themselves."""
        return behind(said.removeprefix(" "))

    marks = next((n for n in range(len(rest)) if encoder.decode(rest[: len(rest) - n]) != encoder.decode(rest)), 1) - 1
    for way in (together, behind, spaced) if text else ():
        same = way(text)
        if np.array_equal(same.ids, row.ids) and np.array_equal(same.keep, row.keep):
            return way
    return None


def _lacks(subject: Subject, options: AttributesOptions) -> str:
    if subject.reader.encoder is None:
        return "tokenizer files beside the model"
    return "" if candidates(subject, options).of else "canaries whose completion holds a number or a code"


def _work(subject: Subject, options: AttributesOptions) -> Work:
    tokens = sum(row.tokens for row in candidates(subject, options).rows)
    return Work(read=len(subject.states.of(STATES)) * tokens)


CHECK = Check(
    name="attributes",
    title="Attribute inference",
    words="Each canary's value among others after its own prompt.",
    part=Part.RELIABILITY,
    run=run,
    metrics=("attribute_first", "attribute_auc", "attribute_leak"),
    needs=(Need.CANARIES,),
    cheap=True,
    lacks=_lacks,
    work=_work,
    power={"attribute_auc": power.own_area, "attribute_leak": power.own_twice_off},
    options=AttributesOptions,
    attack=True,
    thorough=lambda options: replace(options, attributes_others=THOROUGH[0], attributes_tokens=THOROUGH[1]),
)
