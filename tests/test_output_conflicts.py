"""Outputs that exist, are inputs, cannot be written or do not fit on the disk; two writers at once."""

import errno
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny import files, pair, save, weights

from liborth_cli.checkpoint import private, transaction
from liborth_cli.checkpoint.files import write_file
from liborth_cli.checkpoint.journal import Unit
from liborth_cli.checkpoint.outputs import check_space
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.errors import BadInput, OutOfResources, OutputConflict
from liborth_cli.methods import Amount
from liborth_cli.split.options import SplitOptions
from liborth_cli.split.plan import Splitter


def split(cli, base, finetuned, out, *words):
    return cli("split", base, finetuned, "--rank", 4, "-o", out, *words)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (lambda base: base, "must lie outside the input"),
        (lambda base: base / "inside", "must lie outside the input"),
        (lambda base: base.parent, "must lie outside the input"),
        (lambda base: base.parent / "occupied", "exists; choose another -o"),
        (lambda base: base.parent / "a_file", "exists"),
        (lambda base: base.parent / "a_link", "must lie outside the input"),
        (lambda base: Path("/"), "must lie outside the input"),
    ],
)
def test_refused_places(cli, tmp_path, place, says):
    base, finetuned = pair(tmp_path)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "precious").write_text("x")
    (tmp_path / "a_file").write_text("x")
    (tmp_path / "a_link").symlink_to(base)
    before = files(tmp_path)
    code, out, err = split(cli, base, finetuned, place(base))
    assert (code, out, err.count("\n")) == (6, "", 1)
    assert says in err
    assert files(tmp_path) == before


def test_nothing_private_is_put_into_what_may_be_published(cli, tmp_path, monkeypatch):
    base, finetuned = pair(tmp_path)
    assert split(cli, base, finetuned, tmp_path / "out")[0] == 0
    (tmp_path / "out" / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path / "out")
    for words in (
        ("split", base, finetuned, "--rank", 2, "-o", tmp_path / "out" / "inside"),
        ("split", base, finetuned, "--rank", 2, "-o", tmp_path / "link" / "deep" / "inside"),
        ("split", base, finetuned, "--rank", 2, "-o", "empty"),
        ("split", base, finetuned, "--rank", 2, "-o", tmp_path / "other", "--memory-out", tmp_path / "out" / "inside"),
        ("excise", tmp_path / "out", "--beta", 0, "-o", "inside"),
    ):
        code, _, err = cli(*words, "--force", "-q")
        assert (code, err.count("\n")) == (6, 1), err
        assert files(tmp_path) == before


