"""One run's partial directories: whose they are, what a resumed run believes, and how outputs appear."""

import fcntl
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from tiny import files

from liborth_cli import manifest
from liborth_cli.checkpoint import claim, exchange, private
from liborth_cli.checkpoint.files import hash_file, write_file
from liborth_cli.checkpoint.journal import Unit
from liborth_cli.checkpoint.transaction import Transaction, settle
from liborth_cli.errors import BadInput, LiborthError, OutputConflict

UNIT = Unit.of("part")


class Killed(BaseException):
    """What a kill looks like from inside."""


def described(files):
    """A sealed manifest that lists these files."""
    return manifest.sealed({**manifest.Maker(kind="excise").model_dump(), "parameters": {"beta": 0.0}, "outputs": files})


def fill(work, text="new", commit=True):
    """Do what a command does: a unit, the private manifest, the public one."""
    if "part" not in work.finished:
        one, two = write_file(work.partial / "weights", text.encode()), []
        if work.private != work.partial:
            two = [write_file(work.private / "memory", b"secret of " + text.encode(), 0o600)]
        work.finish(Unit.of("part", [one], two, inputs={"in": "hash"}))
    unit = work.finished["part"]
    document = described([file.model_dump() for file in unit.files])
    if work.private != work.partial:
        private.seal(work.private, [file.written for file in unit.private], document["digest"])
    if commit:
        work.commit(manifest.dump(document))


def make(folder, text="new", commit=True, **how):
    with Transaction(folder / "out", text, private=folder / "out.private", **how) as work:
        work.check_inputs(lambda _: "hash")
        fill(work, text, commit)


def test_two_directories_appear_together_and_nothing_is_left(tmp_path):
    make(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.private"]
    assert sorted(os.listdir(tmp_path / "out")) == ["liborth.manifest.json", "weights"]
    assert sorted(os.listdir(tmp_path / "out.private")) == [".gitignore", "README.md", "liborth.private.json", "memory"]
    assert (tmp_path / "out.private").stat().st_mode & 0o777 == 0o700
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "out.private").iterdir()} == {0o600}


@pytest.mark.parametrize("flag", [{"force": True}, {"resume": True}, {"force": True, "resume": True}, {}])
@pytest.mark.parametrize("name", ["out.liborth-partial", "out.private.liborth-partial"])
@pytest.mark.parametrize("what", ["link", "dangling", "folder", "file", "forged", "fifo"])
def test_what_is_not_ours_beside_the_output_is_refused_untouched(tmp_path, flag, name, what):
    place, theirs = tmp_path / name, tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("precious")
    if what == "link":
        place.symlink_to(theirs)
    elif what == "dangling":
        place.symlink_to(tmp_path / "nowhere")
    elif what == "file":
        place.write_text("x")
    elif what == "fifo":
        os.mkfifo(place)
    else:
        shutil.copytree(theirs, place)
        if what == "forged":
            (tmp_path / "owner").write_text(json.dumps({"id": "0" * 32}))
            (place / "owner.json").symlink_to(tmp_path / "owner")
            (place / "journal.jsonl").write_text(json.dumps({"owner": "0" * 32, "plan": "new"}) + "\n")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OutputConflict, match="not made by liborth"):
        make(tmp_path, **flag)
    assert sorted(os.listdir(tmp_path)) == before
    assert (theirs / "thesis.txt").read_text() == "precious"
    assert what not in ("folder", "forged") or (place / "thesis.txt").exists()


def stop(folder, text="new"):
    """Leave what a run that was killed before its commit leaves."""
    with pytest.raises(Killed), Transaction(folder / "out", text, private=folder / "out.private") as work:
        fill(work, text, commit=False)
        raise Killed


@pytest.mark.parametrize("flag", [{"force": True}, {"resume": True}])
@pytest.mark.parametrize("name", ["files/thesis.txt", "thesis.txt", "files/notes/thesis.txt"])
def test_a_file_that_somebody_put_into_a_partial_directory_stays(tmp_path, flag, name):
    stop(tmp_path)
    stranger = tmp_path / "out.liborth-partial" / name
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_text("precious")
    with pytest.raises(OutputConflict, match=r"thesis\.txt: was not written"):
        make(tmp_path, **flag)
    assert stranger.read_text() == "precious"


def test_a_link_in_a_partial_directory_is_not_followed(tmp_path):
    stop(tmp_path)
    (tmp_path / "input").write_text("precious")
    inside = tmp_path / "out.liborth-partial" / "files" / "weights"
    inside.unlink()
    inside.symlink_to(tmp_path / "input")
    for flag in ({"resume": True}, {"force": True}):
        with pytest.raises(OutputConflict, match="weights: was not written"):
            make(tmp_path, **flag)
    assert (tmp_path / "input").read_text() == "precious" and inside.is_symlink()


