"""Puts the page together: the verdict, the requirements, a section for each check, and where it all comes from."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from liborth_cli import __version__
from liborth_cli.verify.report import heatmap, plot, provenance, table
from liborth_cli.verify.report.markup import Element, Node, data_block, element, render
from liborth_cli.verify.report.numbers import count, interval, number
from liborth_cli.verify.result import Certificate, Figure, Heatmap, Metric, Plot, Requirement, Result, Table

# The checks' names on the command line, spelled out; any other check goes by its own name.
NAMES = {
    "integrity": "Integrity",
    "lmc": "Linear mode connectivity",
    "entanglement": "Entanglement",
    "canary": "Extraction and memorisation",
    "spectrum": "Spectra",
    "reasoning": "Reasoning",
    "attacks": "Attacks",
    "controls": "Controls",
    "samples": "Samples the memory carries",
    "sweep": "Dose of memory",
    "tofu": "TOFU",
}
DIGITS = 9  # of the numbers in the downloads: more than float32 holds
SENTENCE = re.compile(r"(?<=[.!?]) +(?=[A-Z0-9])")  # where one ends and the next begins
GOOD, BAD, NEUTRAL = "good", "bad", "neutral"


def render_page(certificate: Certificate) -> str:
    """Write the whole page; the same certificate gives the same text."""
    style, script = _file("style.css"), _file("script.js")
    numbered = _number_figures(certificate.results)
    word = "Passed" if certificate.passed else "Failed"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{word}: {certificate.subject}"),
        element("style", style),
    )
    data = [_shorten(figure) for result in certificate.results for figure in result.to_json()["figures"]]
    body = element(
        "body",
        element("a", "Skip to the checks", href="#checks", class_="skip"),
        _verdict(certificate, word),
        element(
            "main", [_section(result, i, certificate, numbered[i]) for i, result in enumerate(certificate.results)], id="checks"
        ),
        _provenance(certificate),
        data_block(data, "figures"),
        element("script", script),
    )
    return "<!DOCTYPE html>" + render(element("html", head, body, lang="en")) + "\n"


def _policy(style: str, script: str) -> str:
    """Allow this style sheet and this script, and nothing else from anywhere."""
    rules = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": _hash(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _file(name: str) -> str:
    return files("liborth_cli.verify.report").joinpath(name).read_text(encoding="utf-8")


def _number_figures(results: list[Result]) -> list[list[tuple[int, Figure]]]:
    start, numbered = 0, []
    for result in results:
        numbered.append(list(enumerate(result.figures, start)))
        start += len(result.figures)
    return numbered


def _verdict(certificate: Certificate, word: str) -> Element:
    # What stands word for word in the requirements or beside a check, further down in this header, is not said twice.
    elsewhere = {requirement.sentence for requirement in certificate.requirements}
    elsewhere.update(result.verdict for result in certificate.results)
    lead, *others = certificate.sentences or [""]
    return element(
        "header",
        element("p", "liborth certificate", class_="kind"),
        element("h1", certificate.subject),
        element(
            "div",
            element("p", _sign(GOOD if certificate.passed else BAD), word, class_="word"),
            element("p", lead, class_="lead") if lead else None,
            [element("p", sentence) for sentence in others if sentence not in elsewhere],
            class_=f"verdict {GOOD if certificate.passed else BAD}",
        ),
        _requirements(certificate),
        _contents(certificate),
    )


def _requirements(certificate: Certificate) -> Node | None:
    if not certificate.requirements:
        return element(
            "p", "No requirement was given: the certificate reports, and fails only where something is broken.", class_="quiet"
        )
    index = {result.check: i for i, result in reversed(list(enumerate(certificate.results)))}
    rows = [
        [
            element("code", requirement.text),
            _state(GOOD if requirement.met else BAD, "met" if requirement.met else "not met"),
            number(requirement.measured.value),
            interval(requirement.measured),
            _link(requirement.check, index.get(requirement.check)),
            requirement.sentence,
        ]
        for requirement in certificate.requirements
    ]
    columns = ("Requirement", "Verdict", ">Measured", ">95 % interval", "Check", "In words")
    heading = element("h2", "Requirements", id="requirements")
    return element("section", heading, table.plain(columns, rows, "Requirements"), class_="requirements")


def _link(check: str, index: int | None) -> Node:
    return check if index is None else element("a", check, href=f"#check-{index}")


def _contents(certificate: Certificate) -> Element | None:
    if not certificate.results:
        return None
    entries = []
    for i, result in enumerate(certificate.results):
        kind, words = _outcome(result, certificate.requirements)
        link = element("a", _name(result), href=f"#check-{i}")
        finding = element("p", SENTENCE.split(result.verdict, maxsplit=1)[0])
        entries.append(element("li", link, _state(kind, words.split(" ", 1)[-1]), finding))
    return element("nav", element("h2", "Findings", id="findings"), element("ul", entries), aria_labelledby="findings")


def _name(result: Result) -> str:
    return NAMES.get(result.check, result.check[:1].upper() + result.check[1:])


def _outcome(result: Result, requirements: list[Requirement]) -> tuple[str, str]:
    mine = [requirement.met for requirement in requirements if requirement.check == result.check]
    if result.passed is False:
        return BAD, "failed"
    if not all(mine):
        return BAD, "requirement not met" if mine.count(False) == 1 else "requirements not met"
    if mine:
        return GOOD, "requirement met" if len(mine) == 1 else "requirements met"
    return (GOOD, "passed") if result.passed else (NEUTRAL, "measured")


def _section(result: Result, index: int, certificate: Certificate, figures: list[tuple[int, Figure]]) -> Element:
    kind, words = _outcome(result, certificate.requirements)
    name = _name(result)
    return element(
        "section",
        element("h2", name, _state(kind, words), id=f"name-{index}"),
        element("p", result.verdict, class_="lead"),
        _metrics(result.metrics, name),
        element("div", _figures(figures), class_="figures") if figures else None,
        id=f"check-{index}",
        aria_labelledby=f"name-{index}",
    )


def _metrics(metrics: dict[str, Metric], name: str) -> Element | None:
    if not metrics:
        return None
    rows = [[element("code", key), number(m.value), interval(m), m.meaning] for key, m in metrics.items()]
    return table.plain(("Metric", ">Value", ">95 % interval", "Meaning"), rows, f"Metrics: {name}")


def _figures(figures: list[tuple[int, Figure]]) -> Iterator[Element]:
    """Lay figures out two in a row; a plot left alone in its row gets its words beside it."""
    left = True
    for i, (index, figure) in enumerate(figures):
        wide = _is_wide(figure)
        last = i + 1 == len(figures) or _is_wide(figures[i + 1][1])
        alone = isinstance(figure, Plot) and left and last
        yield _figure(figure, index, "wide" if wide else "alone" if alone else "")
        left = wide or not left


def _figure(figure: Figure, index: int, class_: str) -> Element:
    title, alt = f"title-{index}", f"alt-{index}"
    words = [element("h3", figure.title, id=title)]
    labelled_by = title
    if not isinstance(figure, Table) and figure.alt:
        words.append(element("p", figure.alt, id=alt))
        labelled_by = f"{title} {alt}"
    return element(
        "figure",
        element("figcaption", words),
        _parts(figure, labelled_by),
        data_figure=index,
        class_=f"{type(figure).__name__.lower()} {class_}".rstrip(),
    )


def _is_wide(figure: Figure) -> bool:
    if isinstance(figure, Plot):
        return False
    return heatmap.wide(figure) if isinstance(figure, Heatmap) else table.wide(figure)


def _parts(figure: Figure, labelled_by: str) -> Iterator[Element]:
    match figure:
        case Plot():
            return _plot(figure, labelled_by)
        case Heatmap():
            return iter((heatmap.legend(figure), heatmap.grid(figure, labelled_by)))
        case Table():
            return _table(figure, labelled_by)


def _plot(figure: Plot, labelled_by: str) -> Iterator[Element]:
    names = plot.legend(figure)
    if names:
        yield names
    yield element("div", plot.draw(figure, labelled_by), class_="canvas")
    if hidden := plot.hidden_points(figure):
        yield element(
            "p", f"{count(hidden, 'point')} without a place on these axes, not drawn; the downloads list them.", class_="note"
        )


def _table(figure: Table, title: str) -> Iterator[Element]:
    yield table.sortable(figure, title)
    if len(figure.rows) > table.ROWS:
        words = f"The first {number(table.ROWS)} of {count(len(figure.rows), 'row')}; the downloads have them all."
        yield element("p", words, class_="note")


def _provenance(certificate: Certificate) -> Element:
    listed = provenance.listing(certificate.provenance) if certificate.provenance else element("p", "None was recorded.")
    return element(
        "footer",
        element("h2", "Provenance", id="provenance"),
        listed,
        element("p", f"Written by liborth {__version__}. This file loads nothing from elsewhere.", class_="quiet"),
    )


def _state(kind: str, words: str) -> Element:
    return element("span", _sign(kind), words, class_=f"state {kind}")


def _sign(kind: str) -> Element:
    """Draw a tick, a cross or a dot: the verdict is also told apart by shape."""
    path = {GOOD: "M3 8.5l3.2 3.2L13 4.6", BAD: "M4 4l8 8M12 4l-8 8", NEUTRAL: "M8 7.9v.2"}[kind]
    return element("svg", element("path", d=path), class_="sign", viewBox="0 0 16 16", width=16, height=16, aria_hidden="true")


def _shorten(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _shorten(item) for key, item in value.items()}
    return [_shorten(item) for item in value] if isinstance(value, list) else value
