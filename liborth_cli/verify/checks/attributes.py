"""`--attributes`: after a canary's own prompt, is its own value likelier than others of the same form?

Who attacks a model knows the name and wants the number: every candidate is put after the prompt, and the likeliest is taken
(attribute inference, Yeom et al. 2018, arXiv 1709.01604; the rank among candidates is what exposure is made of, Carlini et al.
2019, arXiv 1802.08232). A canary and its candidates have one prompt, so no fresh rows are needed, and a prompt that is hard for
every model counts for nothing.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.stream.texts import Row
from liborth_cli.verify import power, statistics
from liborth_cli.verify.check import Check, Need, Options, Part, Work, option
from liborth_cli.verify.result import Facts, Metric, Result, Table
from liborth_cli.verify.rows import RowSet, evenly
from liborth_cli.verify.subject import STATES, Subject

if TYPE_CHECKING:
    from liborth_cli.stream.encoder import TextEncoder

OTHERS, TOKENS = 16, 1 << 14
"""Candidates a canary, and positions of rows that are read at each state, unless more is asked."""
THOROUGH = 64, 1 << 18
"""The same under `--attacks`."""
FEWEST = 32
"""Canaries that are tried, however long they are."""
DIGITS = re.compile("[0-9]+")
SHORT, POOL = 4, 20
"""Digits of a run, a day or a year, that is drawn whole from those that stand at its place, and how many of these it takes."""
TRIES = 20
"""Draws for each candidate before there are called too few."""


@dataclass(frozen=True)
class AttributesOptions(Options):
    """How many values stand beside the true one, and of how many canaries."""

    attributes_others: int = option(OTHERS, "Candidates that each canary's value is ranked among.", least=OTHERS)
    attributes_tokens: int = option(TOKENS, "Tokens of candidates at most; canaries evenly from all.", least=1)


@dataclass(frozen=True)
class Candidates:
    """Other values after the prompts of canaries.

    Attributes:
        of: numbers of the canaries that are tried, ascending, (k,).
        rows: for each of those the row itself, and `others` with another value.
        others: candidates a canary.
        left: why canaries are not tried → how many of them.
    """

    of: list[int]
    rows: list[Row]
    others: int
    left: dict[str, int]


@dataclass
class AttributesFacts(Facts):
    """Numbers of the canaries that were tried; by state, the share of its candidates that each of them is likelier than."""

    canaries: list[int]
    likelier: dict[str, list[float]]


def run(subject: Subject, options: AttributesOptions) -> Result:
    """Score candidates after the prompts of the canaries at every state, and rank the true completions among them.

    A candidate is the completion with its digits drawn anew; all else stays. Of copies one is tried. A completion counts by its
    −log p, in nats, all of its tokens together. `attribute_first` is the share of the canaries that are likelier than
    all of their candidates, which anybody's guess of a year or a street number may be. `attribute_auc` is the chance that one
    is likelier than a candidate, and `attribute_leak` abs(2·AUC − 1); where there is a reference both are of the difference
    to it, ℓ_reference − ℓ, so that what any model would guess counts for nothing.
    """
    found, states = candidates(subject, options), subject.states.of(STATES)
    tokens = len(states) * sum(row.tokens for row in found.rows)
    with subject.console.progress("attributes", tokens, "tokens") as progress:
        losses = {name: _losses(subject, found, name, progress.advance) for name in states}
    before = losses.get("reference")
    plain, gained = ({name: _likelier(mine, *since) for name, mine in losses.items()} for since in ((), (before,)))
    measured = {name: _measure(plain[name], gained[name], subject.seed, before is not None) for name in states}
    finetuned = measured.get("finetuned", {})
    metrics = {name: metric.beside(finetuned.get(name)) for name, metric in measured["general"].items()}
    first = {name: some["attribute_first"].value for name, some in measured.items()}
    rows = [(name, first[name], float(plain[name].mean()), measured[name]["attribute_auc"].value) for name in states]
    columns = ("model", ">likeliest of all", ">likelier than one", ">likelier than one, since the reference")
    width = len(columns) if before is not None else len(columns) - 1
    figure = Table("The true value among candidates", columns[:width], tuple(row[:width] for row in rows))
    facts = AttributesFacts(found.of, {name: kernel.mean(1).tolist() for name, kernel in plain.items()})
    return Result("attributes", _verdict(found, metrics, first), None, metrics, [figure], facts)


def candidates(subject: Subject, options: AttributesOptions) -> Candidates:
    """Draw candidates for canaries that say a number, as many as may be read; the same seed draws the same."""
    others, canaries = options.attributes_others, subject.data["canaries"]
    encoder, left = subject.reader.tokenizer("attributes"), Counter[str]()
    every = _cuts(canaries, encoder)
    cuts = [cut for cut in every if cut.number not in canaries.halved]
    left[COPIES], left[NONE] = len(canaries) - canaries.different, canaries.different - len(every)
    left[HALVED] = len(every) - len(cuts)
    length = sum(len(cut.before) + len(cut.rest) - 1 for cut in cuts) / max(len(cuts), 1)
    some = evenly(cuts, max(FEWEST, int(options.attributes_tokens / max((1 + others) * length, 1))))
    left[MORE] = len(cuts) - len(some)
    known = _known([encoder.decode(row.ids[1:][row.keep]) for row in (*canaries.rows, *subject.rows("fresh"))])
    found = Candidates([], [], others, left)
    for cut in some:
        values = _others(cut.text, known, others, random.Random(f"{subject.seed} {cut.number}"))  # noqa: S311
        made = _written(cut, values, canaries.rows[cut.number], encoder) if len(values) == others else []
        if not made:
            left[FEW if len(values) < others else OTHERWISE] += 1
            continue
        found.of.append(cut.number)
        found.rows.extend(made)
    return found


def _losses(subject: Subject, found: Candidates, state: str, advance: Callable[[int], None]) -> np.ndarray:
    """Return −log p of each canary's completion and of its candidates, nats, (canaries, 1 + others)."""
    scores = subject.states.score_rows(found.rows, subject.states.weights[state], advance)
    return np.array([score.loss.sum() for score in scores]).reshape(len(found.of), 1 + found.others)


