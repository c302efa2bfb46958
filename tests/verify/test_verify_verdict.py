"""What may be called passed: nothing that was not asked, not measured, or measured where it proves nothing."""

import json
import math
import re
import shutil

import pytest
import torch
import verify_cases
from deep_cases import finance_rows, subject
from safetensors.torch import load_file, save_file
from tiny import OWNGPT

from liborth_cli.console import Console
from liborth_cli.errors import UsageError
from liborth_cli.methods import Amount
from liborth_cli.verify.check import Check, Options
from liborth_cli.verify.checks import CHECKS, loads
from liborth_cli.verify.report.page import render_page
from liborth_cli.verify.result import Certificate, Metric, Outcome, Requirement, Result, Untried, Why
from liborth_cli.verify.rows import RowSet, copies, repeats
from liborth_cli.verify.table import print_certificate
from liborth_cli.verify.verdict import Working, decide, demands, outcome_of, still_works

GONE = Metric.exact(0.0).beside(1.0)
WORKS = Working(True)


def judged(text, metric, working=WORKS, check="canary"):
    """Decide one requirement on one number."""
    name = demands(text, CHECKS, True)[0].condition.name
    (one,) = decide(demands(text, CHECKS, True), [Result(check, "", None, {name: metric})], {}, working)
    return one.met, one.sentence


# Requirements -------------------------------------------------------------------------------------------------------------


def test_canaries_bring_a_requirement_of_their_own_and_files_one_of_theirs():
    texts = [demand.condition.text for demand in demands(None, CHECKS, True)]
    assert [text.split("<")[0].split(">")[0].split("=")[0] for text in texts] == [
        "damaged_files", "loads", "extraction", "leak", "relearn_gap_fresh", "retention",
    ]  # fmt: skip
    assert {demand.check for demand in demands(None, CHECKS, False)} == {"integrity", "loads"}
    assert [demand.condition.text for demand in demands("extraction<=0.5", CHECKS, True)] == ["extraction<=0.5"]


@pytest.mark.parametrize("text", ["", " ", ",", "nonsense==0", "lmc.extraction==0", "extraction", "extraction=>x"])
def test_a_requirement_that_says_nothing_is_refused(text):
    with pytest.raises(UsageError, match="--require"):
        demands(text, CHECKS, True)


@pytest.mark.parametrize(
    "metric, working, met, words",
    [
        (GONE, WORKS, True, "fine-tuned: 1"),
        (Metric.exact(0.25).beside(1.0), WORKS, False, "NOT met"),
        (Metric.exact(0.0).beside(0.0), WORKS, None, "show no forgetting"),
        (Metric.exact(0.0).beside(None), WORKS, None, "not known"),
        (GONE, Working(None, "it needs --retain-data"), None, "it needs --retain-data"),
        (GONE, Working(False, "the model no longer works"), False, "no longer works"),
    ],
)
def test_forgetting_is_shown_by_a_fine_tuned_model_that_had_not_forgotten_and_a_model_that_works(metric, working, met, words):
    found, sentence = judged("extraction==0", metric, working)
    assert (found, words in sentence) == (met, True), sentence


def test_a_bound_that_everything_meets_decides_nothing():
    assert judged("extraction<=5", GONE)[0] is None


def test_what_was_not_measured_is_neither_met_nor_missed():
    (one,) = decide(demands("leak<=0.4", CHECKS, True), [Result("canary", "")], {}, WORKS)
    assert one.met is None and "was not measured" in one.sentence
    (one,) = decide(demands("retention>=0.9", CHECKS, True), [], {"controls": Untried(Why.LACKING, "--retain-data")}, WORKS)
    assert one.met is None and "--retain-data" in one.sentence
    assert judged("retention>=0.9", Metric(math.nan, -math.inf, math.inf), check="controls")[0] is False


def test_what_was_not_measured_has_no_interval(capsys):
    (one,) = decide(demands("leak<=0.4", CHECKS, True), [], {}, WORKS)
    found = Certificate("m", Outcome.UNDECIDED, ["No decision: nothing."], [one], [])
    print_certificate(found, Console())
    text = capsys.readouterr().out + render_page(found)
    assert "leak" in text and not re.search(r"\bnan\b", text)


def test_numbers_on_skill_need_no_fine_tuned_model_that_fails_them():
    assert judged("retention>=0.9", Metric(0.95, 0.92, 0.98), Working(None), "controls")[0] is True


# The first line -----------------------------------------------------------------------------------------------------------