def test_a_resumed_run_takes_only_what_it_can_prove(tmp_path):
    stop(tmp_path)
    with pytest.raises(OutputConflict, match="a stopped run is here"):
        make(tmp_path)
    with pytest.raises(OutputConflict, match="other inputs or options"):
        make(tmp_path, "another", resume=True)
    again = {"plan": "new", "resume": True, "private": tmp_path / "out.private"}
    with pytest.raises(LiborthError, match="without a look at the inputs"), Transaction(tmp_path / "out", **again) as work:
        fill(work)
    with Transaction(tmp_path / "out", **again) as work:
        assert "part" in work.finished
        work.check_inputs(lambda name: "another hash")
        assert work.finished == {} and not list(work.partial.iterdir()) and not list(work.private.iterdir())
        fill(work, "newer")
    assert (tmp_path / "out" / "weights").read_text() == "newer"


def test_a_journal_that_is_gone_or_of_another_run_proves_nothing(tmp_path):
    stop(tmp_path)
    journal = tmp_path / "out.liborth-partial" / "journal.jsonl"
    text = journal.read_text()
    for lines in ("", text.replace(json.loads(text.splitlines()[0])["owner"], "0" * 32)):
        journal.write_text(lines)
        with pytest.raises(OutputConflict, match="nothing proves what was finished"):
            make(tmp_path, resume=True)
    make(tmp_path, "another", force=True)
    assert (tmp_path / "out" / "weights").read_text() == "another"


def test_a_private_directory_of_another_run_is_not_mixed_in(tmp_path):
    stop(tmp_path)
    with pytest.raises(OutputConflict, match="a stopped run"):
        Transaction(tmp_path / "other", "new", private=tmp_path / "out.private", resume=True)
    assert (tmp_path / "out.private.liborth-partial" / "files" / "memory").exists()
    assert not (tmp_path / "other.liborth-partial").exists()
    make(tmp_path, resume=True)


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("atomic", [True, False], ids=["exchange", "undo log"])
def test_killed_at_any_step_of_a_commit_the_output_is_the_old_or_the_new_one(tmp_path, monkeypatch, at, atomic):
    """`at` counts what changes a name; from each point on, a second run with --resume ends with the new output."""
    make(tmp_path, "old")
    old, new = files(tmp_path), None
    (tmp_path / "reference").mkdir()
    make(tmp_path / "reference", "new")
    new = files(tmp_path / "reference")
    shutil.rmtree(tmp_path / "reference")
    real, swap, count = os.rename, exchange._exchange, iter(range(99))

    def rename(source, target, **where):
        if not where and next(count) == at:
            raise Killed
        real(source, target, **where)

    def change(one, two):
        if next(count) == at:
            raise Killed
        if not atomic:
            raise OSError(22, "no exchange here")
        swap(one, two)

    def abandon(moves, seen):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr(exchange, "_exchange", change)
        patch.setattr("liborth_cli.checkpoint.transaction._take_back", abandon)
        patch.setattr(Transaction, "__exit__", lambda self, *_: [c.release(keep=True) for c, _ in self._moves] and None)
        killed = True
        try:
            make(tmp_path, "new", force=True)
            killed = False
        except Killed:
            pass
    if killed and atomic:
        assert (tmp_path / "out" / "weights").read_text() in ("old", "new")
    make(tmp_path, "new", force=True, resume=True)
    assert files(tmp_path) == new != old


def test_a_commit_that_cannot_follow_takes_the_private_half_back(tmp_path):
    make(tmp_path, "old")
    before = files(tmp_path)
    how = {"plan": "new", "force": True, "private": tmp_path / "out.private"}
    with pytest.raises(OutputConflict, match="theirs: was not written"), Transaction(tmp_path / "out", **how) as work:
        (tmp_path / "out" / "theirs").write_text("precious")
        fill(work)
    (tmp_path / "out" / "theirs").unlink()
    assert {n: b for n, b in files(tmp_path).items() if "partial" not in n} == before
    make(tmp_path, "new", force=True, resume=True)
    assert (tmp_path / "out" / "weights").read_text() == "new"


