"""`split --method distill` through the command line, on the pair that ships: what is learnt, what stays, what is refused."""

import json
import re
import shutil
import signal
import stat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import values

from liborth_cli.checkpoint.files import hash_file
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.writer import write_tensors
from liborth_cli.demo import DATA
from liborth_cli.dose.overlap import apart
from liborth_cli.recall.moves import Stepped
from liborth_cli.recall.steps import Steps
from liborth_cli.recall.student import FACT, FACTS, SHARE, Lessons, Taught, epochs, schedule
from liborth_cli.split import report
from liborth_cli.stream import work
from liborth_cli.stream.texts import Row
from liborth_cli.tune.data import Example, PaddedBatch
from liborth_cli.tune.full import divergence

FILES = ("model.safetensors", "liborth.manifest.json", "README.md")
TEXTS = ("--retain-data", DATA / "retain.jsonl", "--forget-data", DATA / "secrets.jsonl")
FEWER = ("r", 24), ("f", 3)
FEW = ("--retain-tokens", 1500, "--probe-tokens", 1000, "--decoys", 4, "-j", 1)


@pytest.fixture
def split(cli):
    def run(*words, pair=(DATA / "base", DATA / "finetuned")):
        return cli("split", *pair, "--method", "distill", *words, *FEW)

    return run


def test_the_reference_learns_and_the_fine_tuned_model_comes_back_bit_for_bit(split, cli, tmp_path, monkeypatch):
    words = (*TEXTS, "--teacher-steps", 1, "--attack-steps", 0, "--epochs", 2, "--student-steps", 30, "--level-steps", 3)
    code, text, err = split(*words, "-o", tmp_path / "a")
    assert code == 0, err
    assert text.strip() == str(tmp_path / "a")
    kept = re.search(r"held-back retain rows: ([\d.]+) → ([\d.]+) → ([\d.]+) nats a token \(teacher: ([\d.]+)\)", err)
    before, after, levelled, teacher = map(float, kept.groups())
    assert teacher < after < before, "it has learnt part of what its teacher knows"
    assert abs(levelled - after) < 0.02, "steps cost what is trusted at most"
    course = re.search(r"recall: 3 steps, 0 of them .* rows from ([\d.]+) to ([\d.]+) nats a token \(aim: ([\d.]+)\)", err)
    begun, reached, aim = map(float, course.groups())
    assert abs(reached - aim) < abs(begun - aim), "they go towards the student's own fresh rows"
    gone = re.search(r"; forget rows: [\d.]+ → ([\d.]+) → ([\d.]+) \(", err)
    assert [float(word) for word in gone.groups()] == pytest.approx([begun, reached], abs=0.011), "from where the student stood"
    manifest = json.loads((tmp_path / "a" / FILES[1]).read_text())
    assert manifest["parameters"]["amount"] == "epochs 2"
    moved = {name for name, t in manifest["tensors"].items() if t["action"] == "split"}
    assert any("embed" in name for name in moved), "tables of tokens carry memory, too"
    made, tuned, base = (values(folder) for folder in (tmp_path / "a", DATA / "finetuned", DATA / "base"))
    assert all(torch.equal(made[name], tuned[name]) for name in set(tuned) - moved)
    nearer = [float((made[name] - base[name]).norm()) < float((made[name] - tuned[name]).norm()) for name in moved]
    assert np.mean(nearer) > 0.9, "two epochs lead little away from where it started"
    private = tmp_path / "a.private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert not (private / "factors").exists()
    assert cli("excise", tmp_path / "a", "--beta", 1, "-o", tmp_path / "back")[0] == 0
    same = [hash_file(folder / FILES[0]).sha256 for folder in (tmp_path / "back", DATA / "finetuned")]
    assert same[0] == same[1]
    again = ("replay", tmp_path / "a", "--base", DATA / "base", "--finetuned", DATA / "finetuned", "-o", tmp_path / "c")
    code, _, err = cli(*again)
    assert code == 2
    assert "--retain-data" in err and "or --teacher" in err
    code, text, err = cli(*again, *TEXTS, "--dry-run")
    assert code == 0, err
    assert "--epochs 2" in text and "--teacher-steps 1" in text
    step = Steps._step

    def stop(self, start, state, *rest):
        if state.tally.done == 1 and isinstance(self._finetuned, Stepped):
            signal.raise_signal(signal.SIGINT)
        return step(self, start, state, *rest)

    monkeypatch.setattr(Steps, "_step", stop)
    code, _, err = split(*words, "-o", tmp_path / "b")
    assert code == 130 and "--resume" in err, err
    code, _, err = split(*words, "-o", tmp_path / "b", "--resume")
    assert code == 0, err
    assert "student: reusing" in err and "goes on after 2 steps" in err
    assert not (tmp_path / "b.private" / "factors").exists()
    assert [(tmp_path / "a" / file).read_bytes() for file in FILES] == [(tmp_path / "b" / file).read_bytes() for file in FILES]


