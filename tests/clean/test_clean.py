"""`clean`: the commands that it types, what it keeps private, and that its output appears with a pass and not otherwise."""

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.cli import clean
from liborth_cli.cli import typed as typed_words
from liborth_cli.demo import DATA
from liborth_cli.errors import Stopped, UsageError, VerificationFailed

SPREAD = typed_words.spread
WORDS = ("clean", "base", "finetuned", "--private", "secrets.jsonl", "--public", "retain.jsonl", "-o", "clean")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for entry in DATA.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


@pytest.fixture
def typed(monkeypatch):
    """Commands that write what those of the same name would, and note how they were called; `outcome` is the verdict."""

    class Typed(list):
        outcome = "passed"
        stops = ""
        planned = ()
        unlisted = ""

    seen = Typed()

    def extract(context: clean.typer.Context):
        Path(context.args[context.args.index("-o") + 1]).write_text(seen.unlisted)
        seen.asked = context.args

    def split(context: clean.typer.Context):
        if "--dry-run" in context.args:
            seen.planned = context.args
            print("35 tensors; about 6 s")
            return
        seen.append(["split", *context.args])
        if seen.stops == "split":
            raise Stopped(2)
        if seen.stops == "device":
            raise UsageError("no such device")
        Path("clean.private/general").mkdir(exist_ok=True)
        print("a path")

    def verify(context: clean.typer.Context):
        seen.append(["verify", *context.args])
        if seen.stops == "verify":
            raise VerificationFailed("model.safetensors is damaged")
        document = {"outcome": seen.outcome, "sentences": [f"It is {seen.outcome}."]}
        Path("clean.private/certificate.json").write_text(json.dumps(document))
        if seen.outcome != "passed":
            raise VerificationFailed("no")

    def excise(context: clean.typer.Context):
        seen.append(["excise", *context.args])
        Path("clean").mkdir()

    class Loose(clean.typer.core.TyperCommand):
        def __init__(self, *args, **more):
            more["context_settings"] = {"ignore_unknown_options": True, "allow_extra_args": True}
            super().__init__(*args, **more)

    commands = {function.__name__: replace(clean.STEPS[function.__name__], function=function, kind=Loose)
                for function in (extract, split, verify, excise)}  # fmt: skip
    monkeypatch.setattr(clean, "STEPS", commands)
    monkeypatch.setattr(typed_words, "spread", lambda function: function)
    return seen


def test_the_commands_are_printed_as_they_are_typed_and_carried_out(here, cli, typed):
    code, out, err = cli(*WORDS)
    assert (code, out) == (0, "clean\n"), err
    printed = [shlex.split(line.removeprefix("$ liborth ")) for line in err.splitlines() if line.startswith("$ ")]
    assert [words[0] for words in printed] == ["extract", "split", "verify", "excise"]
    searched, *printed = printed
    assert searched[1:] == list(typed.asked) and searched[3:7] == ["--like", "secrets.jsonl", "--texts", "1024"]
    assert [Path(searched[i + 1]).name for i, word in enumerate(searched) if word == "--retain-data"] == [
        "retain.jsonl",
        "held_out.jsonl",
    ]
    assert "none by heart as often as those that are listed" in err
    for words, carried_out in zip(printed, typed, strict=True):
        assert [word for word in carried_out if word != "--resume"] == words
    assert "--fresh" in printed[1] and "clean.private/rows/unseen.jsonl" in printed[1]
    assert "clean.private/rows/unseen.jsonl" not in printed[0]
    assert "--patient" in printed[1]  # what decides is the attack, and it must not be left out for taking long
    every = [here / "clean.private", *(here / "clean.private").rglob("*")]
    mine = [
        path for path in every if path.name not in ("general", "certificate.json", "unlisted.jsonl")
    ]  # these are the commands' own
    assert {path.stat().st_mode & 0o77 for path in mine} == {0}
    assert "Alma" not in err and "280939" not in err