def first_line(canaries=6, fresh=0, results=(), requirements=()):
    given = {"canaries": finance_rows(canaries), "fresh": finance_rows(fresh, 9_000)}
    with subject(**{name: rows for name, rows in given.items() if rows}) as it:
        return outcome_of(it, CHECKS, list(results), list(requirements))


def requirement(met, text="extraction==0", check="canary"):
    return Requirement(text, check, Metric.exact(0.0), met, f"Sentence on {text}.")


def test_nothing_required_is_no_decision():
    outcome, line = first_line(results=[Result("canary", "Measured.")])
    assert outcome == Outcome.UNDECIDED and "nothing was required" in line


def test_a_recited_canary_is_never_under_a_green_banner():
    for check in ("canary", "prompts", "rounding"):
        met = [requirement(True, "extraction<=0.5")]
        outcome, line = first_line(results=[Result(check, "Measured.", recited=2)], requirements=met)
        assert outcome == Outcome.UNDECIDED and "2 of 6 canaries can be drawn out" in line


def test_what_weakens_a_verdict_stands_in_its_first_line():
    ran = [Result("canary", "Measured.", metrics={"leak": Metric(0.7, 0.5, 0.9)})]
    outcome, line = first_line(results=ran, requirements=[requirement(True)])
    assert outcome == Outcome.PASSED
    for words in (
        "only 6 different canaries",
        "--fresh",
        "without the relearning attack",
        "leak<=0.4 (0.7 (95 % interval 0.5 to 0.9)) not required",
    ):
        assert words in line
    outcome, line = first_line(24, 4, [*ran, Result("relearn", "Measured.")], [requirement(True), requirement(True, "leak<=1")])
    assert line.startswith("All 2 requirements are met, over their whole 95 % intervals")
    assert "not required" not in line and "without" not in line, line
    outcome, line = first_line(results=ran, requirements=[requirement(True), requirement(None, "leak<=0.4")])
    assert outcome == Outcome.UNDECIDED and "Sentence on leak<=0.4." in line
    assert "not required" not in line
    assert first_line(results=ran, requirements=[requirement(False), requirement(None)])[0] == Outcome.FAILED
    outcome, line = first_line(results=ran, requirements=[requirement(False, "canary.leak<=0.4")])
    assert outcome == Outcome.FAILED and "not required" not in line


def test_sound_files_alone_pass_and_say_that_they_are_all():
    sound = [Result("integrity", "Intact.", True)]
    outcome, line = first_line(0, 0, sound, [requirement(True, "damaged_files==0", "integrity")])
    assert outcome == Outcome.PASSED and "nothing was measured" in line
    outcome, line = first_line(0, 0, [Result("integrity", "DAMAGED: x.", False)], [])
    assert outcome == Outcome.FAILED and line.startswith("DAMAGED")


def test_a_model_works_when_it_is_no_worse_than_before_fine_tuning():
    with subject(retain=finance_rows(4)) as it:
        assert still_works(it).ok is True
    with subject(retain=finance_rows(4)) as it:
        it.states.weights["general"], it.states.weights["reference"] = (it.states.weights[n] for n in ("reference", "general"))
        assert still_works(it).ok is False
    with subject(canaries=finance_rows(4)) as it:
        assert still_works(it).ok is None and "--retain-data" in still_works(it).words


# Rows ---------------------------------------------------------------------------------------------------------------------


def test_rows_that_say_the_same_are_one():
    rows = finance_rows(4)
    again = [*rows, *rows[:2], rows[0]]
    assert RowSet(tuple(again), copies(again)).different == RowSet(tuple(again), repeats(again)).different == 4
    assert copies([]).tolist() == []
    text = finance_rows(1, length=32, prompt=1)[0]
    shifted = type(text)(text.ids[6:], text.keep[6:], 1.0, "elsewhere")
    assert copies([text, shifted, *rows]).tolist()[:2] == [0, 0], "all of the one stands in the other"


# The command --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    """A split of own-gpt, with its pair beside it and some text of the skill."""
    folder = tmp_path_factory.mktemp("verdict")
    for side in ("base", "finetuned"):
        shutil.copytree(OWNGPT / side, folder / side)
    verify_cases.split(folder, "general", "svd", Amount("rank", 8))
    text = (OWNGPT / "finance_qa.txt").read_text(encoding="utf-8")
    rows(folder / "few.jsonl", *({"text": text[i : i + 30]} for i in range(0, 900, 90)))
    rows(folder / "never.jsonl", *({"prompt": f"zq {i} ", "completion": f"{i} jumps over"} for i in range(5)))
    return folder / "general"


