"""`replay`: the command that a manifest tells of gives the same bytes again, and only from the same inputs."""

import shlex

import numpy as np
import pytest
from tiny import files, flip, llama, pair, reseal


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair(tmp_path)
    return tmp_path


def made(here, cli, *words):
    code, out, err = cli(*words, "-j", 1, "-q")
    assert code == 0, err
    return out.strip()


@pytest.mark.parametrize(
    "words",
    [
        ("split", "base", "finetuned", "--rank", 2, "--alpha", 0.9, "-e", "conv", "--for", "up=rank:3", "--svd", "exact"),
        ("split", "base", "finetuned", "--method", "random", "--energy", 0.123456789, "--vectors", "memory", "--seed", 7),
        ("split", "finetuned", "--one-checkpoint", "--method", "svd", "--noise-edge", "--out-shard-size", "2kB"),
    ],
)
def test_a_split_is_done_again_to_the_byte(here, cli, words):
    made(here, cli, *words, "-o", "general")
    code, out, err = cli("replay", "general/liborth.manifest.json", "-o", "again")
    assert (code, out) == (0, "again\n"), err
    assert "the same, byte for byte" in err and files(here / "again") == files(here / "general")
    typed = next(line for line in err.splitlines() if line.startswith("$ "))
    assert cli("replay", "general", "-o", "again", "--dry-run")[1].strip() == typed[2:]
    assert cli(*shlex.split(typed)[2:], "--force")[0] == 0 and files(here / "again") == files(here / "general")


def test_an_excision_is_done_again_to_the_byte(here, cli):
    made(here, cli, "split", "base", "finetuned", "--rank", 2, "-o", "general")
    made(here, cli, "excise", "general", "--beta", 0.25, "-o", "some")
    assert cli("replay", "some", "-o", "again")[0] == 0 and files(here / "again") == files(here / "some")
    (here / "general").rename(here / "moved")
    (here / "general.private").rename(here / "moved.private")
    code, _, err = cli("replay", "some", "-o", "other")
    assert code == 3 and "name the same files with --model" in err
    assert cli("replay", "some", "--model", "moved", "-o", "other")[0] == 0


def test_factors_and_training_are_done_again_from_texts_that_are_given(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    llama(tmp_path / "base")
    np.save(tmp_path / "rows.npy", np.arange(8 * 17).reshape(8, 17) % 64)
    made(tmp_path, cli, "curvature", "base", "--data", "rows.npy", "--fisher", "empirical", "--diagonal", "-o", "factors")
    train = ("--method", "lora", "--rank", 2, "--steps", 2, "--lr", 0.01, "--seed", 3)
    made(tmp_path, cli, "tune", "base", "--data", "rows.npy", *train, "-o", "tuned")
    for name in ("factors", "tuned"):
        code, _, err = cli("replay", name, "-o", "again")
        assert code == 2 and "add --data" in err
        code, _, err = cli("replay", name, "--data", "rows.npy", "-o", f"{name}-again")
        assert code == 0 and "the same, byte for byte" in err, err
        assert files(tmp_path / f"{name}-again") == files(tmp_path / name)


def test_texts_are_asked_for_all_at_once(here, cli):
    made(here, cli, "split", "base", "finetuned", "--rank", 2, "-o", "general")
    used = {"model": "0" * 64, "at": 1.0, "fisher": "sampled", "tokens": 3.0}
    reseal(here / "general", lambda document: document.update(factors={"retain": used, "forget": [used]}))
    code, _, err = cli("replay", "general", "-o", "again")
    assert code == 2 and "--retain-data or --retain and --forget-data" in err and len(err) < 300


def test_other_inputs_are_refused_and_other_bytes_are_no_replay(here, cli):
    made(here, cli, "split", "base", "finetuned", "--rank", 2, "-o", "general")
    (here / "elsewhere").mkdir()
    pair(here / "elsewhere", step=0.2)
    code, _, err = cli("replay", "general", "--finetuned", "elsewhere/finetuned", "-o", "again")
    assert code == 4 and "is not the file that this split was made from" in err and not (here / "again").exists()
    name = "model.safetensors"

    def lie(document):
        next(f for f in document["outputs"] if f["name"] == name)["sha256"] = "0" * 64
        document["libraries"]["torch"] = "1.0"

    reseal(here / "general", lie)
    code, out, err = cli("replay", "general", "-o", "again")
    assert code == 5 and out == "" and f"first: {name}" in err and "1.0" in err
    flip(here / "finetuned" / name)
    assert "is here, and is not what it was" in cli("replay", "general", "-o", "third")[2]


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda document: document.update(schema_version=3), 3, "schema version 3; this liborth reads 2, upgrade it"),
        (
            lambda document: document.update(kind="export", parameters={"to": "peft", "part": "skill"}),
            2,
            "of `liborth export`",
        ),
    ],
)
def test_a_manifest_that_cannot_be_repeated_is_one_line(here, cli, change, code, says):
    made(here, cli, "split", "base", "finetuned", "--rank", 2, "-o", "general")
    reseal(here / "general", change)
    found, _, err = cli("replay", "general", "-o", "again")
    assert found == code and says in err and len(err.splitlines()) == 1


def test_what_is_not_there_is_named(here, cli):
    (here / "bare").mkdir()
    for name, says in (
        ("nope", "error: nope: no such file or directory"),
        ("bare", "error: bare: no liborth.manifest.json here"),
    ):
        found, _, err = cli("replay", name)
        assert found == 3 and err.startswith(says) and len(err.splitlines()) == 1