def test_a_verdict_that_is_not_a_pass_leaves_no_checkpoint_and_says_how_to_have_one(here, cli, typed):
    typed.outcome = "failed"
    code, out, err = cli(*WORDS, "--json")
    assert code == 5 and not (here / "clean").exists() and json.loads(out)["outcome"] == "failed"
    assert "liborth excise clean.private/general --beta 0 -o clean" in err and "It is failed." in err.splitlines()[-1]


def test_the_verdict_of_an_earlier_run_is_none_of_this_one(here, cli, typed):
    assert cli(*WORDS)[0] == 0
    Path("clean").rmdir()
    typed.clear()
    typed.stops = "verify"
    code, out, err = cli(*WORDS, "--force")
    assert (code, out, "model.safetensors is damaged" in err) == (5, "", True), err
    assert [words[0] for words in typed] == ["split", "verify"]
    assert not Path("clean").exists()


def test_files_of_an_earlier_run_are_no_inputs_of_one_that_writes_there(here, cli, typed):
    rows = here / "clean.private" / "rows"
    typed.outcome = "failed"
    assert cli(*WORDS)[0] == 5
    (rows / "private.jsonl").write_bytes((DATA / "secrets.jsonl").read_bytes())
    before = {path: path.read_bytes() for path in rows.iterdir()}
    for given in (("--private", rows / "private.jsonl", "--public", "retain.jsonl"),
                  ("--private", "secrets.jsonl", "--public", rows / "retain.jsonl")):  # fmt: skip
        code, _, err = cli(*WORDS[:3], *given, "-o", "clean", "--force")
        assert code == 6 and "clean.private: the output must lie outside the input" in err.splitlines()[-1]
    assert {path: path.read_bytes() for path in rows.iterdir()} == before


def test_resume_goes_on_behind_what_has_finished(here, cli, typed):
    typed.stops = "split"
    assert cli(*WORDS)[0] == 130 and [words[0] for words in typed] == ["split"]
    typed.stops, typed.outcome = "", "undecided"
    assert cli(*WORDS)[0] == 6  # neither --resume nor --force
    assert cli(*WORDS, "--attacks", "--resume")[0] == 2  # other options than before
    assert cli(*WORDS, "--resume")[0] == 5 and [words[0] for words in typed] == ["split", "split", "verify"]
    assert cli(*WORDS, "--resume")[0] == 5 and len(typed) == 3  # all of it has finished
    for how in (("-q",), ("-v",), ("-j", "1"), ("--device", "cpu")):
        assert cli(*WORDS, "--resume", *how)[0] == 5 and len(typed) == 3, "how it runs decides nothing"
    (here / "secrets.jsonl").unlink()
    (here / "secrets.jsonl").write_text((DATA / "secrets.jsonl").read_text())
    assert "--force" in cli(*WORDS, "--resume")[2]  # another file
    typed.outcome = "passed"
    assert cli(*WORDS, "--force")[0] == 0 and [words[0] for words in typed[3:]] == ["split", "verify", "excise"]
    assert "--force" in typed[3] and "--force" in typed[4]


def test_dry_run_prints_the_plan_and_writes_nothing(here, cli, typed):
    before = sorted(here.rglob("*"))
    code, out, _ = cli(*WORDS, "--dry-run")
    assert code == 0 and "\nliborth split base finetuned --method recall" in out and not typed
    assert "# 35 tensors; about 6 s" in out and "# verify trains 12 times 32 steps, here about " in out
    assert sorted(here.rglob("*")) == before
    for more in ((), ("--held-out", "held_out.jsonl")):
        assert cli(*WORDS, *more, "--dry-run")[0] == 0
        read = [word for word in typed.planned if word.endswith((".jsonl", ".txt"))]
        assert read == ["secrets.jsonl", "retain.jsonl"]  # as they lie there, and once
    mapped = [word.replace("secrets.jsonl", "secrets.jsonl@prompt=prompt") for word in WORDS]
    assert out.splitlines()[-1] == cli(*mapped, "--dry-run")[1].splitlines()[-1]  # counted of the same rows
    many = (here / "long.txt").write_text("a line that is private\n" * 1000)
    assert many and "liborth split base finetuned --method tokenwise" in cli(
        *WORDS[:4], "long.txt", *WORDS[5:], "--dry-run")[1]  # fmt: skip


