"""Ctrl-C, SIGTERM and SIGKILL at any moment: the output is absent or whole, and --resume ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from interrupt import slow_pair, wait_for
from tiny import files

COMMAND = [sys.executable, "-m", "liborth_cli"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A pair of 8 shards that takes a moment, and the directory an uninterrupted run makes of it."""
    folder = slow_pair(tmp_path_factory.mktemp("stop"))
    run(folder, "whole").wait()
    return folder


def run(folder, out, *words):
    command = [
        *COMMAND,
        "split",
        folder / "base",
        folder / "finetuned",
        "--energy",
        "0.5",
        "-j",
        "1",
        "-o",
        folder / out,
        *words,
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_cleanly_and_can_be_resumed(job, number, code):
    out = f"signal{code}"
    process = run(job, out)
    wait_for(job / f"{out}.liborth-partial", 2)
    process.send_signal(number)
    err = process.communicate()[1]
    assert process.returncode == code, err
    assert "--resume" in err
    assert not (job / out).exists()
    again = run(job, out)
    assert "a stopped run is here" in again.communicate()[1]
    assert again.returncode == 6
    resumed = run(job, out, "--resume")
    assert "done before" in resumed.communicate()[1]
    assert resumed.returncode == 0
    assert files(job / out) == files(job / "whole")


def test_sigkill_at_any_instant(job):
    """Kill at random moments: after each one the output is absent, or it is there and whole."""
    moments = random.Random(0)
    for _ in range(5):
        process = run(job, "killed", "--resume")
        time.sleep(0.9 + moments.random() * 1.2)
        process.kill()
        process.communicate()
        if (job / "killed").exists():
            break
    else:
        assert run(job, "killed", "--resume").wait() == 0
    assert files(job / "killed") == files(job / "whole")


def test_excise_resumes_too(job):
    def excise(*words):
        command = [*COMMAND, "excise", job / "whole", "--beta", "0.5", "-j", "1", "-o", job / "half", *words]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    process = excise()
    partial = job / "half.liborth-partial"
    wait_for(partial, 1)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    if process.returncode == 0:
        pytest.skip("the machine was faster than the signal")
    assert process.returncode == 143
    assert not (job / "half").exists()
    assert excise("--resume").wait() == 0
    whole = subprocess.run([*COMMAND, "excise", job / "whole", "--beta", "0.5", "-o", job / "half2"], capture_output=True)
    assert whole.returncode == 0
    assert files(job / "half") == files(job / "half2")
