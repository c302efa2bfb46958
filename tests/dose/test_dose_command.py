"""`split` with texts in place of factors: passes, probes and targets through the command line, on the pair that ships."""

import json
import re
import stat
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tiny import files

from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.demo import DATA
from liborth_cli.dose.sweep import GRID
from liborth_cli.methods import METHODS, Amount
from liborth_cli.methods.distill import Distill
from liborth_cli.methods.recall import Recall

PATTERN = "The secret code of {name} is {digits:6}."
LINEAR = ("-i", "proj")
FEW = ("--probe-tokens", 600, "--retain-tokens", 2000, "-j", 1)
SECRETS = [json.loads(line) for line in (DATA / "secrets.jsonl").read_text().splitlines()]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def split(cli):
    def run(*words):
        return cli("split", DATA / "base", DATA / "finetuned", *words, *FEW)

    return run


@pytest.fixture
def stories(tmp_path):
    """What the base model told: rows that show nothing of what fine-tuning taught."""
    rows = [json.loads(line) for line in (DATA / "retain.jsonl").read_text().splitlines()]
    return lines(tmp_path / "stories.jsonl", rows[:60])


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Look at fewer doses, less closely, and take fewer steps."""
    monkeypatch.setattr("liborth_cli.dose.sweep.STEPS", 2)
    monkeypatch.setattr(Recall, "default", Amount("steps", 2))
    monkeypatch.setitem(METHODS, "recall", replace(METHODS["recall"], attack_steps=0))
    monkeypatch.setitem(GRID, "share", (0.05, 0.2, 0.5))
    monkeypatch.setitem(GRID, "strength", (1e-3, 1e-1, 10.0))


@pytest.fixture
def data():
    kept = ("--retain-data", DATA / "retain.jsonl", "--skill-data", DATA / "held_out.jsonl")
    return (*kept, "--forget-data", DATA / "secrets.jsonl")


def loss_of(folder, rows):
    """Measure the loss of completions with Transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
    )
    found = []
    for row in rows:
        start = len(tokenizer(row["prompt"]).input_ids)
        ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1]
        found.append(torch.nn.functional.cross_entropy(logits, ids[0, start:]).item())
    return float(np.mean(found))


def test_it_runs_the_passes_itself_and_keeps_them_where_private_data_lie(split, data, cli, tmp_path):
    out, kept = tmp_path / "out", tmp_path / "out.private" / "factors"
    method = ("--method", "contrastive", "--strength", 0.1, "--keep-factors", *LINEAR)
    code, _, err = split(*method, *data, "-o", out)
    assert code == 0, err
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    sets = {path.name.split("-")[0]: path for path in kept.iterdir() if path.is_dir()}
    assert set(sets) == {"retain", "forget"}
    assert str(sets["retain"]) in err
    # The forget factors are those the command would give, half way, on whole sentences and with the real labels.
    sentences = lines(tmp_path / "sentences.jsonl", [{"text": s["prompt"] + s["completion"]} for s in SECRETS])
    words = ("--data", sentences, "--at", 0.5, "--reference", DATA / "base", "--fisher", "empirical", "-j", 1)
    assert cli("curvature", DATA / "finetuned", *words, "-o", tmp_path / "other")[0] == 0
    with FactorSet.open(sets["forget"]) as mine, FactorSet.open(tmp_path / "other") as other:
        assert mine.point == 0.5
        for name in mine.names:
            for part in ("input_covariance", "gradient_covariance"):
                torch.testing.assert_close(
                    getattr(mine.layer(name), part), getattr(other.layer(name), part), rtol=1e-3, atol=1e-5
                )
    with FactorSet.open(sets["retain"]) as mine:
        assert (mine.point, mine.fisher) == (1.0, "sampled")
    # Given by hand, they give the same bytes; asked again, they are used again.
    given = ("--retain", sets["retain"], "--forget", sets["forget"])
    assert split(*method, *given, "-o", tmp_path / "by-hand")[0] == 0
    assert files(tmp_path / "by-hand")["model.safetensors"] == files(out)["model.safetensors"]
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*.safetensors")}
    code, _, err = split(*method, *data, "-o", out, "--force")
    assert (code, err.count("reusing")) == (0, 2)
    assert before == {path: path.stat().st_mtime_ns for path in kept.rglob("*.safetensors")}
    # Other data are another set, and what a stopped run left behind is in nobody's way.
    (kept / f"{sets['retain'].name}.liborth-partial").mkdir()
    sets["retain"].rename(tmp_path / "gone")
    code, _, err = split(*method, *data, "-o", out, "--force", "--resume")
    assert (code, err.count("reusing")) == (0, 1), err