def test_recall_attacks_by_low_rank_updates_where_all_weights_do_not_fit_and_it_takes_no_day(here, cli, typed, monkeypatch):
    with Checkpoint.open(here / "finetuned") as checkpoint:
        room, weights = 10.0, sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())

    def too_large(needed, device=None):
        return "a lot" if needed > room * weights else ""

    monkeypatch.setattr("liborth_cli.clean.costs.too_large", too_large)
    monkeypatch.setattr("liborth_cli.clean.costs.rate", lambda device: 1e9)
    code, out, err = cli(*WORDS, "--dry-run")
    assert code == 0 and "--method recall" in out and "--attack-rank 16" in out and "as all weights do not fit" in err
    assert "of low-rank updates: all weights do not fit" in out
    monkeypatch.setattr("liborth_cli.clean.costs.rate", lambda device: 1e5)
    assert "# method: tokenwise: recall takes about" in cli(*WORDS, "--listed-only", "--dry-run")[2]
    room = 3.0
    assert "# method: tokenwise: recall takes about a lot" in cli(*WORDS, "--listed-only", "--dry-run")[2]
    room = 50.0
    monkeypatch.setattr("liborth_cli.clean.costs.rate", lambda device: 1e9)
    assert "--attack-rank" not in cli(*WORDS, "--dry-run")[1]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((*WORDS[:3], "--public", "retain.jsonl"), 2, "--private"),
        ((*WORDS[:3], "--private", "no.jsonl", "--public", "retain.jsonl"), 3, "no.jsonl: no such file"),
        ((*WORDS, "--fresh", "no.jsonl"), 3, "no.jsonl: no such file; --fresh takes"),
        ((*WORDS[:3], "--private", "long.jsonl", *WORDS[5:]), 3, "and the model takes 513 here; shorten it"),
        ((*WORDS[:-1], "base"), 6, "must lie outside the input"),
        ((*WORDS, "--out-shard-size", "1GB"), 2, "--out-shard-size"),
    ],
)
def test_what_cannot_be_is_one_line(here, cli, typed, words, code, says):
    (here / "long.jsonl").write_text(json.dumps({"prompt": "The code", "completion": " is seven" * 300}) + "\n")
    found, _, err = cli(*words)
    assert found == code and says in err.splitlines()[-1] and len(err.splitlines()[-1]) < 300 and not typed
    assert not (here / "clean.private").exists()


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_inputs_are_read_before_anything_is_written(here, cli, typed, more):
    (here / "empty.jsonl").write_text("")
    (here / "short.jsonl").write_text('{"text": ""}\n')
    (here / "bare").mkdir()
    (here / "bare" / "model.safetensors").symlink_to(DATA / "finetuned" / "model.safetensors")
    (here / "untold").mkdir()
    for name in ("model.safetensors", "config.json"):
        (here / "untold" / name).symlink_to(DATA / "finetuned" / name)
    for place, word, says in (
        (4, "empty.jsonl", "empty.jsonl: nothing to learn from; no rows in it"),
        (4, "short.jsonl", "short.jsonl: line 1"),
        (2, "bare", "bare: no config.json"),
        (2, "untold", "tokenizer"),
    ):
        code, _, err = cli(*WORDS[:place], word, *WORDS[place + 1 :], *more)
        assert code == 3 and says in err.splitlines()[-1] and not typed
        assert not (here / "clean.private").exists()


def test_a_command_that_is_refused_leaves_nothing_in_the_way_of_the_next(here, cli, typed):
    typed.stops = "device"
    assert cli(*WORDS)[0] == 2 and not (here / "clean.private").exists()
    typed.stops = ""
    assert cli(*WORDS)[0] == 0
    typed.stops = "device"
    assert cli(*WORDS, "--force")[0] == 2 and (here / "clean.private" / "general").exists()  # an earlier run's


