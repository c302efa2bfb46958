"""The process around a command: pipes, encodings, closed and full streams, limits, and what every error says."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import pair, save, weights

LIBORTH = [sys.executable, "-m", "liborth_cli"]


@pytest.fixture
def shell(tmp_path):
    """Run a line of shell with `liborth` in it; return exit code, stdout and stderr as bytes."""

    def run(line: str, **environment: str) -> tuple[int, bytes, bytes]:
        line = line.replace("liborth ", " ".join(LIBORTH) + " ")
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env={**os.environ, **environment}, capture_output=True)
        return done.returncode, done.stdout, done.stderr

    return run


def test_a_full_or_closed_stderr_does_not_stop_the_work(shell, tmp_path):
    pair(tmp_path)
    for number, where in enumerate(("2>&-", "2>/dev/full")):
        code, out, _ = shell(f"liborth split base finetuned --rank 4 -o out{number} {where}")
        assert (code, out) == (0, f"out{number}\n".encode())
        assert (tmp_path / f"out{number}" / "model.safetensors").exists()
    assert shell("liborth inspect nowhere 2>/dev/full")[0] == 3


def test_a_working_directory_that_is_gone_is_one_line(shell, tmp_path):
    pair(tmp_path)
    for words in (f"split {tmp_path}/base {tmp_path}/finetuned --rank 4 -o {tmp_path}/out", "doctor"):
        code, out, err = shell(f"mkdir gone && cd gone && rmdir ../gone && liborth {words}")
        assert (code, out, err) == (3, b"", b"error: the working directory was deleted; change to one that exists\n")
    assert not (tmp_path / "out").exists()


def test_a_closed_stdout_does_not_receive_our_files_and_a_full_one_is_said(shell, tmp_path):
    pair(tmp_path)
    code, _, err = shell("liborth split base finetuned --rank 4 -o out >&- <&-")
    assert code == 0, err
    assert (tmp_path / "out" / "liborth.manifest.json").read_bytes().startswith(b"{")
    code, _, err = shell("liborth inspect base >/dev/full")
    assert (code, b"no space" in err, err.count(b"\n")) == (7, True, 1)


def test_a_reader_that_goes_away_ends_the_command_quietly(shell, tmp_path):
    save(tmp_path / "many", {f"t{i}": t for i in range(2000) for t in weights().values() if t.dim() == 1})
    code, _, err = shell("liborth inspect many -v --json | head -c 10; exit ${PIPESTATUS[0]}")
    assert (code, err) == (141, b"")
    for words in ("inspect many -v", "doctor", "split -h", "split many many --print-config", "--version"):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([*LIBORTH, *words.split()], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        assert (done.returncode, done.stderr) == (141, b""), words


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_takes_any_text(shell, tmp_path, encoding):
    pair(tmp_path)
    words = "liborth split base finetuned --method scale --scale 0.5 -v -o outβ && liborth inspect base finetuned --profile"
    code, out, err = shell(words, PYTHONIOENCODING=encoding)
    assert code == 0, err
    name = "outβ" if encoding == "utf-8" else "out\\u03b2"
    assert out.decode(encoding).startswith(f"{name}\n")
    out.decode(encoding)
    err.decode(encoding)


def test_a_name_that_is_not_utf8_comes_out_as_its_own_bytes(shell, tmp_path):
    pair(tmp_path)
    code, out, err = shell("liborth inspect $'nowhere\\xff'")
    assert (code, out) == (3, b"") and b"nowhere" in err and err.count(b"\n") == 1
    code, out, err = shell("liborth split base finetuned --rank 4 -o $'out\\xff'")
    assert (code, out) == (0, b"out\xff\n"), err


def test_more_shards_than_the_usual_number_of_descriptors(shell, tmp_path):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 256:
        pytest.skip("the hard limit is low")
    save(tmp_path / "many", {f"t{i:03d}.weight": weights()["layers.0.norm.weight"] for i in range(150)}, shards=150)
    code, _, err = shell("ulimit -Sn 64; liborth inspect many")
    assert code == 0, err
    code, _, err = shell("ulimit -n 64; liborth inspect many")
    assert (code, b"open files" in err, err.count(b"\n")) == (7, True, 1), err


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, 7), (errno.EMFILE, 7), (errno.ENOMEM, 7), (errno.EACCES, 6), (errno.EROFS, 6), (errno.EIO, 3)],
)
def test_an_os_error_is_one_line_with_its_file_and_a_code_of_its_own(cli, monkeypatch, number, code):
    import liborth_cli.inspect

    def fail(*_):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr(liborth_cli.inspect, "describe", fail)
    found, out, err = cli("inspect", "x")
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert "some/file" in err and os.strerror(number) in err


def test_an_error_line_is_short_and_keeps_its_end(cli, tmp_path):
    code, _, err = cli("inspect", tmp_path / ("long" * 200) / "x")
    assert (code, err.count("\n")) == (3, 1) and len(err) <= 300
    from liborth_cli.console import LONGEST_ERROR

    assert LONGEST_ERROR < 300


def test_out_of_memory_and_bugs_are_one_line(cli, monkeypatch):
    import liborth_cli.inspect

    text = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory"
    for error, code, says in (
        (MemoryError(), 7, "out of memory"),
        (RuntimeError(text), 7, "out of memory"),
        (ZeroDivisionError("one\ntwo"), 1, "unexpected ZeroDivisionError: one; -v shows where"),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(liborth_cli.inspect, "describe", fail)
        found, out, err = cli("inspect", "x")
        assert (found, out, err.count("\n")) == (code, "", 1) and says in err


@pytest.mark.skipif(not Path("/proc/self/coredump_filter").exists(), reason="the kernel writes cores in another way")
def test_a_core_that_a_handler_is_given_holds_no_memory(shell):
    """The limit on the size of a core does not stop a handler that takes it through a pipe."""
    program = "from liborth_cli.cli.process import guard; guard(lambda: print(open('/proc/self/coredump_filter').read()))"
    assert int(shell(f'{sys.executable} -c "{program}"')[1], 16) == 0


def test_a_crash_leaves_no_core_file(shell, tmp_path):
    """It would hold whatever was in memory: weights, texts, secrets."""
    program = "import os; from liborth_cli.cli.process import guard; guard(os.abort)"
    code, _, _ = shell(f'ulimit -c unlimited 2>/dev/null; {sys.executable} -c "{program}"')
    assert code in (-6, 134) and not list(tmp_path.iterdir())
    limit = "import resource; from liborth_cli.cli.process import guard; guard(lambda: print(resource.getrlimit(4)[0]))"
    assert shell(f'{sys.executable} -c "{limit}"')[1] == b"0\n"
