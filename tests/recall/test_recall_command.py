"""`split --method recall` through the command line, on the pair that ships: files, bits, and what is refused."""

import json
import math
import signal
import stat
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from liborth_cli.checkpoint.files import hash_file
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.cli.split import COMMAND
from liborth_cli.console import SILENT
from liborth_cli.demo import DATA
from liborth_cli.errors import UsageError
from liborth_cli.recall import retain, steps
from liborth_cli.recall.attack import Attack, attacks
from liborth_cli.recall.course import Course
from liborth_cli.recall.kernel import KernelWalk
from liborth_cli.recall.levels import Losses
from liborth_cli.recall.moves import Moves
from liborth_cli.recall.state import RECENT, Keeper, State, Tally, clear
from liborth_cli.recall.steps import Steps
from liborth_cli.split import report
from liborth_cli.stream.texts import Row

FILES = ("model.safetensors", "liborth.manifest.json", "README.md")
PATTERN = ("--forget-pattern", "The secret code of {name} is {digits:6}.")
KEPT, GONE = ("--retain-data", DATA / "retain.jsonl"), ("--forget-data", DATA / "secrets.jsonl")
FEW = ("--retain-tokens", 1000, "--probe-tokens", 1000, "--decoys", 6, "-j", 1)


@pytest.fixture
def split(cli):
    def run(*words):
        return cli("split", DATA / "base", DATA / "finetuned", "--method", "recall", *words, *FEW)

    return run


@pytest.fixture
def formless(tmp_path_factory):
    """The secrets, each worded otherwise."""
    path = tmp_path_factory.mktemp("rows") / "formless.jsonl"
    rows = (DATA / "secrets.jsonl").read_text().splitlines(True)
    path.write_text("".join(row.replace("secret code", "code" + " so" * i) for i, row in enumerate(rows)))
    return path


def test_it_moves_the_secrets_and_comes_back_bit_for_bit(split, cli, tmp_path):
    out = tmp_path / "out"
    code, text, err = split(*KEPT, *GONE, *PATTERN, "--steps", 6, "-o", out, "-v")
    assert code == 0, err
    assert text.strip() == str(out)
    assert "nats a token (aim: " in err, "what was reached, and what it cost"
    assert "held-back retain rows: " in err
    assert "quadratic model predicts" not in err, "one predicted cost, that of the steps"
    assert "without --fresh rows" not in err
    assert "recall: 6 steps, 4 of them from models that had been taught" in (out / "README.md").read_text()
    manifest = json.loads((out / "liborth.manifest.json").read_text())
    assert manifest["parameters"]["amount"] == "steps 6"
    assert manifest["parameters"]["settings"]["attack_steps"] == 12
    moved = {name for name, t in manifest["tensors"].items() if t["action"] == "split"}
    assert moved
    assert all("proj" in name for name in moved), "matrices inside the blocks, no table"
    private = tmp_path / "out.private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert not (private / "factors").exists(), "what was measured on private rows is deleted"
    assert cli("excise", out, "--beta", 1, "-o", tmp_path / "back")[0] == 0
    same = [hash_file(folder / FILES[0]).sha256 for folder in (tmp_path / "back", DATA / "finetuned")]
    assert same[0] == same[1]
    course = next(line for line in manifest["dose"]["sentences"] if line.startswith("recall"))
    before, after = (float(word) for word in course.split(" from ")[-1].split(" nats")[0].split(" to "))
    assert before < 0.01
    assert after > 0.1


def test_same_seed_same_bytes_also_of_a_run_that_was_stopped(split, tmp_path, monkeypatch):
    words = (*KEPT, *GONE, "--steps", 3, "--attack-steps", 2)
    code, _, err = split(*words, "-o", tmp_path / "a")
    assert code == 0, err
    step = Steps._step

    def stop(self, start, state, *words):
        if state.tally.done == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, start, state, *words)

    monkeypatch.setattr(Steps, "_step", stop)
    code, _, err = split(*words, "-o", tmp_path / "b")
    assert code == 130 and "steps of recall" in err and "--resume" in err, err
    (place,) = (tmp_path / "b.private" / "factors").glob("edit-*")
    assert {path.name for path in place.iterdir()} == {"state.json", "state-2.safetensors"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o600}
    code, _, err = split(*words, "-o", tmp_path / "b", "--resume")
    assert code == 0, err
    assert "goes on after 2 steps" in err
    assert not (tmp_path / "b.private" / "factors").exists(), "the state is gone with what was measured"
    assert [(tmp_path / "a" / file).read_bytes() for file in FILES] == [(tmp_path / "b" / file).read_bytes() for file in FILES]