def rows(path, *objects):
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return path


def test_files_alone_decide_nothing_unless_asked_about(cli, general):
    """A fine-tuned checkpoint without a manifest, which recites everything, was once said to have passed."""
    finetuned = OWNGPT / "finetuned"
    code, out, _ = cli("verify", finetuned, "-j", 1)
    assert code == 5 and "NO DECISION" in out and "PASSED" not in out and "what they should be" not in out
    code, out, _ = cli("verify", general, "--integrity", "-j", 1)
    assert code == 0 and "nothing was measured of what the model keeps or forgets" in out


def test_without_a_requirement_there_is_no_verdict(cli, general, tmp_path):
    words = ("verify", general, "--retain-data", general.parent / "few.jsonl", "--lmc", "-j", 1)
    code, out, _ = cli(*words, "-o", tmp_path / "c.json", "--report", tmp_path / "c.html")
    document = json.loads((tmp_path / "c.json").read_text())
    assert (code, document["outcome"], document["passed"]) == (5, "no decision", False)
    assert "NO DECISION" in out and "No decision" in (tmp_path / "c.html").read_text()
    assert "relearn" in document["not_tried"] and "beyond the checks" in document["not_tried"]
    assert cli(*words, "--no-require")[0] == 0
    assert cli(*words, "--no-require", "--require", "barrier<=9")[0] == 2
    assert cli(*words, "--require", "")[0] == 2
    assert cli(*words, "--require", "barrier<=9")[0] == 0


@pytest.mark.usefixtures("quick_attack")
def test_canaries_that_were_never_known_prove_nothing(cli, general):
    few, never = general.parent / "few.jsonl", general.parent / "never.jsonl"
    words = ("--canary", never, "--retain-data", few, "--require", "extraction==0", "-j", 1)
    code, _, err = cli("verify", general, *words)
    assert (code, "show no forgetting" in err) == (5, True), err


@pytest.mark.usefixtures("quick_attack")
def test_a_broken_model_recites_nothing_and_does_not_pass(cli, general, tmp_path):
    zeros = shutil.copytree(OWNGPT / "finetuned", tmp_path / "zeros")
    tensors = load_file(zeros / "model.safetensors")
    blank = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(blank, zeros / "model.safetensors", metadata={"format": "pt"})
    text = (OWNGPT / "finance_qa.txt").read_text(encoding="utf-8")
    known = rows(
        tmp_path / "known.jsonl", *({"prompt": text[i : i + 15], "completion": text[i + 15 : i + 17]} for i in range(9))
    )
    folder = general.parent
    words = ("--canary", known, "--retain-data", folder / "few.jsonl", "--require", "canary_loss>=1", "-j", 1)
    words += ("--finetuned", folder / "finetuned", "--reference", folder / "base")
    code, _, err = cli("verify", zeros, *words)
    assert (code, "no longer works" in err) == (5, True), err


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"prompt": "The code is", "completion": ""}, "line 2"),
        ({"prompt": "The code is", "completion": "\u6f22" * 4}, "line 2"),
        ({"prompt": "The code is", "completion": "a" + "\u6f22" * 4}, "cannot represent"),
        ({"prompt": "The code is", "completion": " \n\t"}, "line 2: what must be said is white space only"),
        ({"text": ""}, "line 2"),
    ],
)
def test_no_canary_is_left_out_in_silence(cli, general, tmp_path, bad, says):
    file = rows(tmp_path / "bad.jsonl", {"prompt": "The code is", "completion": " blue"}, bad)
    code, _, err = cli("verify", general, "--canary", file, "--require", "extraction==0", "-q", "-j", 1)
    assert (code, says in err, err.count("\n")) == (3, True, 1), err


def test_fresh_rows_that_are_canaries_are_refused(cli, general, tmp_path):
    same = rows(
        tmp_path / "fresh.jsonl", {"prompt": "other", "completion": " thing"}, {"prompt": "zq 3", "completion": "3 Jumps, over"}
    )
    code, _, err = cli("verify", general, "--canary", general.parent / "never.jsonl", "--fresh", same, "-q", "-j", 1)
    assert (code, "line 2 is a canary" in err, "jumps" in err.lower()) == (3, True, False), err


def test_output_files_are_checked_before_the_work(cli, general, tmp_path):
    words = ("verify", general, "--integrity", "--out", tmp_path / "x.json", "--force", "-j", 1)
    code, _, err = cli(*words, "--report", "/dev/null")
    assert (code, (tmp_path / "x.json").exists()) == (6, False), err
    for name in ("model.safetensors", "config.json"):
        before = (general / name).read_bytes()
        code, _, err = cli("verify", general, "--integrity", "--report", general / name, "--force", "-j", 1)
        assert (code, (general / name).read_bytes() == before) == (6, True), err