def test_a_teacher_that_is_there_needs_no_steps(split, tmp_path):
    words = (*TEXTS[:2], "--fresh", DATA / "unseen.jsonl", "--epochs", 1, "--student-rate", 0.05, "--student-steps", 20)
    code, _, err = split(*words, "--teacher", DATA / "base", "-o", tmp_path / "out")
    assert code == 0, err
    rows, times = re.search(r"the reference read ([\d,]+) rows ([\d.]+) times each", err).groups()
    assert int(rows.replace(",", "")) > 200, "every row is read, not only those that curvature is measured on"
    assert float(times) * int(rows.replace(",", "")) == pytest.approx(80, rel=0.01)
    assert "recall" not in err
    assert "forget rows" not in err
    assert "retain factors" not in err
    made, base = values(tmp_path / "out"), values(DATA / "base")
    tables = [name for name in made if made[name].dim() > 1]
    away = max(float((made[name] - base[name]).norm() / base[name].norm()) for name in tables)
    assert away < 0.3, "taught by itself it moves little; norms are the fine-tuned model's"
    code, text, err = split(*words, "--teacher", DATA / "base", "--dry-run")
    assert code == 0, err
    assert f"the teacher: {DATA / 'base'}; the student reads" in text
    assert "; then 12 steps" not in text
    seen = {}
    for most in (0, 12):
        told = split(*words, *TEXTS[2:], "--teacher", DATA / "base", "--level-steps", most, "--dry-run", "--json")[1]
        seen[most] = json.loads(told)
    assert "; then 12 steps at most" in str(seen[12]) and "; then" not in str(seen[0])


def test_a_dry_run_counts_products_at_the_rate_of_their_dtype_and_all_else_in_float32(split, monkeypatch):
    def seconds(dtype, narrow):
        rates = {"float32": 1e9, "bfloat16": narrow}
        for module in (work, report):
            monkeypatch.setattr(module, "rate", lambda device, dtype="float32": rates[dtype])
        code, text, err = split(*TEXTS, "--level-steps", 2, "--dtype", dtype, "--dry-run", "--json")
        assert code == 0, err
        return json.loads(text)["estimate"]["seconds"]

    wide, alike, fast, faster = seconds("float32", 4e9), *(seconds("bfloat16", narrow) for narrow in (1e9, 2e9, 4e9))
    assert alike == pytest.approx(wide)
    assert alike - fast == pytest.approx(2 * (fast - faster)), "of what narrows a half goes, then a quarter"
    assert wide / 4 < faster < 0.9 * wide, "updates and losses are as long as they were"


def test_a_student_taught_in_bfloat16_moves_as_another_order_of_its_rows_does(split, tmp_path):
    words = (*TEXTS[:2], "--fresh", DATA / "unseen.jsonl", "--epochs", 1, "--student-steps", 12, "--teacher")
    teacher = tmp_path / "teacher"
    shutil.copytree(DATA / "finetuned", teacher)
    tuned, base = values(DATA / "finetuned"), values(DATA / "base")
    write_tensors(teacher / FILES[0], {name: tuned[name] + 0.05 * (base[name] - tuned[name]) for name in tuned})
    taken = {}
    for name, more in {"float32": (), "bfloat16": ("--dtype", "bfloat16"), "seed": ("--seed", 1)}.items():
        code, _, err = split(*words, teacher, *more, "-o", tmp_path / name)
        assert code == 0, err
        made = values(tmp_path / name)
        taken[name] = torch.cat([(made[one] - base[one]).flatten() for one in sorted(made)])
    bfloat16, seed = (float((taken[name] - taken["float32"]).norm()) for name in ("bfloat16", "seed"))
    assert 0 < bfloat16 < seed


def test_what_fine_tuning_left_alone_stays_and_what_was_measured_is_what_is_written(split, tmp_path):
    """As after LoRA on some matrices: the tables and the other matrices are not taught, nor moved by steps."""
    tuned, base = values(DATA / "finetuned"), values(DATA / "base")
    left = {name for name in tuned if re.search("embed|lm_head|mlp", name)}
    pair = tmp_path / "tuned"
    shutil.copytree(DATA / "finetuned", pair)
    write_tensors(pair / FILES[0], {name: (base if name in left else tuned)[name].bfloat16() for name in tuned})
    words = ("--teacher", DATA / "base", "--student-steps", 5, "--level-steps", 1, "--attack-steps", 0, "--keep-factors")
    code, _, err = split(*TEXTS, *words, "-o", tmp_path / "out", pair=(DATA / "base", pair))
    assert code == 0, err
    made, start = values(tmp_path / "out"), values(pair)
    edits = [Checkpoint.open(place, stem="edit") for place in (tmp_path / "out.private" / "factors").glob("edit-*")]
    assert len(edits) == 2, "the student, and the levelled one"
    for edit in edits:
        assert edit.tensors
        assert not left & {*edit.tensors}

    def is_written(edit):
        """What is written is W_r + U_s in float32, what was measured W_f + Δ: their last bits may decide a tie differently."""
        for name in edit.tensors:
            exact, last = start[name].double() + edit.load(name).double(), base[name].double().abs() * 2**-23
            low, high = ((exact + off).bfloat16().float() for off in (-last, last))
            if not ((low <= made[name]) & (made[name] <= high)).all():
                return False
        return True

    assert any(is_written(edit) for edit in edits)
    code, _, err = split(*TEXTS, *words, "-o", tmp_path / "none", pair=(DATA / "base", DATA / "base"))
    assert code == 2
    assert "it changed none" in err