def test_the_next_run_clears_up_behind_a_commit_that_was_killed_after_its_last_step(tmp_path, monkeypatch):
    make(tmp_path, "old")
    with monkeypatch.context() as patch:
        patch.setattr("liborth_cli.checkpoint.transaction._sweep", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            make(tmp_path, "new", force=True)
    assert (tmp_path / "out.private.liborth-partial" / "files" / "memory").read_text() == "secret of old"
    settle(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.private"]
    assert (tmp_path / "out" / "weights").read_text() == "new"


def test_factors_and_the_key_outlive_the_output_they_lie_in(tmp_path):
    kept = tmp_path / "out.private"
    (kept / "factors" / "retain").mkdir(parents=True)
    (kept / "factors" / "retain" / "a").write_text("measured for hours")
    private.identity(kept, b"")
    key = (kept / private.KEY).read_bytes()
    make(tmp_path, "old")
    make(tmp_path, "new", force=True)
    assert (kept / "factors" / "retain" / "a").read_text() == "measured for hours"
    assert (kept / private.KEY).read_bytes() == key
    assert (kept / "memory").read_text() == "secret of new"


@pytest.mark.parametrize("size", [10, claim.REREAD + 1], ids=["small", "large"])
def test_a_file_changed_after_it_was_hashed_is_found_at_commit(tmp_path, size):
    with pytest.raises(OutputConflict, match="is not what was written"), Transaction(tmp_path / "out", "plan") as work:
        written = write_file(work.partial / "weights", bytes(size))
        work.finish(Unit.of("part", [written]))
        facts = os.stat(work.partial / "weights")
        with (work.partial / "weights").open("r+b") as file:
            file.write(b"x")
        os.utime(work.partial / "weights", ns=(facts.st_atime_ns, facts.st_mtime_ns))
        work.commit(manifest.dump(described([written.to_json()])))
    assert not (tmp_path / "out").exists()


def test_what_this_run_did_not_write_does_not_get_into_the_output(tmp_path):
    with pytest.raises(OutputConflict, match="stray: was not written by this run"), Transaction(tmp_path / "out", "p") as work:
        (work.partial / "stray").write_text("x")
        work.commit(b"{}")


def test_a_partial_directory_that_is_replaced_gets_nothing(tmp_path):
    """Somebody removes it and starts another run: what is still written goes nowhere, and the other run is not disturbed."""
    with pytest.raises(OutputConflict, match="removed or replaced"), Transaction(tmp_path / "out", "plan") as first:
        shutil.rmtree(tmp_path / "out.liborth-partial")
        (tmp_path / "out.liborth-partial" / "files").mkdir(parents=True)
        with pytest.raises(OutputConflict, match="weights: cannot be written"):
            write_file(first.partial / "weights", b"of the first run")
        shutil.rmtree(tmp_path / "out.liborth-partial")
        with Transaction(tmp_path / "out", "another") as second:
            assert list(second.partial.iterdir()) == []
            with pytest.raises(OutputConflict, match="removed or replaced"):
                first.finish(UNIT)
            second.commit(b"{}")
        first.finish(UNIT)
    assert os.listdir(tmp_path / "out") == ["liborth.manifest.json"]


def test_the_lock_counts_only_on_the_directory_that_has_the_name(tmp_path, monkeypatch):
    """Between opening and locking, the directory becomes the output of another run: the lock is on that, and counts nothing."""
    stop(tmp_path)
    real = fcntl.flock

    def late(fd, how):
        monkeypatch.setattr(fcntl, "flock", real)
        make(tmp_path, resume=True)
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputConflict, match="removed or replaced"):
        make(tmp_path, "another", force=True)
    assert (tmp_path / "out" / "weights").read_text() == "new"


def test_one_of_many_writers_wins(tmp_path):
    ends = []

    def write(number):
        try:
            with Transaction(tmp_path / "out", "plan") as work:
                work.commit(b"{}")
            ends.append("done")
        except OutputConflict:
            ends.append("refused")

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "done" in ends and os.listdir(tmp_path) == ["out"]


def test_a_link_as_output_leads_to_the_place_where_the_work_is_done(tmp_path):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large_disk" / "there")
    with Transaction(tmp_path / "out", "plan") as work:
        assert work.partial.parent == Path(os.path.realpath(tmp_path)) / "large_disk" / "there.liborth-partial"
        work.commit(b"{}")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "large_disk" / "there" / "liborth.manifest.json").exists()


def test_modes_are_never_wider_than_the_umask_allows(tmp_path):
    old = os.umask(0o077)
    try:
        make(tmp_path)
    finally:
        os.umask(old)
    assert {p.stat().st_mode & 0o077 for p in tmp_path.rglob("*")} == {0}


def test_short_writes_are_continued_and_a_disk_that_takes_nothing_is_an_error(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[: max(len(data) // 2, 1)]))
    assert hash_file(tmp_path / write_file(tmp_path / "a", b"0123456789").name).size == 10
    monkeypatch.setattr(os, "write", lambda fd, data: 0)
    with pytest.raises(OutputConflict, match="takes no more"):
        write_file(tmp_path / "a", b"other")
    assert (tmp_path / "a").read_bytes() == b"0123456789" and os.listdir(tmp_path) == ["a"]


def test_a_single_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OutputConflict, match="a: cannot be written"):
        write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_an_unreadable_file_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        hash_file(tmp_path / "nothing")


def test_a_private_file_begun_before_any_part_was_finished_stands_in_nobodys_way(tmp_path):
    """A training run writes its first state in private; killed before it is journalled, nothing is there to resume."""
    for flag in ({}, {"resume": True}, {"force": True}):
        work = Transaction(tmp_path / "out", "new", private=tmp_path / "out.private", **flag)
        write_file(work.private / "state", b"half of it")
        for held, _ in work._moves:
            held.release(keep=True)
        settle(tmp_path / "out")
    make(tmp_path)
    assert sorted(os.listdir(tmp_path / "out.private")) == [".gitignore", "README.md", "liborth.private.json", "memory"]