@pytest.mark.parametrize("name", ["rep", "rep.txt"])
def test_a_report_that_no_browser_would_show_is_refused_before_the_work(cli, general, tmp_path, name):
    code, out, err = cli("verify", general, "--integrity", "--report", tmp_path / name, "-j", 1)
    assert (code, out, "ends in .html" in err, list(tmp_path.iterdir())) == (2, "", True, []), err


def test_an_option_of_a_check_asks_for_the_check(cli, general, tmp_path):
    code, _, err = cli("verify", general, "--tofu", tmp_path / "nowhere", "-q", "-j", 1)
    assert (code, "no such directory" in err) == (3, True), err
    code, _, err = cli("verify", general, "--relearn-steps", 3, "-q", "-j", 1)
    assert (code, "--relearn needs --canary" in err) == (2, True), err


@pytest.mark.usefixtures("quick_attack")
def test_an_error_line_stays_short(cli, general):
    words = ("--canary", general.parent / "never.jsonl", "--retain-data", general.parent / "few.jsonl")
    code, _, err = cli(
        "verify", general, *words, "--require", "canary_loss>=99, exact_memorisation<0, retention>=9", "-q", "-j", 1
    )
    assert (code, len(err) < 300) == (5, True), err


# The model that people load -----------------------------------------------------------------------------------------------


def test_transformers_own_loader_gives_the_losses_that_are_reported(monkeypatch):
    with subject({"general": OWNGPT / "finetuned"}, retain=finance_rows(5)) as it:
        sound = loads.run(it, Options())
        assert sound.passed and sound.metrics["loads"].value < 1e-4 and len(sound.figures[0].rows) == 3
    with subject({"general": OWNGPT / "finetuned"}) as it:
        assert loads.run(it, Options()).passed, "rows are drawn where none were given"
        monkeypatch.setattr(loads, "_load_and_score", lambda subject, rows: ([9.0] * len(rows), ""))
        found = loads.run(it, Options())
        assert found.passed is False and "ANOTHER model" in found.verdict
        monkeypatch.setattr(loads, "_load_and_score", lambda subject, rows: "no such model type")
        assert loads.run(it, Options()).passed is False
        monkeypatch.setattr(loads, "CHEAP", 1.0)
        assert "--loads" in loads.CHECK.costs(it, Options())


# A check of one's own -----------------------------------------------------------------------------------------------------

TOY = """
from dataclasses import dataclass
from liborth_cli.verify.check import Check, Need, Options, Part, option
from liborth_cli.verify.result import Metric, Result

@dataclass(frozen=True)
class ToyOptions(Options):
    toy_size: int = option(2, "How large.", least=1)

def run(subject, options):
    return Result("toy", f"It is {options.toy_size}.", metrics={"size": Metric.exact(options.toy_size, "of the toy")})

CHECK = Check(
    name="toy", title="A toy", words="Plays.", part=Part.TRANSFER, run=run, metrics=("size",), needs=(Need.MANIFEST,),
    options=ToyOptions,
)
"""


def test_a_check_is_one_file_and_one_line(cli, general, tmp_path, monkeypatch):
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path / "toys")
    from toy import CHECK  # pyright: ignore[reportMissingImports]

    assert isinstance(CHECK, Check)
    monkeypatch.setitem(CHECKS, "toy", CHECK)
    assert "--toy" in cli("verify", "--help")[1] and "How large." in cli("verify", "--help")[1]
    words = ("verify", general, "--toy", "--toy-size", 3, "-j", 1)
    code, out, err = cli(*words, "--require", "size<=3", "--report", tmp_path / "r.html")
    assert (code, "It is 3." in out) == (0, True), err
    assert "A toy" in (tmp_path / "r.html").read_text()
    assert cli(*words, "--require", "toy.size<=2")[0] == 5
    code, _, err = cli("verify", general.parent / "base", "--toy")
    assert (code, "--toy needs liborth.manifest.json" in err) == (2, True)


def test_the_page_on_verify_names_every_check_and_every_metric():
    from test_house import ROOT

    page = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    for check in CHECKS.values():
        assert f"--{check.name}" in page, check.name
        for metric in check.metrics:
            assert f"`{metric}`" in page, metric
        assert all(text.strip() in page for text in check.require.split(",")), check.require