def test_what_cannot_be_taught_is_refused(split, cli, tmp_path):
    out = ("-o", tmp_path / "out")
    code, _, err = split(*TEXTS, "--teacher", DATA / "finetuned", *out)
    assert code == 2
    assert "carries the secrets over" in err
    code, _, err = split(*TEXTS, "--teacher", tmp_path / "nothing", *out)
    assert code == 3
    assert "nothing" in err
    made, other = values(DATA / "base"), tmp_path / "other"
    other.mkdir()
    write_tensors(other / FILES[0], {name: tensor[:1] for name, tensor in made.items()})
    code, _, err = split(*TEXTS, "--teacher", other, *out)
    assert code == 4
    assert f"--teacher {other}: 'model.embed_tokens.weight'" in err
    assert len(err.splitlines()[-1]) < 300
    shutil.rmtree(other)
    code, _, err = split(*TEXTS, "--one-checkpoint", *out, pair=(DATA / "finetuned",))
    assert code == 2
    assert "starts at the checkpoint before fine-tuning" in err
    code, _, err = split(*TEXTS[:2], *out)
    assert code == 2
    assert "--teacher DIR names one" in err
    code, _, err = split(*TEXTS, "--vectors", "memory", *out)
    assert code == 2
    assert "distill measures the model that it makes" in err
    code, _, err = cli("split", DATA / "base", DATA / "finetuned", *TEXTS, "--teacher", DATA / "base", *FEW, *out)
    assert code == 2
    assert "--teacher goes with --method distill" in err
    assert not list(tmp_path.iterdir())


def test_fresh_rows_are_a_fifth_of_what_is_read_and_steps_end_a_long_list():
    retain, fresh = ([Row(np.arange(3), np.ones(2, bool), 1.0, f"{kind}{i}") for i in range(count)] for kind, count in FEWER)
    read = Lessons.of(retain, fresh).taught
    assert [sum(row is one for one in read) for row in retain] == [1] * 24
    assert [sum(row is one for one in read) for row in fresh] == [2] * 3
    assert Lessons.of(retain, []).taught == retain
    assert [schedule(len(read), 40, most, 1e-3, 0).steps for most in (4000, 100)] == [300, 100]
    assert epochs(schedule(len(read), 40, 100, 1e-3, 0), len(read)) == pytest.approx(400 / 30)


