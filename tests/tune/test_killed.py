"""SIGKILL in a real process: the output is absent, and --resume ends in the bytes of a run that was never stopped."""

import os
import signal
import subprocess
import sys
import time

from tiny import files, private

from liborth_cli.checkpoint import pace
from liborth_cli.tune import run


def test_killed_and_resumed_gives_the_same_bytes(place, tmp_path, cli):
    def words(out, *more):
        common = (
            "tune",
            place / "base",
            "--method",
            "sinks",
            "--data",
            place / "rows.npy",
            "--private-data",
            place / "secret.npy",
        )
        common += ("--sinks", 6, "--steps", 40, "--save-every", 4, "--batch-size", 4, "--seq-len", 16, "--lr", 1e-3, "-j", 1)
        return [str(word) for word in (*common, "-o", out, *more)]

    out, whole, partial = tmp_path / "out", tmp_path / "whole", tmp_path / "out.private.liborth-partial" / "files"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "liborth_cli", *words(out)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment) as process:
        journal = tmp_path / "out.liborth-partial" / "journal.jsonl"
        while not (journal.exists() and '"unit"' in journal.read_text()):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not out.exists() and journal.exists()
    # A kill between a new state's line in the journal and the removal of the old one leaves two: no state is published.
    (partial / "state-00000001.safetensors").write_bytes(b"of a step long gone")
    with (partial.parent / "names").open("ab") as names:
        names.write(b"state-00000001.safetensors\0")
    code, _, err = cli(*words(out, "--resume"))
    assert code == 0, err
    assert cli(*words(whole))[0] == 0
    assert files(out) == files(whole) and files(private(out)) == files(private(whole)) and not partial.parent.exists()


def test_a_state_is_saved_each_minute_however_far_apart_the_steps_are(place, tmp_path, cli, monkeypatch):
    saved, save = [], run.TrainingRun._save

    def note(self):
        saved.append(self.state.step)
        save(self)

    monkeypatch.setattr(run.TrainingRun, "_save", note)
    words = ("tune", place / "base", "--method", "full", "--data", place / "rows.npy", "--steps", 4, "--seq-len", 16, "-j", 1)
    assert cli(*words, "-o", tmp_path / "seldom")[0] == 0 and not saved
    monkeypatch.setattr(pace, "SECONDS", 0.0)
    monkeypatch.setattr(pace, "SHARE", 0.0)
    assert cli(*words, "-o", tmp_path / "often")[0] == 0 and saved == [1, 2, 3]
    assert files(tmp_path / "seldom") == files(tmp_path / "often")
