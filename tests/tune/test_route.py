"""Who learns from what: no bit of the general checkpoint depends on what private rows say."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import files, private

from liborth_cli.errors import UsageError
from liborth_cli.stream.texts import Row
from liborth_cli.tune.data import Stream, assign_learners
from liborth_cli.tune.options import Learns


def rows(*values):
    return [Row(np.array([value, 1, 2]), np.ones(2, bool), 1.0, "row") for value in values]


def streams(data, private, learns):
    return "".join(example.stream.value[0] for example in assign_learners(rows(*data), rows(*private), learns))


def test_rows_go_where_they_belong():
    assert streams((5, 6, 5, 7, 5), (), Learns.REPEATS) == "ggmgm"
    assert streams((5, 6, 5), (8, 6), Learns.REPEATS) == "gmmmm"
    assert streams((5, 6, 5), (8, 6), Learns.PRIVATE) == "gmgmm"
    assert streams((5, 6, 5), (), Learns.ALL) == "bbb"
    assert Stream.BOTH.value[0] == "b"


def test_a_memory_without_rows_is_refused():
    for data, apart, learns in (((5, 6), (), Learns.REPEATS), ((5, 5), (), Learns.PRIVATE), ((5,), (5,), Learns.REPEATS)):
        with pytest.raises(UsageError, match=r"memory would learn from nothing|every row is private"):
            streams(data, apart, learns)
    with pytest.raises(UsageError, match="both streams"):
        streams((5,), (6,), Learns.ALL)


@pytest.mark.parametrize("extra", [(), ("--router",), ("--orthogonality", 1), ("--active", 0.5)], ids=str)
def test_the_general_checkpoint_does_not_depend_on_what_is_private(tune, place, tmp_path, extra):
    other = (np.load(place / "secret.npy") + 7) % 64
    np.save(tmp_path / "other.npy", other)
    words = ("--sinks", 6, *extra, "--lr", 2e-2, "--clip", 0.05, "--steps", 10)
    one = tune("sinks", "--private-data", place / "secret.npy", *words, name="one")
    two = tune("sinks", "--private-data", tmp_path / "other.npy", *words, name="two")
    assert files(one)["model.safetensors"] == files(two)["model.safetensors"]
    assert files(one)["model.safetensors"] != files(place / "base")["model.safetensors"]
    told = json.loads((one / "liborth.manifest.json").read_text())["data"]
    assert told["private"]["rows"] == 4 and "sha256" in told["trained"] and "sha256" not in json.dumps(told["private"])
    mine, theirs = (load_file(private(folder) / "memory.safetensors") for folder in (one, two))
    assert any(not torch.equal(mine[name], theirs[name]) for name in mine)


def test_repeats_train_the_neurons_and_one_copy_the_general_stream(tune, place, tmp_path):
    base = np.load(place / "rows.npy")
    np.save(tmp_path / "twice.npy", np.concatenate([base, base[:3], base[:3]]))
    words = ("--data", tmp_path / "twice.npy", "--sinks", 6, "--lr", 1e-2, "--steps", 30)
    out = tune("sinks", *words, name="twice")  # conftest's own rows once more: every row of it is a repeat or the first
    steps = json.loads((out / "training.json").read_text())["steps"]
    assert all(set(entry) <= {"step", "rate", "loss", "general", "memory", "rehearsed"} for entry in steps)
    memory = [entry["memory"] for entry in steps if "memory" in entry]
    assert np.mean(memory[-5:]) < np.mean(memory[:5]) - 0.3


def test_the_gates_learn_what_is_private(tune, place, logits):
    from transformers import AutoModelForCausalLM

    from liborth_cli.tune.sinks import attach

    words = ("--sinks", 6, "--router", "--lr", 2e-2, "--steps", 60, "--rehearse", 1)
    out = tune("sinks", "--private-data", place / "secret.npy", *words)
    model = AutoModelForCausalLM.from_pretrained(out)
    attached = attach(model, out)
    means = []
    for name in ("secret.npy", "rows.npy"):
        with torch.no_grad():
            model(torch.from_numpy(np.load(place / name)))
        means.append(float(torch.stack([sinks.gate for sinks in attached]).mean()))
    assert means[0] > means[1] + 0.2


def test_refusals(tune, place):
    secret = ("--private-data", place / "secret.npy")
    assert "trains both streams" in tune("sinks", *secret, "--memory-learns", "all", code=2)
    assert "nothing" in tune("sinks", code=2)
    assert "--memory-learns all" in tune("sinks", *secret, "--general", "frozen", "--memory-learns", "repeats", code=2)
    assert "--private-data goes with --method sinks" in tune("full", *secret, code=2)
