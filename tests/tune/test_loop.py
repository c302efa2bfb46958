"""The loop: against a loop written by hand, stopped and resumed, running away, stopping early."""

import json
import signal

import numpy as np
import pytest
import torch
from tiny import files

from liborth_cli.errors import Stopped


def test_the_loop_does_what_one_written_by_hand_does(tune, place, weights):
    from transformers import AutoModelForCausalLM

    out = tune("full", "--warmup", 0.25, "--schedule", "linear", "--weight-decay", 0.01)
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    from liborth_cli.stream.texts import DataFile, read_rows
    from liborth_cli.tune.data import batch_rows

    rows = read_rows([DataFile(place / "rows.npy")], None, 64, 16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.01)
    for step in range(8):
        rate = 3e-3 * ((step + 1) / 2 if step < 2 else 1 - (step - 2) / 6)
        optimiser.param_groups[0]["lr"] = rate
        ids = torch.from_numpy(np.stack([row.ids for row in batch_rows(rows, step, 4, 0)]))
        optimiser.zero_grad()
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    mine, base = weights(out), weights(place / "base")
    for name, value in model.state_dict().items():
        assert torch.allclose(mine[name], value.double(), atol=2e-5), name
        assert not torch.equal(mine[name], base[name])


def test_accumulated_batches_are_one_large_batch(tune, weights):
    one = weights(tune("full", "--steps", 3, "--batch-size", 8, name="one"))
    two = weights(tune("full", "--steps", 3, "--batch-size", 2, "--accumulate", 4, name="two"))
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)


def test_checkpointing_changes_nothing_and_bfloat16_little(tune, weights):
    plain = weights(tune("full", name="plain"))
    again = weights(tune("full", "--gradient-checkpointing", name="again"))
    half = tune("full", "--dtype", "bfloat16", name="half")
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)
    moved = max(float((plain[n] - w).abs().max()) for n, w in weights(half).items())
    assert 0 < moved < 0.02


@pytest.mark.parametrize("words", [("full",), ("ogd", "--retain"), ("sinks", "--private-data", "--router"), ("lora",)], ids=str)
def test_stopped_at_any_step_and_resumed_gives_the_same_bytes(tune, words, place, cli, tmp_path, monkeypatch):
    from liborth_cli.tune import loop

    method, *more = words
    if method == "lora":
        pytest.importorskip("peft")
    if method == "ogd":
        code, _, err = cli("curvature", place / "base", "--data", place / "public.npy", "-o", tmp_path / "factors", "-j", 1)
        assert code == 0, err
        more = ["--retain", tmp_path / "factors", "--protect", 0.8]
    if method == "sinks":
        more = ["--private-data", place / "secret.npy", "--sinks", 6, "--router"]
    more += ["--save-every", 2, "--eval-share", 0.25, "--eval-every", 3, "--patience", 9]
    whole = files(tune(method, *more, name="whole"))
    real, stop = loop.gradient, iter((1, 3, 6))
    at = next(stop)

    done = []

    def step(method, rows, options, number):
        done.append(number)
        if number == at:
            signal.raise_signal(signal.SIGTERM)
        return real(method, rows, options, number)

    def left():
        (file,) = (tmp_path / "again.private.liborth-partial" / "files").iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        return file.name

    monkeypatch.setattr(loop, "gradient", step)
    assert "--resume" in tune(method, *more, name="again", code=143)
    assert left() == "state-00000001.safetensors"
    for at in stop:
        assert "--resume" in tune(method, *more, "--resume", name="again", code=143)
        assert left() == f"state-{at:08d}.safetensors", "the first minute is not lost"
    at = -1
    done.clear()
    assert files(tune(method, *more, "--resume", name="again")) == whole
    assert done == [6, 7], "it goes on where it was, and not from the beginning"
    assert not (tmp_path / "again.liborth-partial").exists()


def test_a_signal_in_the_first_step_promises_nothing_and_one_in_the_last_loses_none(tune, tmp_path, monkeypatch):
    from liborth_cli.tune import loop, run

    whole, real, after, steps = files(tune("full", name="whole")), loop.gradient, run.TrainingRun.after, []

    def step(*words):
        steps.append(words[-1])
        if words[-1] == 0:
            signal.raise_signal(signal.SIGINT)
        return real(*words)

    monkeypatch.setattr(loop, "gradient", step)
    err = tune("full", name="again", code=130)
    assert "nothing was kept; run it again" in err and not list(tmp_path.glob("again*"))

    def last(self, done):
        if done == 8:
            signal.raise_signal(signal.SIGINT)
        return after(self, done)

    monkeypatch.setattr(loop, "gradient", real)
    monkeypatch.setattr(run.TrainingRun, "after", last)
    assert "the state of the last step is kept" in tune("full", name="again", code=130)
    monkeypatch.setattr(loop, "gradient", step)
    steps.clear()
    assert files(tune("full", "--resume", name="again")) == whole
    assert not steps, "all of them were done"


