"""The report as a file: its structure, its escaping, its numbers, its size; a browser reads it in the file beside this."""

import base64
import hashlib
import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from certificates import HOSTILE, certificate, hostile, samples

from liborth_cli.console import clean
from liborth_cli.errors import OutputConflict
from liborth_cli.verify import report
from liborth_cli.verify.checks import CHECKS
from liborth_cli.verify.report.figures import Shades, cells
from liborth_cli.verify.report.forms import ASKED, documentation_entries, extraction_entries
from liborth_cli.verify.report.page import render_page
from liborth_cli.verify.report.summary import answers, interval
from liborth_cli.verify.result import (
    UNASKED,
    About,
    Certificate,
    Edit,
    Heatmap,
    Metric,
    Outcome,
    Plot,
    Result,
    Series,
    Table,
    Untried,
    Why,
)

VOID = {"meta", "br", "wbr", "hr", "link", "input"}


class Page(HTMLParser):
    """Reads a page strictly: every element must be closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.texts, self.ids = [], [], {}, []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.found.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag, **wanted):
        return [a for t, a in self.found if t == tag and all(a.get(k) == v for k, v in wanted.items())]


@pytest.fixture(scope="module")
def text():
    return render_page(certificate())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_verdict_is_on_top_and_in_words(text, page):
    assert page.texts["title"][0] == "Failed: runs/contrastive-r64/general"
    body = text[text.index("<body") :]
    order = [
        body.index(words)
        for words in ("Failed</p>", "One of four", "What was removed?", "<code>barrier&lt;=0.05", "<main", ">Provenance<")
    ]
    assert order == sorted(order)


def test_nothing_required_is_no_decision_and_not_green():
    made = certificate()
    page = Page(render_page(Certificate(made.subject, Outcome.UNDECIDED, ["Measured."], [], made.results)))
    assert page.texts["title"][0].startswith("No decision: ")
    assert page.all("div", **{"class": "verdict neutral"})
    assert not page.all("div", **{"class": "verdict good"})


def part(text, start, end):
    return text[text.index(start) : text.index(end, text.index(start))]


def test_a_finding_is_told_whole_and_begins_with_the_requirement_that_is_not_met(text):
    findings = part(text, 'id="check-1"', "<details")
    missed, whole = "The barrier is 0.128 nats, and 0.109 at the least.", certificate().results[1].verdict
    assert findings.index(missed) < findings.index(whole)


def test_the_page_says_on_which_rows_and_what_was_not_tried():
    beyond = Untried(Why.BEYOND, "what nobody thought of")
    skipped = {"controls": Untried(Why.LACKING, "--reference"), "tofu": UNASKED, "beyond the checks": beyond}
    text = render_page(replace(certificate(), not_tried=skipped))
    assert "retain: 512 rows, 400 tokens scored; canaries: 38 rows, 190 tokens scored." in part(
        text, 'id="scope"', "</section>"
    )
    said = part(text, "What was not tested?", "</div>")
    assert "Controls: it needs --reference." in said
    assert "Not asked for: TOFU." in said
    assert "No check tries what nobody thought of." in said


def test_the_first_page_answers_in_the_numbers_of_the_certificate():
    edit = Edit("tokenwise", "strength 0.1", 35, 47, 0.0217)
    about = About("Shop assistant", "Example Ltd", "2026-11-26", "acme/shop-ft", "acme/shop", weights=2, edit=edit)
    made = replace(certificate(), about=about)
    said = {one.question: " ".join(one.said) for one in answers(made)}
    assert "2.17% of what fine-tuning changed" in said["What was removed?"]
    assert "35 of 47 tensors, by tokenwise, strength 0.1" in said["What was removed?"]
    assert "Of 38 rows that must be gone 0 come out" in said["What was removed?"]
    assert "94.2% of what fine-tuning gained on the retain data is kept (91.7% to 96.8%)" in said["What did it cost?"]
    assert said["How hard was it attacked?"] == "It was not attacked.", "`attacks` is no check of ours"
    page = Page(render_page(made))
    assert page.texts["h1"] == ["Shop assistant"]
    assert "2026-11-26 · Example Ltd" in "".join(page.texts["p"])
    assert "acme/shop-ft" in page.texts["code"]
    owners = {one.asked: one.said for one in documentation_entries(made)}
    assert owners["Legal name for the model provider"] == ["Example Ltd"]
    assert owners["Model authenticity"] == ["SHA-256 of 2 weight files, under Provenance"]
    assert owners["Model dependencies"] == ["acme/shop, by way of acme/shop-ft"]


def test_what_was_not_measured_is_said_and_never_zero():
    bare = Certificate("m", Outcome.UNDECIDED, [], [], [], {"controls": Untried(Why.LACKING, "--reference")})
    said = {one.question: one.said for one in answers(bare)}
    assert said["What did it cost?"] == ["Not measured: it needs --reference."]
    assert said["What was removed?"][-1] == "Nobody named what must be gone, so nothing is said of forgetting."
    assert {tuple(one.said) for one in extraction_entries(bare)} == {("not measured",)}
    assert "No chart" in render_page(bare)


def test_every_metric_of_the_forms_is_one_that_a_check_has():
    measured = {name for check in CHECKS.values() for name in check.metrics}
    assert {name for names in ASKED.values() for name in names} <= measured


@pytest.mark.parametrize(
    ("low", "high", "words"), [(19, math.inf, "at least 19"), (-math.inf, 2, "at most 2"), (1, 2, "1 to 2"), (math.nan, 2, "–")]
)
def test_an_open_interval_is_told_in_words(low, high, words):
    assert interval(Metric(19, low, high)) == words


def test_checks_stand_under_the_question_they_answer(text):
    headings = re.findall(r"<h2>(.*?)</h2>|<h3 id=.name-\d+.>(.*?)<span", text[text.index("<main") :])
    reliable, mechanism = ["Integrity", "Extraction and memorisation"], ["Linear mode connectivity", "Entanglement", "Spectra"]
    assert [chapter or check for chapter, check in headings] == [
        "Reliability", *reliable, "Mechanism", *mechanism, "Samples the memory carries", "More", "Attacks",
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "folded"), [(7, True), (3, False)])
def test_a_long_list_of_files_is_folded(count, folded):
    made = certificate()
    split = {"outputs": [{"name": f"{i}.safetensors", "sha256": "a" * 64} for i in range(count)]}
    text = render_page(replace(made, provenance=replace(made.provenance, split=split)))
    assert ("<summary>7 files</summary>" in text) is folded
    assert folded or "files</summary>" not in text


def test_every_check_and_figure_has_its_place(page):
    made = certificate()
    figures = [figure for result in made.results for figure in result.figures]
    assert sorted(a["id"] for a in page.all("section") if "id" in a) == [f"check-{i}" for i in range(len(made.results))]
    assert sorted(int(a["data-figure"]) for a in page.all("figure")) == list(range(len(figures)))
    plots = [a for a in page.all("svg") if a.get("role") == "img"]
    assert len(plots) == sum(isinstance(figure, Plot) for figure in figures) + 1, "and the one on top"
    assert len(page.all("table", **{"class": "heat"})) == 1


def test_ids_are_unique_and_every_reference_finds_one(page):
    assert len(page.ids) == len(set(page.ids))
    for _, attributes in page.found:
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in page.ids
        if "href" in attributes:
            assert attributes["href"].removeprefix("#") in page.ids


def test_the_policy_allows_just_this_style_and_this_script(text, page):
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    for rule, block in (("style-src", style), ("script-src", script)):
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(block[1].encode()).digest()).decode()}'"
    assert not any("style" in a or any(name.startswith("on") for name in a) for _, a in page.found)
    assert "url(" not in style[1]
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", style[1] + script[1])


def test_the_data_block_holds_every_figure(text):
    figures = json.loads(re.search(r'id="figures" type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    wanted = [figure for result in certificate().results for figure in result.to_json()["figures"]]
    assert [figure["title"] for figure in figures] == [figure["title"] for figure in wanted]
    for got, want in zip(figures[0]["series"], wanted[0]["series"], strict=True):
        assert got["y"] == pytest.approx(want["y"], rel=1e-8)


def test_the_same_certificate_gives_the_same_bytes(tmp_path):
    report.write(tmp_path / "a.html", certificate())
    report.write(tmp_path / "b.html", certificate())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_hostile_names_stay_text():
    made = render_page(hostile())
    page = Page(made)
    tags = {tag for tag, _ in page.found}
    assert "img" not in tags
    assert list(page.all("script")) == [{"id": "figures", "type": "application/json"}, {}]
    assert page.texts["h1"] == [clean(HOSTILE)]
    assert not any(character in made for character in "\u202e\x1b\ud800")
    data = re.search(r'type="application/json">(.*?)</script>', made, re.DOTALL)[1]
    assert not set(data) & set("<>&\u2028\u2029")
    assert json.loads(data)[0]["series"][0]["label"] == HOSTILE


def test_a_data_block_survives_whatever_is_in_it():
    hard = ("</script>", "<!--<script>", "\u2028\u2029", "&amp;", "\ud800", "]]>")
    table = Table("t", ("a",), tuple((text,) for text in hard))
    made = render_page(Certificate("m", Outcome.PASSED, [], [], [Result("c", "", None, {}, [table])]))
    inside = re.search(r'type="application/json">(.*?)</script>', made, re.DOTALL)[1]
    assert inside.isascii()
    assert [row[0] for row in json.loads(inside)[0]["rows"]] == list(hard)


@pytest.mark.parametrize("name", ["style.css", "script.js"])
def test_our_own_files_hold_nothing_that_ends_their_element(name):
    text = (files("liborth_cli.verify.report") / name).read_text(encoding="utf-8")
    assert not re.search(r"</|<!--|<script", text, re.IGNORECASE)


def test_a_model_of_a_hundred_layers_makes_a_light_page():
    assert len(render_page(certificate(100)).encode()) < 300_000


def test_a_long_table_shows_its_first_rows_and_says_so():
    made = render_page(Certificate("m", Outcome.PASSED, [], [], [samples(2000)]))
    assert made.count("<tr>") == 501
    assert "The first 500 of 2\u202f000 rows" in made


def test_an_empty_certificate_is_a_page_too():
    empty = [
        Plot("p", "", "x", "y", ()),
        Plot("p", "", "x", "y", (Series("s", (), ()),), x_log=True, y_log=True),
        Plot("p", "", "x", "y", (Series("s", (math.nan,), (-1.0,)),), y_log=True),
        Heatmap("h", "", (), (), (), ""),
        Table("t", ("a", ">b"), ()),
    ]
    page = Page(render_page(Certificate("", Outcome.PASSED, [], [], [Result("new", "", None, {}, empty)])))
    assert len(page.all("figure")) == 5


def test_points_without_a_place_are_counted():
    one = Series("s", (1.0, 2.0, 3.0, 4.0), (0.0, 1.0, math.inf, 10.0))
    page = render_page(
        Certificate("m", Outcome.PASSED, [], [], [Result("c", "", None, {}, [Plot("p", "", "x", "y", (one,), y_log=True)])])
    )
    assert "2 points without a place" in page


def test_the_header_says_nothing_twice():
    made = certificate()
    made.sentences += [made.requirements[0].sentence, made.results[0].verdict]
    page = render_page(made)
    assert page == render_page(certificate())


def test_a_plot_alone_in_its_row_has_its_words_beside_it():
    line = Plot("p", "", "x", "y", (Series("s", (0.0, 1.0), (0.0, 1.0)),))
    broad = Table("t", tuple("abcdefghijklmnopqrs"), ())
    for figures, alone in (([line], 1), ([line, line], 0), ([line, line, line], 1), ([broad, line, broad, line, line], 1)):
        page = Page(render_page(Certificate("m", Outcome.PASSED, [], [], [Result("c", "", None, {}, list(figures))])))
        assert len(page.all("figure", **{"class": "plot alone"})) == alone


# ---- Writing


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path):
    with pytest.raises(OutputConflict, match=r"r\.html: cannot be written"):
        report.write(tmp_path / "missing" / "r.html", certificate())
    (tmp_path / "r.html").mkdir()
    with pytest.raises(OutputConflict, match=r"r\.html: cannot be written"):
        report.write(tmp_path / "r.html", certificate())
    assert os.listdir(tmp_path) == ["r.html"]


def test_a_failure_leaves_the_old_report_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old")

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, fail)
    with pytest.raises(OutputConflict, match="Input/output error"):
        report.write(path, certificate())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.html"]


# ---- Tables and grids


def test_a_column_gets_the_decimals_it_needs():
    def written(*column):
        return [row[0].text for row in cells(Table("t", (">a",), tuple((v,) for v in column)))]

    assert written(0.105, 0.079, 0.0, None) == ["0.105", "0.079", "0.000", "–"]
    assert written(1, 2, 30) == ["1", "2", "30"]
    assert written(100.25, 0.0003) == ["100.2", "0.0003"]


def test_shades_grow_with_the_numbers_and_start_at_zero():
    shades = Shades.over(Heatmap("h", "", ("a",), ("b", "c", "d"), ((0.0, 0.5, 1.0),), ""))
    assert [shades.name(v) for v in (0.0, 0.5, 1.0, None, math.nan)] == ["h0", "h5", "h10", "", ""]
    signed = Shades.over(Heatmap("h", "", ("a",), ("b", "c"), ((-2.0, 1.0),), ""))
    assert [signed.name(v) for v in (-2.0, 0.0, 1.0)] == ["n10", "h0", "h5"]
