"""Factors of retain texts are measured once for all splits, where the user names a cache; nothing of what must go is there."""

import shutil

import pytest
from tiny import weight_files

from liborth_cli.checkpoint import cache
from liborth_cli.curvature.estimate import Estimator
from liborth_cli.demo import DATA
from liborth_cli.errors import OutputConflict

WORDS = ("split", DATA / "base", DATA / "finetuned", "--retain-data", DATA / "retain.jsonl", "--retain-tokens", 500)
GONE = ("--forget-data", DATA / "secrets.jsonl", "--probe-tokens", 500, "-i", r"layers\.[01]\.", "-j", 1)


@pytest.fixture
def split(cli, monkeypatch, tmp_path):
    """Split, and count the sets that are stored."""
    stored, write = [], Estimator.write

    def note(self, out, *more):
        stored.append(out.name)
        return write(self, out, *more)

    monkeypatch.setattr(Estimator, "write", note)

    def run(name, *words):
        stored.clear()
        code, _, err = cli(*WORDS, *GONE, *words, "-o", tmp_path / name)
        assert code == 0, err
        return err, list(stored)

    return run


def test_what_is_kept_serves_other_methods_and_outputs_and_gives_the_same_bytes(split, cli, tmp_path, monkeypatch):
    assert split("plain")[1] == []
    monkeypatch.setenv("LIBORTH_CACHE", str(tmp_path / "cache"))
    _, stored = split("first")
    assert len(stored) == 1 and stored[0].startswith("retain-")
    err, stored = split("second", "--strength", 1)
    assert not stored and "retain factors: reusing" in err
    assert weight_files(tmp_path / "first") == weight_files(tmp_path / "plain") != weight_files(tmp_path / "second")
    kept = list((tmp_path / "cache").rglob("*"))
    assert {path.stat().st_mode & 0o77 for path in [tmp_path / "cache", *kept]} == {0}
    assert [path.name for path in (tmp_path / "cache" / "factors").iterdir() if path.is_dir()] == [stored_name(kept)]
    assert "cache" in cli("doctor", "--empty-cache")[1] and not list((tmp_path / "cache").iterdir())


def stored_name(kept):
    return next(path.name for path in kept if path.is_dir() and path.name.startswith("retain-"))


@pytest.mark.parametrize("harm", ["a flipped bit", "half of it"])
def test_a_damaged_entry_is_told_of_and_measured_anew(split, tmp_path, monkeypatch, harm):
    monkeypatch.setenv("LIBORTH_CACHE", str(tmp_path / "cache"))
    split("first")
    (entry,) = (tmp_path / "cache" / "factors").glob("retain-*")
    file = max(entry.iterdir(), key=lambda path: path.stat().st_size)
    if harm == "half of it":
        file.unlink()
    else:
        raw = bytearray(file.read_bytes())
        raw[-5] ^= 1
        file.write_bytes(raw)
    err, stored = split("second")
    assert len(stored) == 1 and "damaged; these factors are measured anew" in err
    assert weight_files(tmp_path / "first") == weight_files(tmp_path / "second")


def test_other_weights_or_rows_are_other_entries_and_a_full_cache_stops_nothing(split, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("LIBORTH_CACHE", str(tmp_path / "cache"))
    split("first")
    assert len(split("rows", "--retain-tokens", 250)[1]) == 1
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("in the way")
    err, _ = split("third")
    assert "not kept for other runs" in err and weight_files(tmp_path / "third") == weight_files(tmp_path / "first")


def test_a_directory_that_is_not_the_caches_alone_is_not_closed_to_others(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("of somebody")
    tmp_path.chmod(0o755)
    monkeypatch.setenv("LIBORTH_CACHE", str(tmp_path))
    with pytest.raises(OutputConflict, match="more than liborth's cache"):
        cache.folder(cache.CHECKS)
    assert tmp_path.stat().st_mode & 0o777 == 0o755 and [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    monkeypatch.setenv("LIBORTH_CACHE", str(tmp_path / "liborth"))
    assert cache.folder(cache.CHECKS).is_dir()


@pytest.mark.parametrize("named", ["~nobody-of-this-name/x", "/dev/null", "x" * 300])
def test_a_place_that_cannot_be_is_refused_and_counts_nothing(named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIBORTH_CACHE", named)
    with pytest.raises(OutputConflict):
        cache.folder(cache.CHECKS)
    assert (cache.nbytes(), cache.empty(), list(tmp_path.iterdir())) == (0, 0, [])