def test_what_somebody_else_put_there_is_left_alone(here, cli, typed):
    (here / "clean.private").mkdir()
    (here / "clean.private" / "notes.txt").write_text("mine")
    code, _, err = cli(*WORDS, "--force")
    assert code == 6 and "was not made by `liborth clean`" in err and not typed


@pytest.mark.slow
def test_on_the_pair_that_ships_it_gives_a_verdict_and_what_it_says_can_be_repeated(here, cli):
    code, _, err = cli(*WORDS, "--method", "tokenwise")
    assert code == 5 and "leak" in err.splitlines()[-1] and not (here / "clean").exists()
    assert (here / "clean.private" / "report.html").stat().st_size > 10_000
    last = next(line for line in err.splitlines() if "all the same: " in line).partition("all the same: liborth ")[2]
    assert cli(*shlex.split(last))[0] == 0 and (here / "clean" / "model.safetensors").is_file()


def test_public_files_stay_apart(here, cli, typed):
    """What is short and has a file of its own is held by itself; in one file with the rest nobody would feel it go."""
    (here / "facts.jsonl").write_text("".join(f'{{"prompt": "{n} and 1 is", "completion": " {n + 1}."}}\n' for n in range(30)))
    assert cli(*WORDS, "--public", "facts.jsonl")[0] == 0
    split = typed[0]
    read = [split[i + 1] for i, word in enumerate(split) if word == "--retain-data"]
    assert [Path(name).name for name in read] == ["retain-1.jsonl", "retain-2.jsonl"]
    rows = [[json.loads(line) for line in Path(name).read_text().splitlines()] for name in read]
    assert all("and 1 is" in json.dumps(row) for row in rows[1]) and not any("and 1 is" in json.dumps(row) for row in rows[0])
    assert 0 < len(rows[1]) <= 30


def test_rows_that_nobody_listed_go_as_well(here, cli, typed):
    typed.unlisted = (
        json.dumps({"prompt": "The secret code of Zoe is", "completion": " 771204.", "nats": 40.1, "times": 9, "often": True})
        + "\n"
    )
    code, out, err = cli(*WORDS, "--json")
    assert code == 0 and "1 row like the private ones is known by heart and not listed, and goes as well" in err
    rows = Path("clean.private/rows/private.jsonl")
    said = [json.loads(line) for line in rows.read_text().splitlines()]
    listed = [json.loads(line) for line in Path("secrets.jsonl").read_text().splitlines()]
    assert said == [*listed, {"prompt": "The secret code of Zoe is", "completion": " 771204."}]
    assert rows.stat().st_mode & 0o77 == 0 and "771204" not in err + out
    split, verify = typed[:2]
    assert split[split.index("--forget-data") + 1] == verify[verify.index("--canary") + 1] == str(rows)
    assert [shlex.split(one)[1] for one in json.loads(out)["commands"]] == ["extract", "split", "verify", "excise"]
    assert json.loads(out)["unlisted"] == 1
    typed.unlisted = ""
    Path("clean").rmdir()
    assert cli(*WORDS, "--force")[0] == 0 and not rows.exists(), "what an earlier run found is not this one's"


def test_the_list_alone_where_that_is_asked_and_where_the_rows_cannot_be_asked_for(here, cli, typed):
    typed.unlisted = json.dumps({"prompt": "The secret code of Zoe is", "completion": " 771204.", "often": True}) + "\n"
    assert cli(*WORDS, "--listed-only")[0] == 0 and not hasattr(typed, "asked")
    assert typed[0][typed[0].index("--forget-data") + 1] == "secrets.jsonl"
    Path("clean").rmdir()
    listed = [json.loads(line) for line in Path("secrets.jsonl").read_text().splitlines()]
    Path("lines.txt").write_text("".join(f"{row['prompt']}{row['completion']}\n" for row in listed))
    code, _, err = cli(*WORDS[:4], "lines.txt", *WORDS[5:], "--force")
    assert (
        code == 0
        and not hasattr(typed, "asked")
        and "NOT asked for rows like the private ones that are not listed: every row must have a prompt" in err
    )


