"""The page of a certificate: what stands where is in page.html, and here is what each part of it says."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from liborth_cli import __version__, chart
from liborth_cli.chart.axes import number
from liborth_cli.console import clean
from liborth_cli.verify.check import Part
from liborth_cli.verify.checks import CHECKS
from liborth_cli.verify.report.figures import NARROW, TALL, Place, Shades, breakable, cells, panels, places, short_number
from liborth_cli.verify.report.forms import CAVEAT, documentation_entries, extraction_entries
from liborth_cli.verify.report.summary import GLOSSARY, LIMITS, answers, interval, lead_chart, title_of
from liborth_cli.verify.result import Certificate, Metric, Outcome, Requirement, Result

DIGITS = 9  # of the numbers in the downloads: more than float32 holds
GOOD, BAD, NEUTRAL = "good", "bad", "neutral"
KINDS = {Outcome.PASSED: GOOD, Outcome.FAILED: BAD, Outcome.UNDECIDED: NEUTRAL}
FOLD = 3  # lines of a list of files that stand open
MET = {True: (GOOD, "met"), False: (BAD, "not met"), None: (NEUTRAL, "undecided")}


@dataclass(frozen=True)
class Banner:
    """The verdict on top of the page.

    Attributes:
        kind: GOOD, BAD or NEUTRAL: the colour and the sign.
        word: "Passed", "Failed" or "No decision".
        sentences: the main finding first; nothing that the page says again right below.
    """

    kind: str
    word: str
    sentences: list[str]


@dataclass(frozen=True)
class Section:
    """One check on the page.

    Attributes:
        index: its place, for links.
        title: its heading.
        kind: GOOD, BAD or NEUTRAL.
        words: what came of it: "passed", "requirement not met".
        missed: the requirements that are not met.
        verdict: the whole finding.
        metrics: its numbers by name.
        places: its figures.
    """

    index: int
    title: str
    kind: str
    words: str
    missed: list[str]
    verdict: str
    metrics: dict[str, Metric]
    places: list[Place]

    @property
    def inside(self) -> str:
        """What unfolds below the finding: "3 metrics, 2 figures"; "" when there is nothing."""
        counts = ((len(self.metrics), "metric"), (len(self.places), "figure"))
        return ", ".join(f"{count} {thing}{'' if count == 1 else 's'}" for count, thing in counts if count)


@dataclass(frozen=True)
class Chapter:
    """Sections under one heading.

    Attributes:
        title: the heading.
        question: what they answer; "" where nobody said.
        sections: at least one.
    """

    title: str
    question: str
    sections: list[Section]


def render_page(certificate: Certificate) -> str:
    """Write the whole page; the same certificate gives the same text."""
    style, script = chart.style() + _file("style.css"), _file("script.js")
    indices = {result.check: i for i, result in reversed(list(enumerate(certificate.results)))}
    return _template().render(
        subject=certificate.subject,
        about=certificate.about,
        banner=_banner(certificate),
        answers=answers(certificate),
        chart=lead_chart(certificate),
        requirements=certificate.requirements,
        index_of=indices,
        chapters=_chapters(certificate),
        measured_on=_rows(certificate),
        extraction=extraction_entries(certificate),
        documentation=documentation_entries(certificate),
        caveat=CAVEAT,
        limits=LIMITS,
        glossary=GLOSSARY,
        met=MET,
        provenance=certificate.provenance.to_json() if certificate.provenance else None,
        figures=[_shorten(figure) for result in certificate.results for figure in result.drawn],
        policy=_policy(style, script),
        style=Markup(style),  # noqa: S704 - our own files
        script=Markup(script),  # noqa: S704
        version=__version__,
    )


@cache
def _template() -> Any:
    """Load the template into an environment that escapes every expression, and shows control characters instead of obeying."""
    made = Environment(
        loader=PackageLoader("liborth_cli.verify", "report"), autoescape=True, undefined=StrictUndefined, finalize=_finalise,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":"), "allow_nan": False}
    made.filters |= {
        "number": number, "short_number": short_number, "interval": interval,
        "count_of": lambda many, thing: f"{number(many)} {thing}{'' if many == 1 else 's'}",
    }  # fmt: skip
    made.globals |= {
        "drawing": lambda plot, labelled_by: Markup(chart.inline(plot, labelled_by)),  # noqa: S704 - escaped where it is drawn
        "legend": lambda plot: [(Markup(sample), name) for sample, name in chart.legend(plot)],  # noqa: S704
        "hidden_points": chart.hidden_points, "shades_over": Shades.over, "panels": panels, "breakable": breakable,
        "cells": cells, "shared_names": _shared_names, "files_in": _files_in, "narrow": NARROW, "tall": TALL,
        "title_of": title_of,
    }  # fmt: skip
    return made.get_template("page.html")


def _finalise(value: Any) -> Any:
    return value if isinstance(value, Markup) else clean(value)


def _policy(style: str, script: str) -> str:
    """Allow this style sheet and this script, and nothing else from anywhere."""
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    return f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'"


def _file(name: str) -> str:
    return files("liborth_cli.verify.report").joinpath(name).read_text(encoding="utf-8")


def _banner(certificate: Certificate) -> Banner:
    """Say the verdict; what stands word for word in the requirements, beside a check or among the answers is not said twice."""
    elsewhere = {requirement.sentence for requirement in certificate.requirements}
    elsewhere.update(result.verdict for result in certificate.results)
    elsewhere.add(certificate.left_out)
    lead, others = certificate.sentences[:1], certificate.sentences[1:]
    sentences = [*lead, *(sentence for sentence in others if sentence not in elsewhere)]
    return Banner(KINDS[certificate.outcome], certificate.outcome.value.capitalize(), sentences)


def _chapters(certificate: Certificate) -> list[Chapter]:
    """Put the sections under their headings; a heading without any is left out."""
    sections = _sections(certificate)
    parts = [CHECKS[result.check].part if result.check in CHECKS else None for result in certificate.results]
    chapters = [
        Chapter(
            part.title if part else "More",
            part.question if part else "",
            [section for section, mine in zip(sections, parts, strict=True) if mine is part],
        )
        for part in (*Part, None)
    ]
    return [chapter for chapter in chapters if chapter.sections]


def _sections(certificate: Certificate) -> list[Section]:
    found, start = [], 0
    for index, result in enumerate(certificate.results):
        mine = [requirement for requirement in certificate.requirements if requirement.check == result.check]
        kind, words = _outcome(result, mine)
        missed = [requirement.sentence for requirement in mine if requirement.met is False]
        figures = places(result.figures, start)
        found.append(
            Section(
                index,
                title=title_of(result.check),
                kind=kind,
                words=words,
                missed=missed,
                verdict=result.verdict,
                metrics=result.metrics,
                places=figures,
            )
        )
        start += len(figures)
    return found


def _outcome(result: Result, requirements: list[Requirement]) -> tuple[str, str]:
    if result.passed is False:
        return BAD, "failed"
    missed = sum(requirement.met is False for requirement in requirements)
    if missed:
        return BAD, "requirement not met" if missed == 1 else "requirements not met"
    if any(requirement.met is None for requirement in requirements):
        return NEUTRAL, "undecided"
    if requirements:
        return GOOD, "requirement met" if len(requirements) == 1 else "requirements met"
    return (GOOD, "passed") if result.passed else (NEUTRAL, "measured")


def _rows(certificate: Certificate) -> list[str]:
    """Say on which rows everything was measured: "canaries: 24 rows, 120 tokens scored"."""
    data = certificate.provenance.data if certificate.provenance else {}
    return [f"{name}: {number(some.rows)} rows, {number(some.loss_tokens)} tokens scored" for name, some in data.items()]


def _files_in(value: Any) -> int:
    """Return how many files a list names, when it is one that is better folded: hashes of more than `FOLD` files."""
    items = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else []
    files = [item for item in items if _is_hash(item) or (isinstance(item, Mapping) and _is_hash(item.get("sha256")))]
    return len(items) if len(files) == len(items) > FOLD else 0


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def _shared_names(items: list[Any]) -> list[str]:
    """Return the names that flat records have in common, or nothing when the items are something else."""
    if len(items) < 2 or not all(isinstance(item, dict) and list(item) == list(items[0]) for item in items):
        return []
    flat = not any(isinstance(value, (dict, list, tuple)) for item in items for value in item.values())
    return list(items[0]) if flat else []


def _shorten(value: Any) -> Any:
    """Round the numbers of the downloads to `DIGITS`."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _shorten(item) for key, item in value.items()}
    return [_shorten(item) for item in value] if isinstance(value, list) else value
