"""Every place a command writes to is held against everything it reads, through links and hard links, before the work."""

import os

import pytest
from tiny import files, pair

from liborth_cli.checkpoint.outputs import Kind, Place, check_outputs
from liborth_cli.errors import OutputConflict


@pytest.fixture
def place(tmp_path):
    """A checkpoint, a data file, and other names of both."""
    (tmp_path / "model" / "inside").mkdir(parents=True)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "data.jsonl").write_text("{}")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "data.link").symlink_to("data.jsonl")
    os.link(tmp_path / "data.jsonl", tmp_path / "data.hard")
    os.link(tmp_path / "model" / "model.safetensors", tmp_path / "weights.hard")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "upward").symlink_to(tmp_path)
    return tmp_path


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model", Kind.FOLDER), ("link", Kind.FOLDER), ("model/inside/out", Kind.FOLDER), ("upward/model/new", Kind.FOLDER),
        ("upward", Kind.FOLDER), ("data.jsonl", Kind.FOLDER), (".", Kind.FOLDER), ("elsewhere/../model/x", Kind.FOLDER),
        ("data.jsonl", Kind.FILE), ("data.link", Kind.FILE), ("data.hard", Kind.FILE), ("upward/data.jsonl", Kind.FILE),
        ("weights.hard", Kind.FILE), ("model/model.safetensors", Kind.FILE), ("link/model.safetensors", Kind.FILE),
        ("model/config.json", Kind.FILE), ("link/inside/new.json", Kind.FILE), ("elsewhere/../data.jsonl", Kind.FILE),
        ("model", Kind.SCRATCH), ("link/inside", Kind.SCRATCH),
    ],
)  # fmt: skip
def test_no_second_name_of_an_input_gets_past(place, name, kind, force):
    before = files(place)
    with pytest.raises(OutputConflict):
        check_outputs([Place(place / name, "--there", kind)], [place / "model", place / "data.jsonl", None], force)
    assert files(place) == before


@pytest.mark.parametrize("source", ["out.liborth-partial", "out"])
def test_the_names_beside_an_output_are_outputs_too(tmp_path, source):
    (tmp_path / source).mkdir()
    with pytest.raises(OutputConflict):
        check_outputs([Place(tmp_path / "out")], [tmp_path / source], force=True)


def test_outputs_are_held_against_each_other(place):
    report = Place(place / "a", "--report", Kind.FILE)
    for other in (
        Place(place / "a", "--out", Kind.FILE),
        Place(place / "upward" / "a", "--out", Kind.FILE),
        Place(place / "a"),
    ):
        with pytest.raises(OutputConflict):
            check_outputs([report, other], [])
    with pytest.raises(OutputConflict, match="--memory-out"):
        check_outputs([Place(place / "new"), Place(place / "new" / "memory", "--memory-out")], [])
    check_outputs([report, Place(place / "b", "--out", Kind.FILE), Place(place / "new"), Place(place / "new.private")], [])
    check_outputs([Place(place / "elsewhere" / "new"), Place(place / "elsewhere", "--scratch", Kind.SCRATCH)], [])


def test_what_cannot_be_written_to_is_refused(place):
    cases = [
        (Place(place / "none" / "a.json", "--report", Kind.FILE), "there is no directory"),
        (Place(place / "elsewhere", "--report", Kind.FILE), "a directory; name a file"),
        (Place(place / "none", "--scratch", Kind.SCRATCH), "no directory"),
        (Place(place / "data.jsonl" / "out"), "there is no directory|cannot be written"),
    ]
    os.mkfifo(place / "pipe")
    cases.append((Place(place / "pipe", "--report", Kind.FILE), "is not a file"))
    for output, says in cases:
        with pytest.raises(OutputConflict, match=says):
            check_outputs([output], [], force=True)
    with pytest.raises(OutputConflict, match="exists; replace it with --force"):
        check_outputs([Place(place / "data.jsonl", "--report", Kind.FILE)], [])


def test_a_mount_point_is_refused_before_the_work(monkeypatch, tmp_path):
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "volume")
    with pytest.raises(OutputConflict, match="is a mount point"):
        check_outputs([Place(tmp_path / "volume")], [])
    check_outputs([Place(tmp_path / "volume" / "out")], [])


def test_a_link_as_output_is_followed_to_the_larger_disk(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large_disk")
    assert cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out")[0] == 0
    assert (tmp_path / "out").is_symlink() and (tmp_path / "large_disk" / "liborth.manifest.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("split", "base", "finetuned", "--method", "svd", "--rank", "4", "-o", "finetuned/x"),
        ("excise", "base", "--beta", "0", "--unverified", "-o", "base"),
        ("tune", "base", "--method", "full", "--data", "data.jsonl", "-o", "data.jsonl", "--force"),
        ("tune", "base", "--method", "full", "--data", "data.jsonl", "-o", "base"),
        ("curvature", "base", "finetuned", "--merge", "-o", "base"),
    ],
    ids=lambda words: words[0],
)
def test_every_command_asks(cli, tmp_path, monkeypatch, words):
    pair(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"text": "x"}\n')
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    code, _, err = cli(*words)
    assert (code, err.count("\n")) == (6, 1), err
    assert files(tmp_path) == before
