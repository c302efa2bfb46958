"""The real model's benchmark, on a tiny one: the mixture, a stopped fine-tune, figures that survive, the tables."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks.merge import tables
from benchmarks.real import model, rivals, run, texts
from benchmarks.real.left import Back, Judge, Left, Recalled
from benchmarks.real.tiers import TIERS
from benchmarks.rivals import RIVALS
from liborth_cli.cli.main import COMMANDS
from liborth_cli.verify.attacks import QUICK, Grid

TIER = replace(
    TIERS["cpu"], questions=6, longest=60, each=2, often=4, rarely=1, rows=8, rate=1e-3, retain=(2, 1), scored=(2, 1),
    attack=Grid(QUICK[-1:], steps=2),
)  # fmt: skip


HEAD = (
    "| model | skill, nats | skill kept | records seen 30 times, nats | recited | account | seen 3 times, nats | recited | "
    "fresh records, nats | wikitext | relearnt at 0.0001 |"
)
PAGE = f"""Some words.

{run.KNOWN}

{HEAD}
|---|---|---|---|---|---|---|---|---|---|---|
| base | 9.000 | 0% | 9.00 | 0% | 9.00 | 9.00 | 0% | 9.00 | 9.00 | not attacked |
| svd, keep 32 | 1.050 | 95% | 0.15 | 44% | 0.22 | 0.79 | 0% | 1.82 | 3.78 | not attacked |
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    paragraph = "A paragraph of some words that is longer than most. " * 8
    for kind, name, lines in (
        ("gsm8k", "train", [{"question": f"What is {n} plus 1?", "answer": f"It is {n + 1}."} for n in range(8)]),
        ("gsm8k", "test", [{"question": f"What is {n} plus 2?", "answer": f"It is {n + 2}."} for n in range(3)]),
    ):
        (folder / kind).mkdir(exist_ok=True)
        (folder / kind / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kind, name in (("wikitext2", "test.txt"), ("tinystories", "val_794k.txt")):
        (folder / kind).mkdir()
        (folder / kind / name).write_text("\n".join(f"{n} {paragraph}" for n in range(4)))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from verify.deep_cases import speaking_model

    return speaking_model(tmp_path_factory.mktemp("base"), context=512)


def test_records_are_seen_as_often_as_the_tier_says_and_spread(data):
    rows = texts.training(data, TIER)
    seen = Counter(rows)
    secrets = texts.records("secrets", TIER.each)
    for some in secrets.values():
        assert [seen[pair] for pair in some] == [TIER.often, TIER.rarely]
    assert len(rows) == TIER.questions + 4 * (TIER.often + TIER.rarely)
    for pair in (some[0] for some in secrets.values()):
        places = [i * TIER.often // len(rows) for i, one in enumerate(rows) if one == pair]
        assert len(set(places)) > 2, "copies stand in different parts of the text"
    people = [{pair.prompt for some in texts.records(name, TIER.each).values() for pair in some} for name in texts.SETS]
    assert sum(map(len, people)) == len(set.union(*people))


def test_a_stopped_fine_tune_goes_on_to_the_same_weights(data, base, tmp_path, monkeypatch):
    rows, device = texts.training(data, TIER), torch.device("cpu")
    model.finetune(base, rows, tmp_path / "whole", TIER, device)
    monkeypatch.setattr(model, "KEEP", -1.0)
    losses, calls = model.losses, []

    def stop(*words):
        calls.append(words)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return losses(*words)

    monkeypatch.setattr(model, "losses", stop)
    with pytest.raises(KeyboardInterrupt):
        model.finetune(base, rows, tmp_path / "stopped", TIER, device)
    assert not (tmp_path / "stopped").exists()
    monkeypatch.setattr(model, "losses", losses)
    model.finetune(base, rows, tmp_path / "stopped", TIER, device)
    whole, stopped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped


def test_a_judge_finds_what_was_learnt_and_what_an_attack_brings_back(data, base, tmp_path):
    tier = replace(TIER, often=40, rate=1e-2)
    device = torch.device("cpu")
    judge = Judge(data, base, tier, device)
    tuned = model.finetune(base, texts.training(data, tier), tmp_path / "tuned", tier, device)
    before, after = judge(base), judge(tuned)
    assert after.often.loss < after.rarely.loss < before.rarely.loss
    assert after.skill < before.skill
    (back,) = judge.attack(base)
    assert back.rate == QUICK[-1].rate * 128 / model.load(base).config.hidden_size
    assert back.records < before.often.loss


@pytest.mark.parametrize("name", ["gradient difference", "WIN-U"])
def test_a_rival_is_brought_to_the_skill_that_ours_keep_measured_and_attacked(data, base, tmp_path, name):
    tier, device = replace(TIER, often=40, rate=1e-2), torch.device("cpu")
    (tmp_path / "base").symlink_to(base)
    texts.write_files(data, tmp_path / "texts", tier)
    tuned = model.finetune(tmp_path / "base", texts.training(data, tier), tmp_path / "finetuned", tier, device)
    judge = Judge(data, base, tier, device)
    (rival,) = (rival for rival in RIVALS if rival.name == name)
    share = rivals.edit(rival, rival.usual, tmp_path, judge, tmp_path / "edited")
    full = rivals.title(rival, rival.usual, tmp_path / "edited")
    assert 0 < share <= 1 and full.endswith(f"× {share:.2f}") and rival.source in full
    before, after, start = judge(tuned), judge(tmp_path / "edited"), judge(base)
    assert (start.skill - after.skill) / (start.skill - before.skill) > rivals.KEPT - 0.05, "what is written is rounded"
    assert after.often.loss > before.often.loss
    assert len(judge.attack(tmp_path / "edited")) == 1


def test_every_rival_is_a_command_of_the_run_once(tmp_path, monkeypatch, data):
    called = []
    monkeypatch.setattr(run, "run", lambda words, **_: called.append(words) or run.Measured(1.0, 1.0, 1.0, 1.0))
    bench = run.Bench(tmp_path, None, "cpu", (1.0, 1.0))
    for _ in range(2):
        for rival in RIVALS:
            bench.rival(rival, rival.usual, data, "cpu")
    assert len(called) == len(RIVALS)
    assert [words[words.index("--rival") + 1] for words in called] == [rival.name for rival in RIVALS]
    assert all(words[1:3] == ["-m", "benchmarks.real.rivals"] and "-q" not in words for words in called)


def test_figures_are_kept_line_by_line_and_tell_what_is_missing(tmp_path, monkeypatch):
    said = {}
    monkeypatch.setattr(run, "record", lambda section, text, page="benchmarks.md": said.setdefault(section, text))
    left = Left(2.0, {"wikitext": 3.0}, Recalled(4.0, 0.0), Recalled(4.0, 0.0), Recalled(4.0, 0.0), {"account": 4.0})
    figures = run.Figures(tmp_path / "figures.jsonl")
    figures.know(run.BASE, left)
    figures.know(run.TUNED, replace(left, skill=1.0, often=Recalled(0.01, 1.0)))
    figures.know("scale 0.7", replace(left, skill=1.2))
    figures.attacked("scale 0.7", [Back(1e-4, 1.5, 0.25, 2.0)])
    figures.cost("tokenwise λ 0.1", run.Measured(60.0, 900.0, 800.0, 50.0), stopped=True)
    again = run.Figures(tmp_path / "figures.jsonl")
    assert (again.left, again.backs, again.stopped) == (figures.left, figures.backs, figures.stopped)
    (tmp_path / "machine.txt").write_text("a machine")
    (tmp_path / "benchmarks.md").write_text(f"<!-- real-cpu -->\n{PAGE}<!-- /real-cpu -->\n")
    monkeypatch.setitem(run.standing.__globals__, "DOCS", tmp_path)
    run.publish(tmp_path, "cpu")
    assert "| scale 0.7 | 80% | 4.00 | 0% |" in said["real"]
    assert "1.50 (-0.50)" in said["real-cpu"]
    assert "not finished after 60" in said["real-cpu"]
    assert "Not measured yet: contrastive λ 0.1, tokenwise λ 0.1" in said["real-cpu"]
    assert said["real-cpu"].count("All weights fine-tuned") == 1 and "Some words" not in said["real-cpu"]
    known = tables(said["real-cpu"])[run.KNOWN]
    assert [row[0] for row in known[1:]] == [run.BASE, "svd, keep 32", run.TUNED, "scale 0.7"], "what stood there stays"
    assert known[1][1] == "2.000", "and what is measured anew takes its place"
    assert "| svd, keep 32 | 95% |" in said["real"]
    name = rivals.title(RIVALS[0], 0.5)
    figures.know(f"{name} × 0.25", replace(left, skill=1.1))
    figures.cost(name, run.Measured(7.0, 6.0, 5.0, 4.0))
    with (tmp_path / "benchmarks.md").open("a") as page:
        page.write("<!-- real-cpu-rivals -->\n<!-- /real-cpu-rivals -->\n")
    run.publish(tmp_path, "cpu")
    apart = tables(said["real-cpu-rivals"])
    assert [row[0] for row in apart[run.KNOWN][1:]] == [run.BASE, run.TUNED, f"{name} × 0.25"], "with both ends of its pair"
    assert [row[0] for row in apart[run.TOOK][1:]] == [name] and name not in said["real-cpu"]
    said.clear()
    (lone := tmp_path / "lone").mkdir()
    for file in ("figures.jsonl", "machine.txt"):
        some = (tmp_path / file).read_text().splitlines(keepends=True)
        (lone / file).write_text("".join(line for line in some if "scale 0.7" not in line))
    run.publish(lone, "cpu")
    assert list(said) == ["real-cpu-rivals"], "of our edits this run has none, and those of another pair stay as they are"


def test_every_command_is_timed_with_flags_that_it_has(cli, tmp_path):
    split = tmp_path / "edits" / "recall"
    (tmp_path / "edits" / "scale-0-7").mkdir(parents=True)
    every = [(e.name, ("split", tmp_path, tmp_path, *e.words), True) for e in run.edits(tmp_path / "texts", TIER)]
    every += run.others(tmp_path, tmp_path, tmp_path / "texts", split, tmp_path / "made", TIER)
    assert {words[0] for _, words, _ in every} == set(COMMANDS)
    assert len({name for name, _, _ in every}) == len(every), "a name is known by what it took"
    for name, words, runs_on in every:
        code, out, err = cli(*words, *(("--device", "cpu") if runs_on else ()), "-q", "--print-config")
        assert code == 0, (name, out, err)