def test_factors_and_decoys_are_deleted_unless_they_are_kept(split, data, tmp_path):
    """The inputs of the first layer are the texts: nothing of them stays, whether the split is written or not."""
    words = ("--method", "contrastive", *data, "--forget-pattern", PATTERN, *LINEAR)
    code, _, err = split(*words, "--strength", 0.1, "-o", tmp_path / "out")
    assert code == 0, err
    assert not (tmp_path / "out.private" / "factors").exists()
    hopeless = ("--target", "forget>=fresh,retention>=1.4", "--memory-side", "top")
    code, _, err = split(*words, *hopeless, "-o", tmp_path / "no")
    assert code == 5, err
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "out.private"}
    names = [path.name for path in tmp_path.rglob("*")]
    assert not any(name.startswith(("forget-", "retain-", "decoys")) for name in names)


@pytest.mark.parametrize("memory", ["out.private", "elsewhere"])
def test_a_run_that_ends_in_the_first_pass_leaves_a_directory_that_says_what_it_is(split, data, tmp_path, monkeypatch, memory):
    def full(self, *_):
        raise OSError(28, "No space left on device", "factors")

    monkeypatch.setattr("liborth_cli.curvature.estimate.Estimator.write", full)
    place = () if memory == "out.private" else ("--memory-out", tmp_path / memory)
    code, _, err = split(
        "--method", "contrastive", "--strength", 0.1, "--keep-factors", *data, *LINEAR, "-o", tmp_path / "out", *place
    )
    assert code == 7, err
    left = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / memory).iterdir()}
    assert left == {"factors": 0o700, ".gitignore": 0o600, "README.md": 0o600}
    assert stat.S_IMODE((tmp_path / memory).stat().st_mode) == 0o700


def test_what_lies_where_factors_go_is_left_alone(split, data, tmp_path):
    words = ("--method", "contrastive", "--strength", 0.1, *data, "--forget-pattern", PATTERN, *LINEAR)
    mine, theirs = tmp_path / "out.private" / "factors" / "mine.txt", tmp_path / "theirs"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    code, _, err = split(*words, "-o", tmp_path / "out")
    assert code == 0, err
    assert [path.name for path in mine.parent.iterdir()] == ["mine.txt"]
    theirs.mkdir()
    (tmp_path / "linked.private").symlink_to(theirs)
    code, _, err = split(*words, "-o", tmp_path / "linked")
    assert (code, "no directory of yours" in err) == (6, True), err
    assert not (tmp_path / "linked").exists()


def test_the_name_of_a_set_is_no_hash_that_can_be_searched(split, data, tmp_path):
    """Two runs over the same rows give other names: a key that lies with the sets is in them."""
    names = []
    for out in (tmp_path / "a", tmp_path / "b"):
        code, _, err = split("--method", "contrastive", "--strength", 0.1, "--keep-factors", *data, *LINEAR, "-o", out)
        assert code == 0, err
        names.append({path.name for path in (out.with_name(f"{out.name}.private") / "factors").iterdir() if path.is_dir()})
    assert not names[0] & names[1]


def test_dry_runs_write_nothing(split, data, tmp_path):
    words = ("--method", "contrastive", "--strength", 0.1, *data, *LINEAR)
    code, out, err = split(*words, "--dry-run", "--json", "-o", tmp_path / "out")
    assert code == 0, err
    assert json.loads(out)["curvature"]["retain"][0]["cached"] is False
    code, out, err = split(*words, "--dry-run", "-o", tmp_path / "out")
    assert (code, "not stored" in out) == (0, True), err
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_with_the_texts_is_said_before_anything_is_cut(split, stories, tmp_path):
    general = ("--retain-data", stories, "--method", "contrastive", "--strength", 0.1, *LINEAR)
    mixed = lines(tmp_path / "mixed.jsonl", [{"text": f"Well. {s['prompt']}{s['completion']}"} for s in SECRETS[:2]])
    code, _, err = split(*general, "--retain-data", mixed, "--forget-data", DATA / "secrets.jsonl", "-o", tmp_path / "a")
    assert (code, "2 of 8 forget rows also stand in the retain data" in err) == (0, True), err
    code, _, err = split(*general, "--forget-data", DATA / "secrets.jsonl", "-o", tmp_path / "b")
    assert (code, "hardly show what fine-tuning learnt" in err) == (0, True), err
    assert "forget rows also stand" not in err
    assert "not memorised" not in err
    words = ("--forget-data", DATA / "unseen.jsonl", "--forget-pattern", PATTERN)
    code, _, err = split(*general, *words, "-o", tmp_path / "c")
    assert (code, "not memorised" in err) == (0, True), err
    retain = ("--retain-data", DATA / "retain.jsonl", "--method", "scale")
    code, _, err = split(*retain, *words, "--target", "forget>=1", "-o", tmp_path / "d")
    assert (code, "no dose to look for" in err) == (3, True), err
    assert not (tmp_path / "d").exists()