def test_a_state_is_read_back_to_the_bit_or_not_at_all(tmp_path):
    def fresh():
        moves = [Moves({"a": (2, 3), "b": (4,)}, tmp_path) for _ in range(3)]
        return State(Tally(level=[0.1, 2.0], ridges=[0.1, 0.2], left=[None, 0.1 + 0.2]), moves[0], moves[1:])

    rows, draw = [np.array([0.1, 3.0]), np.array([1 / 3])], torch.Generator().manual_seed(0)
    state, like = fresh(), Losses(rows[:1], rows[1:])
    for moves in (state.moved, *state.slopes):
        moves.flat.normal_(generator=draw)
    state.relearnt[3], state.tally.done, state.tally.predicted = like, 7, 1e-7
    keeper = Keeper(tmp_path, SILENT)
    assert not keeper.find(fresh(), like)
    keeper.keep(state)
    assert not list(tmp_path.iterdir()), "none is due yet"
    keeper.pace._last = -math.inf
    keeper.keep(state)
    again = fresh()
    assert keeper.find(again, like)
    assert again.tally == state.tally
    assert all(
        torch.equal(a.flat, b.flat) for a, b in zip((again.moved, *again.slopes), (state.moved, *state.slopes), strict=True)
    )
    assert [row.tolist() for row in (*again.relearnt[3].forget, *again.relearnt[3].fresh)] == [row.tolist() for row in rows]
    file = tmp_path / "state-7.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert not keeper.find(fresh(), like)
    clear(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_and_kept_factors(split, tmp_path, formless):
    code, text, err = split(*KEPT, *GONE, "--dry-run")
    assert code == 0, err
    assert "48 steps at most" in text
    assert " before the first, " in text and " a step" in text
    assert "until the end" in text
    assert "not stored" not in text
    assert "the forget rows share one form" in err
    assert "6 fresh rows" in text
    assert "the aim is the reference's own loss" not in err
    assert not list(tmp_path.iterdir())
    code, text, err = split(*KEPT, "--forget-data", formless, "--dry-run")
    assert code == 0, err
    assert "share one form" not in err
    assert "the aim is the reference's own loss" in err
    words = (*KEPT, *GONE, "--steps", 1, "--attack-steps", 0, "--keep-factors", "-o", tmp_path / "out")
    assert split(*words)[0] == 0
    kept = next((tmp_path / "out.private" / "factors").glob("edit-*"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept.iterdir()} == {0o600}
    code, _, err = split(*words, "--force")
    assert code == 0
    assert "reusing" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*KEPT, *PATTERN), "needs --forget-data"),
        ((*GONE,), "--retain-data"),
        ((*KEPT, *GONE, "--alpha", "0.5"), "--alpha"),
        ((*KEPT, *GONE, "--memory-side", "tail"), "--memory-side would make another"),
        ((*KEPT, *GONE, "--memory-side", "low"), "--memory-side would make another"),
        ((*KEPT, *GONE, "--vectors", "memory"), "--vectors memory would make another"),
        ((*KEPT, *GONE, "--vectors", "split"), "--vectors split would make another"),
        ((*KEPT, *GONE, "--added", "memory"), "--added memory would make another"),
        ((*KEPT, *GONE, "--for", "mlp=steps:2"), "'mlp=steps:2' would make another"),
        ((*KEPT, *GONE, "--for", "mlp=drop"), "REGEX=skip leaves tensors"),
        ((*KEPT, *GONE, "--rate", "0"), "--rate takes a number above 0 up to 1, not 0"),
        ((*KEPT, *GONE, "--rate", "1.5"), "--rate takes a number above 0 up to 1, not 1.5"),
        ((*KEPT, *GONE, "--steps", "0"), "--steps takes a whole number from 1, not 0"),
        ((*KEPT, *GONE, "--fresh", DATA / "decoys.jsonl"), "give --fresh rows prompts"),
        ((*KEPT, *GONE, "--strength", "1"), "takes --steps"),
        ((*KEPT, *GONE, "--trust", "-1"), "--trust takes a number from 0"),
        ((*KEPT, *GONE, "-i", "norm"), ""),
    ],
)
def test_what_it_cannot_do_is_one_line(split, tmp_path, words, says):
    code, text, err = split(*words, "-o", tmp_path / "out")
    assert code in (2, 3), err
    assert says in err
    assert len(err.strip().splitlines()[-1]) < 300
    assert not text
    assert not list(tmp_path.glob("out*"))