def test_an_empty_directory_is_a_fine_place(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    (tmp_path / "out").mkdir()
    assert split(cli, base, finetuned, tmp_path / "out")[0] == 0


def test_force_replaces_no_memory_of_another_output(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    assert split(cli, base, finetuned, tmp_path / "out")[0] == 0
    before, private = files(tmp_path), tmp_path / "out.private"
    for words in (
        ("excise", tmp_path / "out", "--beta", 0, "-o", private),
        ("split", base, finetuned, "--rank", 2, "-o", private),
        ("split", base, finetuned, "--rank", 2, "-o", tmp_path / "other", "--memory-out", private),
        ("verify", tmp_path / "out", "--integrity", "--out", private / "memory.safetensors"),
        ("verify", tmp_path / "out", "--integrity", "--report", private / "liborth.private.json"),
    ):
        code, _, err = cli(*words, "--force", "-q")
        assert (code, err.count("\n")) == (6, 1), err
        assert files(tmp_path) == before
    assert split(cli, base, finetuned, tmp_path / "out", "--force")[0] == 0, "its own is replaced with it"


def test_force_replaces_only_what_liborth_wrote(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").write_text("x")
    code, _, err = split(cli, base, finetuned, tmp_path / "home", "--force")
    assert (code, "replaces only what liborth wrote" in err) == (6, True)
    assert (tmp_path / "home" / "precious").exists()
    split(cli, base, finetuned, tmp_path / "out")
    assert split(cli, base, finetuned, tmp_path / "out")[0] == 6
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "mine").write_text("x")
    before = files(tmp_path)
    code, _, err = split(cli, base, finetuned, tmp_path / "out", "--force")
    assert (code, "notes/mine: was not written by liborth" in err) == (6, True)
    assert files(tmp_path) == before
    (tmp_path / "out" / "notes" / "mine").unlink(), (tmp_path / "out" / "notes").rmdir()
    with (tmp_path / "out" / "README.md").open("a") as card:
        card.write("my own words")
    assert split(cli, base, finetuned, tmp_path / "out", "--force")[0] == 6
    (tmp_path / "out" / "README.md").unlink()
    assert split(cli, base, finetuned, tmp_path / "out", "--force")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "finetuned", "home", "out", "out.private"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = split(cli, base, finetuned, tmp_path / "locked" / "out")
    assert (code, "cannot be written to" in err) == (6, True)


def test_a_directory_the_kernel_refuses(cli, tmp_path):
    """Even root cannot create a directory in /proc, which also claims to have no space."""
    base, finetuned = pair(tmp_path)
    code, out, err = split(cli, base, finetuned, "/proc/liborth-out")
    assert (code, out, err.count("\n")) == (6, "", 1)
    assert "the directory /proc cannot be written to" in err
    with pytest.raises(OutputConflict, match="cannot be created"):
        Transaction(Path("/proc/liborth-out"), "plan")


def test_a_full_disk(tmp_path):
    """RLIMIT_FSIZE makes the kernel refuse in the middle of the second file, as a full disk would."""
    base, finetuned = pair(tmp_path, shards=2)
    limit = min(f.stat().st_size for f in finetuned.glob("*.safetensors")) - 500
    result = subprocess.run(
        [sys.executable, "-m", "liborth_cli", "split", base, finetuned, "--rank", "4", "-o", tmp_path / "out"],
        capture_output=True, text=True, cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert result.returncode == 7, result.stderr
    assert "no space" in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_seen_before_the_work(tmp_path):
    with pytest.raises(OutOfResources, match="GB are free"):
        check_space(tmp_path / "out", 1 << 60)


def test_two_writers(tmp_path):
    first = Transaction(tmp_path / "out", "plan")
    with pytest.raises(OutputConflict, match="another run is writing here"):
        Transaction(tmp_path / "out", "plan")
    with pytest.raises(OutputConflict, match="another run is writing here"):
        Transaction(tmp_path / "out", "plan", force=True, resume=True)
    with first:
        first.commit(b"{}")
    assert sorted(os.listdir(tmp_path / "out")) == ["liborth.manifest.json"]


def test_two_writers_in_two_processes_give_one_whole_output(liborth, tmp_path):
    base, finetuned = pair(tmp_path)
    codes = []

    def write():
        codes.append(liborth("split", base, finetuned, "--rank", 4, "-o", tmp_path / "out", check=False).returncode)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(codes) == [0, 6]
    assert liborth("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "one").returncode == 0


def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(OutputConflict, match="appeared while"), Transaction(tmp_path / "out", "plan") as work:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")
        work.commit(b"{}")
    assert os.listdir(tmp_path / "out") == ["theirs"]


def test_bad_input_leaves_nothing_and_a_crash_leaves_what_is_finished(tmp_path):
    with pytest.raises(BadInput), Transaction(tmp_path / "out", "plan") as work:
        work.finish(Unit.of("unit"))
        raise BadInput("x")
    assert os.listdir(tmp_path) == []
    with pytest.raises(RuntimeError), Transaction(tmp_path / "out", "plan") as work:
        write_file(work.partial / "f", b"x")
        work.finish(Unit.of("unit", [transaction.hash_file(work.partial / "f")]))
        raise RuntimeError
    with Transaction(tmp_path / "out", "plan", resume=True) as work:
        assert list(work.finished) == ["unit"]


def test_resume_believes_only_what_still_hashes_right(tmp_path):
    with pytest.raises(RuntimeError), Transaction(tmp_path / "out", "plan") as work:
        for name in ("a", "b", "c"):
            write_file(work.partial / name, name.encode())
            work.finish(Unit.of(name, [transaction.hash_file(work.partial / name)]))
        (work.partial / "b").write_text("B")
        with (work.partial.parent / "journal.jsonl").open("a") as journal:
            journal.write('{"unit": "d", "fi')
        raise RuntimeError
    with Transaction(tmp_path / "out", "plan", resume=True) as work:
        assert list(work.finished) == ["a", "c"]
        work.finish(Unit.of("d"))
        raise_on_exit = (work.partial.parent / "journal.jsonl").read_text()
    assert raise_on_exit.count("\n") == 4


def test_resume_with_other_options_is_refused(tmp_path):
    with pytest.raises(RuntimeError), Transaction(tmp_path / "out", "plan") as work:
        work.finish(Unit.of("unit"))
        raise RuntimeError
    with pytest.raises(OutputConflict, match="a stopped run is here"):
        Transaction(tmp_path / "out", "plan")
    with pytest.raises(OutputConflict, match="other inputs or options"):
        Transaction(tmp_path / "out", "another plan", resume=True)
    with Transaction(tmp_path / "out", "another plan", force=True) as work:
        assert work.finished == {}
        work.commit(b"{}")


def test_inputs_are_never_written(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    for file in [*base.iterdir(), *finetuned.iterdir()]:
        file.chmod(0o400)
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in [*base.iterdir(), *finetuned.iterdir()]}
    assert split(cli, base, finetuned, tmp_path / "out")[0] == 0
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in before} == before


def test_a_single_file_is_a_checkpoint_too(cli, tmp_path):
    save(tmp_path / "a", weights()), save(tmp_path / "b", weights(seed=1))
    a, b = (tmp_path / n / "model.safetensors" for n in "ab")
    b = b.rename(tmp_path / "tuned.safetensors")
    assert split(cli, a, b, tmp_path / "out")[0] == 0
    assert cli("excise", tmp_path / "out", "--beta", 1, "-o", tmp_path / "one")[0] == 0
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == b.read_bytes()


def test_copying_without_the_kernels_help(cli, tmp_path, monkeypatch):
    """File systems (and systems) without copy_file_range get a plain copy."""
    base, finetuned = pair(tmp_path)
    split(cli, base, finetuned, tmp_path / "out")

    def refuse(*_):
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert cli("excise", tmp_path / "out", "--beta", 0, "-o", tmp_path / "zero")[0] == 0
    assert (tmp_path / "zero" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_the_memory_of_one_output_is_not_replaced_by_anothers(cli, tmp_path):
    base, finetuned = pair(tmp_path)
    words = ("split", base, finetuned, "--method", "svd", "--rank", 2, "--memory-out", tmp_path / "m")
    assert cli(*words, "-o", tmp_path / "one")[0] == 0
    before = files(tmp_path / "m")
    code, _, err = cli(*words, "-o", tmp_path / "two", "--force")
    assert (code, err.count("\n")) == (6, 1) and "another output" in err
    assert files(tmp_path / "m") == before and not (tmp_path / "two").exists()
    assert cli(*words, "-o", tmp_path / "one", "--force")[0] == 0
    assert cli("split", base, finetuned, "--rank", 2, "-o", tmp_path / "x.private")[0] == 6


def test_packing_counts_both_forms_of_a_memory_file(tmp_path):
    base, finetuned = pair(tmp_path)
    with Checkpoint.open(base) as old, Checkpoint.open(finetuned) as new:
        how = [SplitOptions("svd", Amount("rank", 4), memory_format=f, out_shard_size=2000) for f in ("xor", "packed")]
        plans = [Splitter(old, new, one) for one in how]
        edited = sum(item.tensor.nbytes for item in plans[0].items.values() if item.action.value != "skill")
        assert plans[0].disk_bytes() < plans[1].disk_bytes() < plans[1].disk_bytes(scattered=True)
        assert plans[1].disk_bytes(scattered=True) == plans[0].disk_bytes() + edited


def test_resume_says_when_there_is_nothing_to_go_on_with(cli, tmp_path):
    """Another method than the stopped one's begins anew, says so, and leaves no key behind that names nothing."""
    base, finetuned = pair(tmp_path)
    factors = tmp_path / "out.private" / "factors"
    private.prepare_factors(factors)
    private.identity(factors, b"rows")
    code, _, err = split(cli, base, finetuned, tmp_path / "out", "--resume")
    assert code == 0, err
    assert "nothing to go on with here; begun anew" in err
    assert not factors.exists()
    assert "begun anew" not in split(cli, base, finetuned, tmp_path / "other")[2]