def test_a_resumed_run_with_other_options_is_refused(tune, tmp_path, monkeypatch):
    from liborth_cli.tune import loop

    real = loop.gradient
    monkeypatch.setattr(loop, "gradient", lambda *a: (_ for _ in ()).throw(Stopped(15)) if a[-1] == 5 else real(*a))
    tune("full", "--save-every", 2, code=143)
    monkeypatch.setattr(loop, "gradient", real)
    assert "other inputs or options" in tune("full", "--save-every", 2, "--clip", 2, "--resume", code=6)


def test_a_loss_that_runs_away_keeps_the_last_good_state(tune, tmp_path, monkeypatch, weights):
    from liborth_cli.tune import loop

    good = weights(tune("full", "--schedule", "constant", "--steps", 4, "--warmup", 0, name="good"))
    real = loop.gradient
    monkeypatch.setattr(loop, "gradient", lambda *a: None if a[-1] == 5 else real(*a))
    err = tune("full", "--schedule", "constant", "--save-every", 2, "--warmup", 0, code=5)
    assert "ran away at step 6" in err and "holds step 4" in err and "Lower --lr" in err
    kept = weights(tmp_path / "out")
    assert all(torch.equal(good[name], kept[name]) for name in good)
    assert json.loads((tmp_path / "out" / "liborth.manifest.json").read_text())["training"]["diverged"] == 6


def test_a_rate_far_too_high_is_noticed_and_nothing_written(tune, tmp_path):
    err = tune("full", "--lr", 1e30, "--save-every", 1, "--steps", 40, "--warmup", 0, code=5)
    assert "ran away" in err and "nothing was written" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.liborth-partial").exists()


def test_patience_stops_and_keeps_the_best(tune, place, tmp_path):
    np.save(tmp_path / "other.npy", np.random.default_rng(5).integers(0, 64, (6, 10)))
    words = ("--eval-data", tmp_path / "other.npy", "--eval-every", 2, "--patience", 2, "--steps", 60, "--lr", 1e-2)
    out = tune("full", *words)
    curve, training = (json.loads((out / f).read_text()) for f in ("training.json", "liborth.manifest.json"))
    looks = {int(e["step"]): e["loss"] for e in curve["evaluations"]}
    best = min(looks, key=lambda step: looks[step])
    assert training["training"]["kept"] == best and training["training"]["steps"] == best + 4 == max(looks) < 60
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.from_numpy(np.load(tmp_path / "other.npy"))
    assert float(model(ids, labels=ids).loss.detach()) == pytest.approx(looks[best], abs=1e-4)


def test_out_of_memory_says_what_to_lower(tune, monkeypatch):
    from liborth_cli.tune.full import Full

    def refuse(self, batch, lesson=None):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to allocate 9"
        )

    monkeypatch.setattr(Full, "loss", refuse)
    err = tune("full", code=7)
    assert "--batch-size 2 --accumulate 2, --gradient-checkpointing, --dtype bfloat16" in err and err.count("\n") < 4


def test_curves_are_saved_in_three_forms(tune):
    from xml.etree import ElementTree

    out = tune("full", "--eval-share", 0.25, "--eval-every", 4)
    curve = json.loads((out / "training.json").read_text())
    lines = (out / "training.csv").read_text().splitlines()
    assert lines[0] == "step,loss,rate,evaluation" and len(lines) == 10
    assert float(lines[2].split(",")[1]) == curve["steps"][0]["loss"]
    assert [line.split(",")[3] != "" for line in lines[1:]] == [n in (0, 4, 8) for n in range(9)]
    assert ElementTree.parse(out / "training.svg").getroot().tag.endswith("svg")


def test_the_loop_trains_any_model_and_a_watch_may_end_it(place):
    """As an attack uses it: a model of Transformers, plain SGD, and a measurement after every step."""
    from transformers import AutoModelForCausalLM

    from liborth_cli.stream.texts import DataFile, read_rows
    from liborth_cli.tune.data import Example
    from liborth_cli.tune.full import Full
    from liborth_cli.tune.loop import Watch, train
    from liborth_cli.tune.options import LoopOptions, Optimiser, Schedule

    model, other = (AutoModelForCausalLM.from_pretrained(place / "base") for _ in range(2))
    rows = [Example.of(row) for row in read_rows([DataFile(place / "rows.npy")], None, 64, 16)]
    options = LoopOptions(
        steps=9, batch_size=12, optimiser=Optimiser.SGD, rate=0.1, schedule=Schedule.CONSTANT, warmup=0.0, clip=0.0
    )

    seen = []

    class Three(Watch):
        def after(self, done):
            seen.append(done)
            return done < 3

    assert train(Full(model, dict(model.named_parameters())), rows, options, Three()) == 3 and seen == [1, 2, 3]
    ids = torch.from_numpy(np.load(place / "rows.npy"))
    for _ in range(3):
        other.zero_grad()
        other(ids, labels=ids).loss.backward()
        with torch.no_grad():
            for p in other.parameters():
                p.sub_(0.1 * p.grad)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model.parameters(), other.parameters(), strict=True))
