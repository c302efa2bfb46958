"""A verification that was stopped goes on behind the checks it had finished, and only on the same inputs."""

import json
import shutil
from dataclasses import replace

import pytest
from verify_cases import SECRETS, UNSEEN, place, split

from liborth_cli.checkpoint import cache
from liborth_cli.errors import Stopped
from liborth_cli.methods import Amount
from liborth_cli.verify.checks import CHECKS
from liborth_cli.verify.kept import decode, encode

ASKED = ("integrity", "canary", "membership", "relearn", "rounding", "sweep")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = place(tmp_path_factory.mktemp("pair"))
    split(found, "svd32", "svd", Amount("rank", 32))
    return found


@pytest.fixture(scope="module")
def known():
    """What checks found, by what they were asked: what is tested here is what is done with it."""
    return {}


@pytest.fixture
def verify(cli, folder, known, monkeypatch, tmp_path):
    """Run it on the split, note which checks are made, and stop in one of them."""
    made, runs = [], {name: CHECKS[name].run for name in ASKED}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # other tests stop in the middle, too
    shutil.copy(SECRETS, tmp_path / "secrets.jsonl")

    def run(*words, stops=""):
        made.clear()

        def watched(name):
            def check(subject, options):
                if name == stops:
                    raise Stopped(2)
                made.append(name)
                asked = name, repr(options), (tmp_path / "secrets.jsonl").read_text()
                result = known[asked] = known.get(asked) or runs[name](subject, options)
                text = json.dumps(encode(result))
                assert json.dumps(encode(decode(json.loads(text)))) == text
                return result

            return check

        for name in ASKED:
            monkeypatch.setitem(CHECKS, name, replace(CHECKS[name], run=watched(name)))
        texts = ("--canary", tmp_path / "secrets.jsonl", "--fresh", UNSEEN, "--relearn-rate", 1e-3, "--relearn-steps", 2)
        named = [f"--{name}" for name in ASKED if CHECKS[name].words]
        code, _, err = cli("verify", folder / "svd32", *texts, *named, "--no-require", "-j", 1, *words)
        return code, err, tuple(made)

    return run


def kept():
    return list((cache.place() / "checks").glob("*.json"))


def test_finished_checks_are_kept_and_not_made_again(verify, tmp_path):
    whole, resumed = tmp_path / "whole.json", tmp_path / "resumed.json"
    code, err, _ = verify("-o", whole)
    assert code == 0 and not kept(), err
    code, err, made = verify("-o", resumed, stops="sweep")
    assert (code, made) == (130, ASKED[:-1])
    assert "checks that are finished are kept" in err and "--resume" in err and not resumed.exists()
    (file,) = kept()
    assert [path.stat().st_mode & 0o777 for path in (file, file.parent, cache.place())] == [0o600, 0o700, 0o700]
    code, err, made = verify("-o", resumed, "--resume")
    assert (code, made) == (0, ("integrity", "sweep")), err  # files are looked at every time
    assert "relearn, finished before" in err
    assert resumed.read_bytes() == whole.read_bytes() and not kept()
    assert "begun anew" in verify("--resume")[1]


def test_other_inputs_or_options_are_measured_anew_and_said(verify, folder, tmp_path):
    verify(stops="sweep")
    _, err, made = verify("--relearn-steps", 4, "--resume", stops="sweep")
    assert made == ("integrity", "relearn") and "relearn: finished before on other" in err
    rows = (tmp_path / "secrets.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "secrets.jsonl").write_text("".join(rows[:-1]))
    assert verify("--resume", "--relearn-steps", 4, stops="sweep")[2] == ASKED[:-1]
    raw = bytearray(kept()[0].read_bytes())
    raw[len(raw) // 2] ^= 1
    kept()[0].write_bytes(raw)
    code, err, made = verify("--resume", "--relearn-steps", 4)
    assert (code, made) == (0, ASKED) and "damaged" in err


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(verify, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LIBORTH_CACHE", str(tmp_path / "file"))
    code, err, _ = verify(stops="sweep")
    assert code == 130 and "no check is kept" in err and "--resume" not in err.splitlines()[-1]
    assert verify()[0] == 0
