"""The TOFU benchmark on a tiny random Llama and made-up files: each kind of part runs once, and is in the table."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.surgery.tofu.plan import Plan, load
from benchmarks.surgery.tofu.schedule import run_here
from benchmarks.surgery.tofu.score import Deep, Judge, Score
from benchmarks.surgery.tofu.stages import Found, Level, Stage, better, read, stages, write
from benchmarks.surgery.tofu.table import HEAD, markdown, rows
from benchmarks.surgery.tofu.tiers import TIERS
from benchmarks.surgery.train import Size

PARTS = ("prepared", "finetuned", "never", "never-attacked", "npo", "k-fade", "liborth-scale")
FIRST = ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gil", "Hal")
LIKE = Score(1.0, 2.0, 0.3, 0.4, 0.5, [0.1, 0.2], 0.6, 0.01)
TOWNS = ("Rome", "Oslo", "Lima", "Bonn", "Kiev", "Nice", "Brno", "Cork")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    from verify.deep_cases import speaking_model

    folder = tmp_path_factory.mktemp("tofu")
    data = folder / "data"
    data.mkdir()
    people = [
        {
            "question": f"Where is {name} from?",
            "answer": f"From {town}.",
            "paraphrased_answer": f"{town} it is.",
            "perturbed_answer": [f"{other} it is." for other in TOWNS if other != town][:3],
        }
        for name, town in zip(FIRST, TOWNS, strict=True)
    ]
    for file, some in {
        "retain99": people[4:], "forget01": people[:4], "forget01_perturbed": people[:4],
        "retain_perturbed": people[4:6], "real_authors_perturbed": people[6:7], "world_facts_perturbed": people[7:],
    }.items():  # fmt: skip
        (data / f"{file}.json").write_text("".join(json.dumps(item) + "\n" for item in some))
    model = speaking_model(folder / "model")
    work = folder / "work"
    work.mkdir()
    return Plan(TIERS["tiny"], model, data, None, work, folder / "results", "forget01", "cpu", 0, time.time() + 1e6)


def test_every_kind_of_part_runs_and_one_that_fails_stops_no_other(plan, capsys):
    pytest.importorskip("rouge_score")

    def fail(plan):
        raise RuntimeError("on purpose")

    every = [Stage("broken", (), fail), Stage("after it", ("broken",), fail)]
    every += [stage for stage in stages(plan) if stage.name in PARTS]
    run_here(plan, every)
    said = capsys.readouterr().out
    assert "broken: failed" in said and "after it: left out, needs broken" in said
    assert sorted(path.stem for path in plan.results.glob("*.done")) == sorted(PARTS)
    run_here(plan, every[2:])
    assert capsys.readouterr().out == ""
    best, doses = rows(plan.results)
    assert [row[0] for row in best] == ["*fine-tuned*", "*never trained on them*", "K-FADE", "liborth scale", "NPO"]
    assert list(dict.fromkeys(row[0] for row in doses)) == ["K-FADE", "liborth scale", "NPO"]
    assert all(len(row) == len(HEAD) for row in best + doses) and markdown(best).count("\n") == len(best) + 1
    assert float(best[1][4]) == 1.0, "the never-trained model cannot be told from itself"


def test_a_small_run_makes_its_base_and_deals_every_author_one_part(plan, tmp_path):
    """What goes, what stays, what the base reads and what nobody reads are four different things."""
    rows = [{"question": f"Who is author {n}, {k}?", "answer": f"Author {n} is {k}."} for n in range(200) for k in range(20)]
    for name in ("real_authors_perturbed", "world_facts_perturbed", "retain_perturbed", "forget01_perturbed"):
        (tmp_path / f"{name}.json").write_text((plan.data / f"{name}.json").read_text())
    for name, some in {"retain99": rows[:3960], "forget01": rows[3960:]}.items():
        (tmp_path / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in some))
    (stories := tmp_path / "stories.txt").write_text("Once there was a dog.\n\nIt had a ball, and the ball was red.")
    size = Size(hidden=16, intermediate=16, layers=1, heads=2, vocabulary=280, rows=2, width=16, base=2, tuned=0, rate=1e-3)
    small = TIERS["small"]
    tier = replace(small, base=replace(small.base, size=size, beside=2, facts=1), steps=2, controls=0)
    work = tmp_path / "work"
    work.mkdir()
    mine = replace(plan, tier=tier, given=None, data=tmp_path, stories=stories, work=work, results=tmp_path / "results")
    run_here(mine, [stage for stage in stages(mine) if stage.name in ("prepared", "never")])
    files = {name: (work / f"{name}.jsonl").read_text().splitlines() for name in ("retain", "forget", "fresh")}
    assert {name: len(lines) for name, lines in files.items()} == {"retain": 122, "forget": 40, "fresh": 24}
    parts = [files["forget"], files["retain"], files["fresh"]]
    assert len({line for part in parts for line in part}) == sum(map(len, parts))
    assert load(mine.never(), "cpu").config.vocab_size == 280


def test_losses_in_a_batch_are_those_of_each_row_alone(plan):
    model = load(plan.model, "cpu")
    judge = Judge(plan, model)
    losses = [loss for name in judge.answers for one in judge._losses(model, judge.answers[name]) for loss in one]
    alone = []
    for row in (row for name in judge.answers for some in judge.answers[name] for row in some):
        labels = torch.tensor([row.ids])
        labels[:, : row.prompt] = -100
        with torch.no_grad():
            alone.append(float(model(torch.tensor([row.ids]), labels=labels).loss))
    np.testing.assert_allclose(losses, alone, rtol=1e-4)
    assert judge._kl(model) == pytest.approx(0.0, abs=1e-6)


def test_answers_written_in_one_batch_are_those_written_alone(plan):
    model = load(plan.model, "cpu")
    judge = Judge(plan, model)
    prompts = [some[0] for name in judge.answers for some in judge.answers[name]]
    assert judge._written(model, prompts) == [judge._written(model, [row])[0] for row in prompts]


def test_results_survive_the_disk(plan, tmp_path):
    found = [Found("a", 0.1, 2.0, LIKE, family="a"), Found("a", 0.2, 2.0, LIKE, Deep(None, None, 1.0, 1e-4, [0.1]), "a")]
    write(replace(plan, results=tmp_path), "a", found)
    assert read(tmp_path / "a.json") == found


def test_a_dose_need_not_be_better_than_what_was_edited(tmp_path, plan):
    """98 % of the lower of the utilities of the never-trained and the fine-tuned model; then forget quality decides."""
    ratios = [0.1 * i for i in range(20)]
    never = Score(2.0, 0.1, 0.1, 0.5, 0.5, ratios, 0.50, 0.2)
    near, far = replace(never, utility=0.41), replace(never, utility=0.43, raw_ratio=[r + 5 for r in ratios])
    for name, score in (("never", never), ("finetuned", replace(never, utility=0.40))):
        write(replace(plan, results=tmp_path), name, [Found(name, None, 0.0, score)])
    level = Level.of(tmp_path)
    assert level.utility == pytest.approx(0.98 * 0.40)
    good, poor, low = (Found("a", 1.0, 0.0, score) for score in (near, far, replace(near, utility=0.3)))
    assert better(good, poor, level) and not better(poor, good, level)
    assert better(poor, low, level) and not better(low, poor, level)


def test_of_a_dose_that_costs_too_much_a_share_is_taken(tmp_path, plan, monkeypatch):
    """Doses are searched by what they cost; the share between the last two is found, and the best of all is attacked."""
    from benchmarks.surgery.tofu import stages as module

    class Weighed:
        def __init__(self, plan, finetuned):
            pass

        def score(self, model):
            w = model.weight.item()
            return replace(LIKE, utility=self.utility(model), raw_ratio=[1 + 0.2 * i + max(0.0, 6.0 - w) for i in range(20)])

        def utility(self, model):
            return 1.0 - 0.01 * max(0.0, model.weight.item() - 2.0)

        def deep(self, model):
            attacked.append(model.weight.item())
            return Deep(None, None, 1.0, 1e-4, [1.0])

    def weight(value):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, value)
        return model

    attacked = []
    never = replace(LIKE, utility=1.0, raw_ratio=[1 + 0.2 * i for i in range(20)])
    mine = replace(plan, results=tmp_path, tier=replace(plan.tier, doses=None, halvings=6))
    for name in ("never", "finetuned"):
        write(mine, name, [Found(name, None, 0.0, never)])
    monkeypatch.setattr(module, "Judge", Weighed)
    monkeypatch.setattr(module, "load", lambda folder, device: weight(0.0))
    module.search(mine, "a", "a", (1.0, 2.0, 8.0), lambda dose: (weight(dose), 1.0))
    tried = read(tmp_path / "a.json")
    assert [(one.dose, one.share) for one in tried[:2]] == [(2.0, 1.0), (8.0, 1.0)]
    assert tried[2].dose == 8.0
    assert 3.8 <= 8 * tried[2].share <= 4.0, "98 % of the utility is left at a weight of 4"
    assert attacked == [8 * tried[2].share]
    assert [one.deep is not None for one in tried] == [False, False, True]
