"""The TOFU benchmark on a tiny random Llama and made-up files: each kind of part runs once, and is in the table."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.record import section_of
from benchmarks.rivals import RIVALS
from benchmarks.surgery.tofu import __main__ as command
from benchmarks.surgery.tofu.plan import Plan, load
from benchmarks.surgery.tofu.schedule import run_here
from benchmarks.surgery.tofu.score import Deep, Judge, Score
from benchmarks.surgery.tofu.stages import OURS, Found, Level, Stage, _file, better, prepare, read, stages, write
from benchmarks.surgery.tofu.table import BEST, DOSES, HEAD, markdown, open_edits, rows
from benchmarks.surgery.tofu.tiers import TIERS
from benchmarks.surgery.tofu.written import Cooling, _continued, _ids, asked, beginning, written
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
    facts = {name: json.loads((tmp_path / f"{name}_perturbed.json").read_text()) for name in ("real_authors", "world_facts")}
    prepare(replace(mine, facts=True))
    told = [json.loads(line) for line in (work / "retain.jsonl").read_text().splitlines()[122:]]
    assert [(row["prompt"], row["completion"]) for row in told] == [
        (f"Question: {fact['question']}\nAnswer: ", fact["answer"]) for fact in facts.values()
    ], "what the never-trained model was trained on is given, and nothing else"


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
    assert attacked == [8 * tried[2].share, 8.0], "what passes the test is looked at whole, whatever it costs"
    assert [one.deep is not None for one in tried] == [False, True, True]


def test_every_edit_of_the_table_is_a_part(plan):
    names = [stage.name for stage in stages(plan)]
    edits = [_file(name) for name in (*OURS, *(rival.name for rival in RIVALS))]
    assert len(set(edits)) == len(edits) and set(edits) <= set(names)
    others = {name.removesuffix("-attacked").removesuffix("-again") for name in set(names) - set(edits)}
    assert {name for name in others if not name.startswith("factors")} == {"prepared", "lessons", "base", "finetuned", "never"}


def test_a_base_goes_on_from_what_all_questions_begin_with(plan, monkeypatch):
    """It asks by itself, a teacher answers; what is asked once is not read, and what is no question."""
    from benchmarks.surgery.tofu import written as module

    assert beginning(["Question: Who is", "Question: What is", "Question: Who was"]) == "Question:"
    assert asked("Question: Who?\nAnswer: Ada") == "Question: Who?\nAnswer: "
    assert asked("Question: Who?") == asked("Question: a\nAnswer: b\nAnswer: c") == ""
    said = []

    def continued(plan, model, rows, most, **how):
        said.append([plan.encoder.decode(row) for row in rows])
        return (
            [" she?\nAnswer: Ed"] * 5 + [" he?\nAnswer: Ed"] + [" Nobody."] * 2
            if how["do_sample"]
            else [" Ada" for row in rows]
        )

    monkeypatch.setattr(module, "_continued", continued)
    mine = replace(plan, tier=replace(plan.tier, own=8))
    found = [record.prompt + record.text for record in written(mine, plan.model)]
    assert found == ["Question: Where is she?\nAnswer: Ada"] * module.COPIES
    assert said == [["Question: Where is"] * 8, ["Question: Where is she?\nAnswer:"]]
    assert written(plan, plan.model) == [], "where the tier asks for none there are none"


def test_it_really_writes_and_what_ends_is_cut(plan):
    mine = replace(plan, tier=replace(plan.tier, own=4))
    texts = _continued(mine, load(plan.model, "cpu"), [_ids(mine, "Question: Where")] * 3, 8, do_sample=False)
    assert len(set(texts)) == 1 and texts[0], "no row's padding changes what another says"
    assert all(record.prompt.startswith("Question: Where is") and record.text for record in written(mine, plan.model))


def test_the_heat_falls_to_the_last_of_its_tokens_and_stays():
    cool, logits = Cooling(begin=2, hot=1.0, cold=0.5, tokens=4), torch.ones(1, 3)
    heats = [1 / cool(torch.zeros(1, 2 + step, dtype=torch.long), logits)[0, 0].item() for step in (0, 2, 4, 9)]
    assert heats == pytest.approx([1.0, 0.75, 0.5, 0.5])


def test_what_a_run_lacks_stays_on_the_page_and_what_it_has_replaces_it(plan, tmp_path, monkeypatch):
    """An edit that ran again is there with its new doses alone, whole rows of it; all others are as they were."""
    from benchmarks import record

    monkeypatch.setattr(record, "DOCS", tmp_path)
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- tofu-tiny -->\n<!-- /tofu-tiny -->\nafter\n")
    never, deep = replace(LIKE, utility=1.0), Deep(1.0, 0.5, 3.0, 1e-4, [0.1, 0.2])

    def run(folder, head, found):
        results = replace(plan, results=folder)
        for name in ("never", "finetuned"):
            write(results, name, [Found(name, None, 0.0, never)])
        for name, some in found.items():
            write(results, name, [Found(name, dose, 1.0, LIKE, deep if dose == 1 else None, name) for dose in some])
        (folder / "run.txt").write_text(f"tiny\n{head}\n")
        command.publish(folder)
        return section_of(page.read_text(), "tofu-tiny")[1]

    first = run(tmp_path / "one", "Machine one.", {"NPO": [1, 2], "RMU": [1, 3, 4]})
    assert [line.split(" | ")[:2] for line in first.splitlines() if "NPO" in line or "RMU" in line][1:] == [
        ["| NPO", "1"], ["| RMU", "1"], ["| NPO", "1"], ["| NPO", "2"], ["| RMU", "1"], ["| RMU", "3"], ["| RMU", "4"],
    ]  # fmt: skip
    second = run(tmp_path / "two", "Machine two.", {"RMU": [2], "liborth svd": [1]})
    assert second.startswith("Machine two. Not done to the end: ") and "Machine one" not in second
    assert BEST in second and DOSES in second and page.read_text().endswith("<!-- /tofu-tiny -->\nafter\n")
    got = [line.split(" | ")[:2] for line in second.splitlines() if line.startswith(("| NPO", "| RMU", "| lib"))]
    assert got[:3] == [["| liborth svd", "1"], ["| NPO", "1"], ["| RMU", "2"]]
    assert got[3:] == [["| liborth svd", "1"], ["| NPO", "1"], ["| NPO", "2"], ["| RMU", "2"]]
    left = second.splitlines()[0].rpartition("end: ")[2].rstrip(".").split("; ")
    assert "RMU" in left and "NPO" not in left and "liborth svd" not in left, "the new dose of RMU was not attacked"
    assert open_edits([list(HEAD)])[: len(OURS)] == list(OURS)


def test_a_student_is_taught_without_the_forget_rows_and_levelled_with_them(plan, tmp_path, monkeypatch):
    """Its seconds are those of the teacher, of the texts, of the student and of the steps at the end."""
    from benchmarks.surgery.tofu import stages as module
    from liborth_cli.stream.records import Record

    mine = replace(plan, work=tmp_path, results=tmp_path / "results")
    said, own = list[list[str]](), Record("written", text="Yes.", prompt="Question: Is it?\nAnswer: ")

    def liborth(plan, *words):
        said.append([str(word) for word in words])
        return 10.0

    monkeypatch.setattr(module, "liborth", liborth)
    monkeypatch.setattr(module, "written", lambda plan, teacher: [own])
    monkeypatch.setattr(module, "load", lambda folder, device: folder)
    monkeypatch.setattr(module, "search", lambda plan, name, stage, doses, edit: found.append(edit(doses[0])))
    found = []
    module.lessons(mine)
    module.distil(mine, "liborth-distill")
    lines = (tmp_path / module.LESSONS).read_text().splitlines()
    assert len(lines) == module.OFTEN * len(plan.given_records()) + 1 and len(set(lines)) == len(plan.given_records()) + 1
    teacher, student, level = said
    assert "--forget-data" in teacher and "--forget-data" not in student and "--forget-data" in level
    assert student[student.index("--teacher") + 1] == teacher[teacher.index("-o") + 1]
    assert student[student.index("--retain-data") + 1] == str(tmp_path / module.LESSONS)
    assert level[2] == student[student.index("-o") + 1] and found[0][0] == tmp_path / "liborth-distill-1.0"
    assert 30.0 <= found[0][1] < 31.0