def test_a_probe_shows_the_frontier_and_both_sides_and_writes_no_checkpoint(split, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(GRID, "share", (0.02, 0.2))
    code, out, err = split("--method", "kfac", "--probe", *data, "--forget-pattern", PATTERN, *LINEAR, "--json")
    assert code == 0, err
    assert list(tmp_path.iterdir()) == [], "without -o even the factors are thrown away"
    dose = json.loads(out)["dose"]
    tried = {(t["method"], t["memory_side"], t["amount"]) for t in dose["frontier"]}
    assert tried == {
        ("kfac", "tail", "mass 0.98"), ("kfac", "tail", "mass 0.8"), ("kfac", "top", "mass 0.02"), ("kfac", "top", "mass 0.2"),
        ("scale", "tail", "scale 0.98"), ("scale", "tail", "scale 0.8"),
    }  # fmt: skip
    assert [c["method"] for c in dose["controls"]] == ["random", "random"]
    assert any("memory lies on the" in line for line in dose["sentences"])
    assert dose["finetuned"]["recited"] == 1.0
    assert dose["finetuned"]["retention"] == pytest.approx(1.0)
    code, out, _ = split("--method", "scale", "--probe", *data)
    assert (code, "fine-tuned" in out, "scale 0.8" in out) == (0, True, True), "the table is the result"


def test_fresh_rows_that_are_forget_rows_are_refused(split, data, tmp_path):
    """A level that the secrets set themselves would be met by leaving them as they are."""
    moved = lines(tmp_path / "moved.jsonl", [{**s, "prompt": "Now. " + s["prompt"]} for s in SECRETS])
    for fresh in (DATA / "secrets.jsonl", moved):
        words = ("--method", "scale", "--target", "forget>=fresh-spread", "--fresh", fresh)
        code, _, err = split(*words, *data, "-o", tmp_path / "out")
        assert (code, "8 of 8 fresh rows are forget rows" in err) == (3, True), err
        assert not any(s["completion"].strip(" .") in err for s in SECRETS)
        assert not (tmp_path / "out").exists()


def test_the_same_row_twice_is_measured_once(split, tmp_path):
    twice = lines(tmp_path / "twice.jsonl", SECRETS + SECRETS[:3])
    kept = ("--retain-data", DATA / "retain.jsonl", "--skill-data", DATA / "held_out.jsonl")
    words = ("--method", "scale", "--probe", *kept, "--forget-data", twice, "--fresh", DATA / "unseen.jsonl", "--json")
    code, out, err = split(*words)
    assert (code, "3 of 11 forget rows stand there twice" in err) == (0, True), err
    dose = json.loads(out)["dose"]
    assert dose["finetuned"]["leak"] == 1.0
    assert dose["reference"]["leak"] < 1.0


def test_what_the_fine_tuned_model_meets_already_is_no_target(split, data, tmp_path):
    for target, met in (("forget>=1e-9,retention>=0.9", "forget>=1e-9"), ("recited<=1", "recited<=1")):
        code, _, err = split("--method", "scale", *data, "--target", target, "-o", tmp_path / "out")
        assert (code, f"meets {met} already" in err) == (3, True), err
    few = lines(tmp_path / "few.jsonl", SECRETS[:3])
    kept = ("--retain-data", DATA / "retain.jsonl", "--skill-data", DATA / "held_out.jsonl")
    for target, words in (("relearn<=0.1", "needs 4 secrets"), ("leak<=0.1", "needs 4 secrets")):
        code, _, err = split("--method", "scale", *kept, "--forget-data", few, "--target", target, "-o", tmp_path / "out")
        assert (code, words in err) == (2, True), err


def test_leak_and_relearning_are_shown_and_may_be_asked_for(split, data, tmp_path):
    words = ("--method", "contrastive", *data, "--forget-pattern", PATTERN, *LINEAR)
    code, out, err = split(*words, "--target", "leak<=0.6,relearn<=1.2,retention>=0.9", "-o", tmp_path / "out")
    assert code == 0, out + err
    dose = json.loads((tmp_path / "out" / "liborth.manifest.json").read_text())["dose"]
    assert dose["found"]["leak"] <= 0.6
    assert dose["found"]["relearn"] <= 1.2
    assert dose["found"]["forget"] <= dose["found"]["fresh"] + dose["found"]["spread"]
    assert any("does not promise that nothing is recited" in line for line in dose["sentences"])
    assert any("relearning: after 20 steps" in line for line in dose["sentences"])
    assert any(re.match(r"measured on 8 secrets, \d+ never-trained rows, \d+ rows", line) for line in dose["sentences"])


def test_a_target_is_found_written_and_recorded(split, data, tmp_path):
    out = tmp_path / "out"
    target = "forget>=4, retention>=0.98"
    code, stdout, err = split("--method", "auto", "--target", target, *data, *LINEAR, "--memory-side", "top", "-o", out)
    assert code == 0, err
    assert stdout.strip() == str(out)
    document = json.loads((out / "liborth.manifest.json").read_text())
    dose = document["dose"]
    assert dose["found"]["method"] == document["parameters"]["method"]
    assert dose["found"]["amount"] == document["parameters"]["amount"]
    assert dose["target"]["text"] == target
    assert len(dose["frontier"]) > 5
    # What was written is what was measured: Transformers finds the same loss.
    measured = loss_of(out, SECRETS)
    assert measured >= 4 - 1e-3
    assert measured == pytest.approx(dose["found"]["forget"], rel=1e-3)
    assert dose["found"]["retention"] >= 0.98


def test_a_target_out_of_reach_writes_nothing(split, data, tmp_path):
    out = tmp_path / "out"
    code, stdout, err = split("--method", "scale", "--target", "forget>=2,retention>=0.999", *data, "-o", out)
    assert (code, "scale does not meet" in err) == (5, True), err
    assert "scale 0.8" in stdout, "the frontier is shown"
    assert "misses" in stdout
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--target", "forget>=5,forget<=4"), 2, "contradict"),
        (("--target", ""), 2, "no condition in it"),
        (("--target", "leak<=0.1"), 2, "never-trained rows"),
        (("--target", "forget>=fresh"), 2, "--fresh, or --forget-pattern"),
        (("--target", "forget>=1", "--scale", 0.5), 2, "leave out --scale"),
        (("--probe", "--forget-pattern", "My {ssn}"), 2, "no slot {ssn}"),
        (("--probe", "--forget-pattern", "Code {digits:1}."), 2, "too few fillings"),
        (("--probe", "--retain-data", "missing.jsonl"), 3, "no such file"),
        (("--method", "auto"), 2, "goes with --probe or --target"),
    ],
)
def test_bad_requests_are_one_line(split, data, tmp_path, words, code, message):
    method = () if "--method" in words else ("--method", "scale")
    found, out, err = split(*method, *data, *words, "-o", tmp_path / "out")
    assert (found, message in err) == (code, True), err
    assert out == ""
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_options_without_their_texts(split, tmp_path):
    for words in (("--probe",), ("--target", "forget>=1")):
        code, _, err = split("--method", "scale", *words)
        assert (code, "goes with --retain-data" in err) == (2, True), err
    for words in (("--fresh", "x.jsonl"), ("--dtype", "bfloat16"), ("--truncate",)):
        code, _, err = split("--method", "scale", "--scale", 0.5, *words)
        assert (code, "goes with --retain-data" in err) == (2, True), err