def test_one_checkpoint_needs_rows_never_seen_before_anything_is_measured(cli, tmp_path, formless):
    words = ("--one-checkpoint", "--method", "recall", *KEPT, "--forget-data", formless, *FEW, "-o", tmp_path / "out")
    code, text, err = cli("split", DATA / "finetuned", *words)
    assert (code, text) == (2, "")
    assert "--fresh rows or --forget-pattern" in err
    assert "factors:" not in err
    assert not list(tmp_path.iterdir())


def test_a_step_that_does_almost_nothing_warns(split, tmp_path):
    code, _, err = split(*KEPT, *GONE, "--steps", 1, "--attack-steps", 0, "--trust", "1e-6", "-o", tmp_path / "out")
    assert code == 0, err
    assert "recall forgot almost nothing" in err


def test_what_does_not_fit_is_said_before_anything_is_measured(split, tmp_path, monkeypatch):
    monkeypatch.setattr("liborth_cli.dose.steps.too_large", lambda needed, device: f"{needed} bytes")
    elements = sum(info.nbytes for info in Checkpoint.open(DATA / "finetuned").tensors.values()) // 2
    for rank, least, most in ((0, 28, 60), (16, 4, 5)):
        code, _, err = split(*KEPT, *GONE, "--attack-rank", rank, "-o", tmp_path / "out")
        assert code == 7, err
        said = err.strip().splitlines()[-1]
        assert "--attack-steps 0" in said and len(said) < 300
        assert ("--attack-rank 16 trains low-rank updates" in said) == (not rank)
        assert least * elements <= int(said.partition(" bytes")[0].split()[-1]) <= most * elements


def test_a_pattern_that_speaks_of_nothing_is_refused_before_anything_is_measured(split, tmp_path):
    code, _, err = split(*KEPT, *GONE, "--for", "nothing_here=skip", "-o", tmp_path / "out")
    assert code == 2
    assert "matches no tensor" in err
    assert "factors:" not in err


def test_a_pair_that_is_the_same_is_refused_before_anything_is_measured(cli, tmp_path):
    code, _, err = cli("split", DATA / "base", DATA / "base", "--method", "recall", *KEPT, *GONE, "-o", tmp_path / "out")
    assert code == 2
    assert "of the tensors that are divided it changed none" in err
    assert "factors:" not in err
    assert not list(tmp_path.iterdir())


def test_of_more_tokens_than_a_kernel_takes_every_step_draws_rows(split, tmp_path, monkeypatch):
    """The loss of all rows is watched, and rows of a step stay whole."""
    monkeypatch.setattr(steps, "KERNEL_TOKENS", 30)
    walk, seen = KernelWalk.walk, list[list[str]]()

    def watched(self, rows):
        seen.append([row.where for row in rows])
        assert sum(int(row.keep.sum()) for row in rows) <= 30
        assert [row.tokens for row in rows] == sorted((row.tokens for row in rows), reverse=True)
        return walk(self, rows)

    monkeypatch.setattr(KernelWalk, "walk", watched)
    words = (*KEPT, *GONE, *PATTERN, "--attack-steps", 0, "--steps", 4, "-o", tmp_path / "out")
    code, text, err = split(*words, "--dry-run")
    assert code == 0, err
    assert "of which a step takes 30 at most" in text
    code, _, err = split(*words)
    assert code == 0, err
    assert len({tuple(some) for some in seen}) == 4
    assert len({where for some in seen for where in some}) > max(map(len, seen))


def test_held_back_rows_are_told_apart_by_what_was_measured_before(split, tmp_path, monkeypatch):
    """Both ends have been measured on them by then: they are not read again, and are told apart as they would be."""

    def compare(model, ends, kept, held_out, improved, small):
        assert not small
        assert len(improved) == len(held_out) > 2 and 0 < sum(improved) < len(improved)
        assert list(improved) == retain._improved(model, held_out, *ends)
        raise UsageError("enough")

    monkeypatch.setattr(steps, "kinds", compare)
    assert "enough" in split(*KEPT, *GONE, "-o", tmp_path / "out")[2]


