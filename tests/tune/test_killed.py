"""SIGKILL in a real process: the output is absent, and --resume ends in the bytes of a run that was never stopped."""

import os
import signal
import subprocess
import sys
import time

from tiny import files

STEPS = 120


def start(place, out, *words):
    command = [sys.executable, "-m", "liborth_cli", "tune", place / "base", "--method", "sinks", "--data", place / "rows.npy"]
    command += ["--private-data", place / "secret.npy", "--sinks", "6", "--steps", str(STEPS), "--save-every", "5"]
    command += ["--batch-size", "4", "--seq-len", "16", "--lr", "1e-3", "-j", "1", "-o", out, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([str(word) for word in command], stderr=subprocess.DEVNULL, env=environment)


def kill_after(process, partial, step):
    """Kill the process once a state of at least this step is in the journal, wherever it is by then."""
    for _ in range(12_000):
        states = [int(file.name[6:14]) for file in partial.glob("state-*.safetensors")] if partial.exists() else []
        if states and max(states) >= step:
            break
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_twice_and_resumed_gives_the_same_bytes(place, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    other = start(place, whole)
    partial = tmp_path / "out.liborth-partial"
    kill_after(start(place, out), partial, 5)
    assert not out.exists()
    kill_after(start(place, out, "--resume"), partial, 60)
    assert not out.exists()
    assert start(place, out, "--resume").wait() == 0
    assert other.wait() == 0
    assert files(out) == files(whole) and not partial.exists()


def test_a_state_that_outlived_its_run_never_reaches_the_output(place, tmp_path):
    """A kill between a new state's journal line and the removal of the old one leaves two."""
    out, partial = tmp_path / "out", tmp_path / "out.liborth-partial"
    kill_after(start(place, out), partial, 5)
    (partial / "state-00000001.safetensors").write_bytes(b"of a step long gone")
    assert start(place, out, "--resume").wait() == 0
    assert not list(out.glob("state-*"))