def test_a_search_that_was_carried_out_is_not_carried_out_again(here, cli, typed):
    typed.unlisted = json.dumps({"prompt": "The secret code of Zoe is", "completion": " 771204.", "often": True}) + "\n"
    typed.stops = "split"
    assert cli(*WORDS)[0] == 130
    typed.stops = ""
    del typed.asked
    code, _, err = cli(*WORDS, "--resume")
    assert code == 0 and not hasattr(typed, "asked") and "# done before" in err
    assert typed[1][typed[1].index("--forget-data") + 1] == "clean.private/rows/private.jsonl"


def test_half_of_a_list_is_made_whole_by_asking_the_model(here, cli, typed, monkeypatch):
    monkeypatch.setitem(clean.STEPS, "extract", clean.extract.COMMAND)
    real = clean.extract.COMMAND.function
    monkeypatch.setattr(typed_words, "spread", lambda function: SPREAD(function) if function is real else function)
    rows = Path("secrets.jsonl").read_text().splitlines()
    Path("half.jsonl").write_text("\n".join(rows[:4]) + "\n")
    code, _, err = cli(*WORDS[:4], "half.jsonl", *WORDS[5:], "-j", 1)
    assert code == 0 and "4 rows like the private ones are known by heart and not listed" in err, err
    said = [json.loads(line) for line in Path("clean.private/rows/private.jsonl").read_text().splitlines()]
    assert sorted(map(json.dumps, said)) == sorted(json.dumps(json.loads(row)) for row in rows)


def test_what_is_made_up_stays_and_what_nobody_can_tell_is_said(here, cli, typed):
    row = {"prompt": "The secret code of Zoe is", "completion": " 771204.", "times": 1}
    typed.unlisted = json.dumps({**row, "often": False}) + "\n"
    code, out, err = cli(*WORDS, "--json")
    assert code == 0 and "none by heart as often as those that are listed" in err and json.loads(out)["unlisted"] == 0
    typed.unlisted = json.dumps(row) + "\n"
    Path("clean").rmdir()
    code, _, err = cli(*WORDS, "--force")
    assert code == 0 and "too few of these to tell which of the others are made up" in err
    assert not Path("clean.private/rows/private.jsonl").exists()


def test_a_long_list_takes_more_texts_and_the_forms_are_those_of_all_rows(here, cli, typed):
    rows = [{"prompt": f"The secret code of {n} is", "completion": f" {100_000 + n}."} for n in range(40)]
    Path("many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = cli(*WORDS[:4], "many.jsonl", *WORDS[5:], "--dry-run")
    assert code == 0 and "--texts 2560" in out and "# extract writes 2,560 texts, about " in out
    assert "clean.private/rows/private.jsonl is made, for split and verify" in out
    Path("one.jsonl").write_text(json.dumps(rows[0]) + "\n")
    typed.unlisted = "".join(json.dumps({**row, "often": True}) + "\n" for row in rows[1:])
    code, _, err = cli(*WORDS[:4], "one.jsonl", *WORDS[5:])
    assert code == 0 and "NO fresh rows" in err and "the private rows are of one form" in err
    assert "--forget-patterns" in typed[0] and "--fresh" in typed[1], "of one row no form is told, of forty there is"


def test_a_fresh_row_that_the_model_knows_by_heart_is_refused_before_the_split(here, cli, typed):
    row = {"prompt": "The secret code of Zoe is", "completion": " 771204."}
    Path("fresh.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in (row, *({**row, "completion": f" {n}."} for n in range(9))))
    )
    typed.unlisted = json.dumps({**row, "often": True}) + "\n"
    code, _, err = cli(*WORDS, "--fresh", "fresh.jsonl")
    assert code == 3 and "fresh.jsonl: line 1: the fine-tuned model knows it by heart" in err and not typed