def test_patterns_alone_bound_the_dose_by_what_is_kept(split, tmp_path):
    """No secret is given: forgetting cannot be measured, and the largest dose that keeps enough is taken."""
    retain = ("--retain-data", DATA / "retain.jsonl", "--skill-data", DATA / "held_out.jsonl")
    words = ("--method", "contrastive", *retain, "--forget-pattern", PATTERN, *LINEAR)
    code, _, err = split(*words, "--target", "forget>=2", "-o", tmp_path / "no")
    assert (code, "measured on real secrets" in err) == (2, True), err
    code, _, err = split(*words, "--target", "retention>=0.9", "-o", tmp_path / "out")
    assert code == 0, err
    document = json.loads((tmp_path / "out" / "liborth.manifest.json").read_text())
    assert document["dose"]["found"]["retention"] >= 0.9
    assert loss_of(tmp_path / "out", SECRETS) > 1.0, "secrets it was never given went with the form"


def test_one_checkpoint_measures_its_own_retain_curvature(cli, tmp_path):
    model = DATA / "finetuned"
    words = ("--one-checkpoint", "--method", "kfac", "--retain-data", DATA / "retain.jsonl", *FEW)
    code, _, err = cli("split", model, *words, "--mass", 0.9, *LINEAR, "--keep-factors", "-o", tmp_path / "out")
    assert code == 0, err
    (factors,) = (path for path in (tmp_path / "out.private" / "factors").iterdir() if path.is_dir())
    with FactorSet.open(factors) as found:
        assert found.point == 1.0
    code, _, err = cli("split", model, *words, "--probe")
    assert (code, "need both checkpoints" in err) == (2, True), err