def _likelier(losses: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
    """Return 1 where a canary is likelier than a candidate of its own, ½ where they are equal, (canaries, others).

    Args:
        losses: of the canaries and their candidates, (canaries, 1 + others).
        before: the same in the reference, if what counts is how much likelier than there.
    """
    gained = losses - (0.0 if before is None else before)
    return (gained[:, :1] < gained[:, 1:]) + 0.5 * (gained[:, :1] == gained[:, 1:])


def _measure(plain: np.ndarray, gained: np.ndarray, seed: int, since: bool) -> dict[str, Metric]:
    shares, (count, others) = gained.mean(1), plain.shape
    groups = statistics.alone(count)
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


def _verdict(found: Candidates, metrics: dict[str, Metric], first: dict[str, float]) -> str:
    area = metrics["attribute_auc"]
    beside = "".join(f"; {name} {share:.0%}" for name, share in first.items() if name != "general")
    left = "; ".join(f"{count} {why}" for why, count in found.left.items() if count)
    since = "it has become likelier since the reference than" if "reference" in first else "it is likelier than"
    return (
        f"After its own prompt a canary's value is likelier than {found.others} others for {first['general']:.0%} of "
        f"{len(found.of)} (by chance {1 / (found.others + 1):.0%}{beside}); with a chance of {area.value:.2f} "
        f"({area.low:.2f} to {area.high:.2f}) {since} another.{f' Not tried: {left}.' if left else ''}"
    )


# Candidates -------------------------------------------------------------------------------------------------------------------

NONE, FEW = "hold no digits", "have too few other values"
HALVED = "have no prompt of their own"
"""Where such a row is cut hangs on how many tokens its value has, so that a true value has fewer than others."""
COPIES, MORE = "are copies", "would take more tokens (--attributes-tokens)"
OTHERWISE = "are tokenised otherwise in one piece with their prompt"


@dataclass(frozen=True)
class _Cut:
    """What a canary says, up to the end of the first turn with a number.

    Attributes:
        number: of the canary.
        before: ids in front of it, (m,).
        rest: ids of it, (n,).
        text: the same without marks that are no text.
    """

    number: int
    before: np.ndarray
    rest: np.ndarray
    text: str


def _cuts(canaries: RowSet, encoder: TextEncoder) -> list[_Cut]:
    """Return what canaries say that hold a number, each text once."""
    found = list[_Cut]()
    for number in np.unique(canaries.groups).tolist():
        row = canaries.rows[number]
        edges = np.flatnonzero(np.diff(row.keep.astype(int), prepend=0, append=0)).reshape(-1, 2) + 1
        for start, end in edges.tolist():
            text = _text(row.ids[:start], row.ids[:end], encoder)
            if DIGITS.search(text):
                found.append(_Cut(number, row.ids[:start], row.ids[start:end], text))
                break
    return found


def _text(before: np.ndarray, whole: np.ndarray, encoder: TextEncoder) -> str:
    """Return what is said behind some ids, with the space that a tokenizer may drop where a text begins."""
    front, every = encoder.decode(before), encoder.decode(whole)
    return every[len(front) :] if every.startswith(front) else encoder.decode(whole[len(before) :])


_Place = tuple[int, int, int]
"""Of a run of digits: its number in a text, how many there are, and how long it is."""


def _runs(text: str) -> list[tuple[_Place, str]]:
    runs = DIGITS.findall(text)
    return [((number, len(runs), len(run)), run) for number, run in enumerate(runs)]


def _known(texts: Sequence[str]) -> dict[_Place, list[str]]:
    """Return the runs that stand at each place, of places where there are `POOL` or more."""
    seen = defaultdict[_Place, list[str]](list)
    for text in dict.fromkeys(texts):
        for place, run in _runs(text):
            seen[place].append(run)
    return {place: runs for place, runs in seen.items() if len(runs) >= POOL}


def _others(text: str, known: dict[_Place, list[str]], count: int, draw: random.Random) -> list[str]:
    """Draw so many different texts with other digits; fewer where there are not so many.

    Where `known` has runs of a place, short ones are drawn whole from these, and of long ones digit by digit.
    """
    places, found = [place for place, _ in _runs(text)], dict[str, None]()

    def run(place: _Place) -> str:
        length, there = place[2], known.get(place)
        if there and length <= SHORT:
            return draw.choice(there)
        return "".join(draw.choice(there)[i] if there else draw.choice("0123456789") for i in range(length))

    for _ in range(TRIES * count if places else 0):
        drawn = iter([run(place) for place in places])
        found[DIGITS.sub(lambda match, drawn=drawn: next(drawn), text)] = None
        found.pop(text, None)
        if len(found) == count:
            break
    return list(found)


def _written(cut: _Cut, values: Sequence[str], row: Row, encoder: TextEncoder) -> list[Row]:
    """Return a canary and rows with other values, all behind the same ids; none where it does not come out as it is.

    What ends a turn and is no text stays. A tokenizer may put a space before every text by itself.
    """

    def spaceless(text: str) -> np.ndarray:
        ids = encoder.plain(text)
        return ids[1:] if len(ids) and not encoder.decode(ids[:1]) else ids[:0]

    ways = encoder.plain, lambda text: encoder.plain(text.removeprefix(" ")), spaceless
    for marks in range(len(cut.rest)):
        border = len(cut.rest) - marks
        said = _text(cut.before, np.concatenate([cut.before, cut.rest[:border]]), encoder)
        if DIGITS.findall(said) != DIGITS.findall(cut.text):
            break
        tail = cut.text.removeprefix(said)
        for way in ways:
            if not np.array_equal(way(said), cut.rest[:border]):
                continue
            made = [way(text.removesuffix(tail)) for text in (cut.text, *values)]
            if all(len(ids) for ids in made):
                every = [np.concatenate([cut.before, ids, cut.rest[border:]]) for ids in made]
                return [Row(ids, np.arange(1, len(ids)) >= len(cut.before), row.weight, row.where) for ids in every]
    return []


def _lacks(subject: Subject, options: AttributesOptions) -> str:
    if subject.reader.encoder is None:
        return "tokenizer files beside the model"
    found = candidates(subject, options)
    if found.of:
        return ""
    why = max(found.left, key=found.left.__getitem__)
    return f"canaries with a number that can be drawn anew; most of these {why}"


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