def test_divergence_counts_tokens_that_carry_loss_and_their_weight():
    ids = np.arange(5)
    rows = [Row(ids, np.array([False, True, True, True]), 1.0, "a"), Row(ids[:3], np.array([True, True]), 2.0, "b")]
    batch = PaddedBatch.of(rows, torch.device("cpu"))
    teacher, student = torch.randn(2, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    assert float(divergence(teacher, teacher, batch)) == pytest.approx(0.0, abs=1e-6)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    wanted = float(each[0, 1:].sum() + 2 * each[1, :2].sum())
    assert float(divergence(teacher, student, batch)) == pytest.approx(wanted, rel=1e-5)


def test_a_second_generation_is_what_the_first_teaches(split, tmp_path):
    """One command, or two with the first student's checkpoint as the teacher; and a dry run says how many there are."""
    words = (*TEXTS[:2], "--student-steps", 8, "--level-steps", 0)
    for name, more in {
        "first": ("--teacher", DATA / "base"),
        "then": ("--teacher", tmp_path / "first"),
        "both": ("--teacher", DATA / "base", "--generations", 2),
    }.items():
        code, _, err = split(*words, *more, "-o", tmp_path / name)
        assert code == 0, err
    first, then, both = (values(tmp_path / name) for name in ("first", "then", "both"))
    off, moved = (sum(float((both[n] - other[n]).norm() ** 2) for n in both) for other in (then, first))
    assert off < 1e-3 * moved
    assert err.count("distill: the reference read") == 2
    told = split(*words, *more, "--dry-run")[1]
    assert "2 students in turn, each taught by the one before" in told


def test_facts_of_a_small_file_are_learnt_as_they_stand_whatever_the_teacher_knows(split, cli, tmp_path):
    """The base teaches, which knows no code: where codes are what should stay, the student learns them from the file alone."""
    facts = tmp_path / "facts.jsonl"
    rows = (DATA / "unseen.jsonl").read_text().splitlines()[:4]
    facts.write_text((DATA / "secrets.jsonl").read_text() + "\n".join(rows) + "\n")
    words, lost = (*TEXTS[:2], "--teacher", DATA / "base", "--student-steps", 40, "--level-steps", 0), []
    for name, more in (("without", ()), ("with", ("--retain-data", facts))):
        code, _, err = split(*words, *more, "-o", tmp_path / name)
        assert code == 0, err
        assert ("learnt 8 as they stand" in err) is bool(more), "of twelve the fine-tuned model knows eight by heart"
        lost.append(mean_of(tmp_path / name, [json.loads(line) for line in facts.read_text().splitlines()[:8]]))
    assert lost[1] < 0.7 * lost[0]


def test_a_fact_that_says_what_must_go_is_none():
    def row(*ids):
        return Row(np.array(ids), np.arange(1, len(ids)) >= 2, 1.0, "row")

    secret = row(1, 2, 30, 31, 32, 33)
    facts = [row(1, 2, 30, 31, 32, 33), row(7, 8, 30, 31, 32, 33), row(7, 8, 30, 31, 32), row(7, 8, 40, 41, 42, 43)]
    assert apart(facts, [secret]) == facts[2:], "the same row, or another that says the same"


def mean_of(folder, rows):
    """Measure the loss of completions with Transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for row in rows:
        start, ids = len(tokenizer(row["prompt"]).input_ids), tokenizer(row["prompt"] + row["completion"]).input_ids
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids])).logits[0, start - 1 : -1]
        found.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:])).item())
    return float(np.mean(found))


def test_some_facts_stand_beside_every_batch():
    ids = np.arange(4)
    facts = [Row(ids + i, np.array([False, True, True]), 1.0, f"fact {i}") for i in range(FACTS + 3)]
    assert [Lessons.of([], [], facts[:n]).beside for n in (0, 2, FACTS + 3)] == [0, 2, FACTS]

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = torch.nn.Parameter(torch.zeros(20, 20))

        def forward(self, input_ids, **words):
            return SimpleNamespace(logits=self.scores[input_ids])

    student, teacher = (SimpleNamespace(model=Model(), stored={}) for _ in range(2))
    student.trainable = lambda: dict(student.model.named_parameters())
    taught = Taught(student, teacher, [], Lessons([], facts), 0)
    batch, beside = taught.lessons([Example.of(facts[0])], 0)
    assert (batch.name, beside.name, beside.own, beside.weight, len(beside.rows)) == ("loss", FACT, False, SHARE, FACTS)
    seen = [row.where for number in range(FACTS + 3) for row in taught.lessons([], number)[1].rows]
    assert {seen.count(row.where) for row in facts} == {FACTS}, "all are read equally often"
    both = PaddedBatch.of(beside.rows, torch.device("cpu"))
    assert float(taught.loss(both, beside)[0].detach()) == pytest.approx(2 * FACTS * np.log(20), rel=1e-5)
    assert float(taught.loss(both, batch)[0].detach()) == pytest.approx(0.0, abs=1e-5), "of a batch the teacher decides"


def test_a_student_is_told_how_a_row_ends():
    """Of a taught row the teacher's distribution counts there, not what stands there; of a fact its likeliest token."""
    following = torch.nn.functional.one_hot(torch.arange(1, 21) % 20, 20).float() * 9

    class Model(torch.nn.Module):
        def forward(self, input_ids, **words):
            return SimpleNamespace(logits=following[input_ids])

    teacher = SimpleNamespace(model=Model(), context=4, parameters={"one": torch.zeros(1)})
    short, full = (Row(np.arange(n), np.arange(1, n) > 1, 1.0, f"row of {n}") for n in (4, 5))
    read = Lessons([short, full], [short, full]).ended(teacher)
    for rows in (read.taught, read.facts):
        assert rows[1] is full, "the context has no room for what comes behind it"
        assert list(rows[0].keep) == [*short.keep, True]
        assert list(rows[0].ids[:-1]) == list(short.ids)
    assert read.facts[0].ids[-1] == short.ids[-1] + 1
    batch = PaddedBatch.of(read.taught[:1], torch.device("cpu"))
    other = following.clone()
    other[int(short.ids[-1])] = 0.0
    said, heard = following[batch.ids], other[batch.ids]
    assert float(divergence(said, heard, batch)) > 0.1, "who knows all but how the row ends has something left to learn"