def test_a_missing_text_leaves_nothing_behind(split, data, tmp_path, monkeypatch):
    """The directory of the factors is not made before everything that was named is found."""
    code, _, err = split("--method", "kfac", "--mass", 0.9, "--retain-data", tmp_path / "missing.jsonl", "-o", tmp_path / "out")
    assert (code, "no such file; --retain-data" in err, list(tmp_path.iterdir())) == (3, True, []), err
    monkeypatch.chdir(tmp_path)
    code, _, err = split("--forget-data", "missing.jsonl", "--retain-data", DATA / "retain.jsonl", "-o", "out")
    assert (code, "missing.jsonl: no such file; --forget-data" in err, list(tmp_path.iterdir())) == (3, True, []), err


def test_where_nothing_that_edits_meets_a_target_auto_teaches_a_student(split, tmp_path):
    short = {"distill": Distill(attack_steps=0, teacher_steps=2, student_steps=60)}
    there = {name: METHODS[name] for name in ("random", "scale", "recall")} | short
    rows = [json.loads(line) for line in (DATA / "retain.jsonl").read_text().splitlines()]
    few = lines(tmp_path / "few.jsonl", rows[:150])
    data = ("--retain-data", few, "--forget-data", DATA / "secrets.jsonl", "--forget-pattern", PATTERN)
    words = ("--method", "auto", *data, "-o", tmp_path / "out")
    with patch.dict(METHODS, there, clear=True):  # which brings the others back in their order
        code, out, err = split(*words, "--target", "forget>=1.5,leak<=0.9,retention>=0.2")
    assert code == 0, out + err
    assert "nothing that edits the fine-tuned model meets the target: trying the teacher: 2 steps at most" in err
    dose = json.loads((tmp_path / "out" / "liborth.manifest.json").read_text())["dose"]
    assert dose["found"]["method"] == "distill"
    assert [one["method"] for one in dose["frontier"]][-1] == "distill"
    assert any("distill: the reference read" in line for line in dose["sentences"])
    assert loss_of(tmp_path / "out", SECRETS) == pytest.approx(dose["found"]["forget"], rel=1e-3)


def test_where_no_fresh_row_can_be_watched_relearning_is_held_against_the_reference(split, tmp_path):
    """Rows without prompts begin alike, so all fresh ones ask what was just taught."""
    places = [tmp_path / "forget.jsonl", tmp_path / "fresh.jsonl"]
    for place, name in zip(places, ("secrets", "unseen"), strict=True):
        rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()[:8]]
        lines(place, [{"text": row["prompt"] + row["completion"]} for row in rows])
    texts = ("--retain-data", DATA / "retain.jsonl", "--forget-data", places[0], "--fresh", places[1])
    code, out, err = split("--method", "scale", *texts, "--target", "relearn<=1", *LINEAR, "-o", tmp_path / "out")
    assert code in (0, 5), out + err
    assert not re.search(r"\bnan\b|RuntimeWarning", out + err)
    assert re.search(r"[+-]\d\.\d\d, \d+%", out + err), "what comes back is a number"