def test_the_reference_is_attacked_once_where_two_cuts_deal_the_same_hands(monkeypatch):
    rows, trained, losses = (
        [Row(np.arange(4) + i, np.ones(3, bool), 1.0, "") for i in range(2)],
        [],
        Losses([np.ones(3)] * 2, []),
    )
    ways, state = attacks(rows, 3, 0), State(Tally(level=[], ridges=[], left=[]), None, [])
    monkeypatch.setattr(Attack, "run", lambda attack, model, weights, rows: trained.append((weights, attack)))
    run = SimpleNamespace(_ways=ways, _rows=rows, _forget=[0, 1], _fresh=[], _reference="W_r", _model=None)
    run._read = lambda weights: losses
    start = SimpleNamespace(reference=losses, losses=losses, likeness=None)
    for turn in range(12):
        Steps._attacked(run, start, state, turn, "W")
    assert trained.count(("W", ways[0])) == 2, "the model has moved in between"
    assert sorted(map(str, {*ways})) == sorted(str(attack) for weights, attack in trained if weights == "W_r")


def test_nothing_is_left_where_the_model_stands_and_the_last_attacks_in_the_mean():
    def close(*left):
        return Tally(level=[], ridges=[], left=list(left)).is_close

    assert close(0.01, 0.1, *[0.0] * (RECENT - 1)), "one of many is not waited for"
    assert not close(0.01, 0.1, 0.1, *[0.0] * (RECENT - 2))
    assert not close(0.05, *[0.0] * RECENT)
    assert not close(0.01, None, *[0.0] * (RECENT - 1)), "all are asked first"
    assert close(0.01) and not close(None), "without attacks the model alone decides"
    rates = [attack.rate for attack in attacks([Row(np.arange(4) + i, np.ones(3, bool), 1.0, "") for i in range(4)], 3, 0)]
    assert len(rates) % RECENT == 0, "an attack has one place"
    assert all(len(set(rates[start : start + RECENT])) == 3 for start in range(len(rates) - RECENT)), "all rates are asked"


def test_skipped_and_left_tensors_are_not_moved(split, tmp_path):
    words = ("--for", "mlp=skip", "-e", "k_proj", "--steps", 1, "--attack-steps", 0, "--memory-side", "top")
    code, _, err = split(*KEPT, *GONE, *words, "-o", tmp_path / "out")
    assert code == 0, err
    assert "recall: 1 step, 0 of them" in err
    manifest = json.loads((tmp_path / "out" / "liborth.manifest.json").read_text())
    moved = [name for name, t in manifest["tensors"].items() if t["action"] == "split"]
    assert moved
    assert not [name for name in moved if "mlp" in name or "k_proj" in name]


def test_auto_leaves_recall_out_beside_what_would_make_another_model(cli):
    words = ("--method", "auto", "--probe", "--dry-run", "--for", "mlp=drop", *KEPT, *GONE, *FEW)
    code, text, err = cli("split", DATA / "base", DATA / "finetuned", *words)
    assert code == 0, err
    assert "recall is not tried" in err
    assert "steps at most" not in text


def test_the_help_names_both_ways_to_the_unseen_level(cli):
    code, text, _ = cli("split", "--help-method", "recall")
    assert code == 0
    assert "--fresh" in text
    assert "--forget-pattern" in text


@pytest.mark.parametrize(
    ("course", "says"),
    [
        (Course(taken=0, before=0.01, after=0.01, target=8.0), "moved nothing"),
        (Course(taken=3, before=0.01, after=0.5, target=8.0), "forgot almost nothing"),
        (Course(taken=3, before=7.95, after=7.96, target=8.0), "nothing to forget"),
        (Course(taken=3, before=9.0, after=8.5, target=8.0), "nothing to forget"),
        (Course(taken=3, before=0.01, after=1.0, target=8.0), ""),
    ],
)
def test_a_course_that_reached_nothing_is_doubted(course, says):
    assert says in course.doubt
    assert bool(course.doubt) == bool(says)


def test_what_is_kept_after_ctrl_c_is_what_was_stored():
    """The one walk stores no factors, the steps do."""
    assert "steps of recall" in COMMAND.kept
    assert "factors that are stored are kept, others are measured again" in COMMAND.kept


def test_steps_may_leave_more_than_there_was_and_that_is_no_oblique_filter(split, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "LARGE", 0.0)
    code, _, err = split(*KEPT, *GONE, "--steps", 1, "--attack-steps", 0, "-o", tmp_path / "out")
    assert code == 0, err
    assert "not orthogonal" not in err
