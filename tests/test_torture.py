"""The fast part of `make torture`: every call of a transaction goes wrong once, and a sample of everything else."""

import json
import shutil
import subprocess

import pytest

from liborth_cli import manifest
from liborth_cli.checkpoint import exchange, private
from liborth_cli.checkpoint.files import write_file
from liborth_cli.checkpoint.journal import Unit
from liborth_cli.checkpoint.transaction import Transaction, settle
from liborth_cli.checkpoint.writer import ShardWriter
from tools.torture import dishonest, fuzz, trials
from tools.torture.field import Field, Missed
from tools.torture.inject import ERRORS, Fault, fork, hashes, preload


def job(folder, text, **how):
    """What every command does: two directories, a streamed file, a private one, manifests."""
    import numpy as np

    with Transaction(folder / "out", text, private=folder / "out.private", **how) as work:
        work.check_inputs(lambda _: "hash")
        if "part" not in work.finished:
            shard = ShardWriter(work.partial / "model.safetensors", [("w", "U8", (64,))])
            shard.begin("w", "U8", (64,))
            shard.write(np.frombuffer(text.encode() * 32, np.uint8)[:64])
            memory = write_file(work.private / "memory", text.encode() * 99, 0o600)
            work.finish(Unit.of("part", [shard.finish()], [memory], inputs={"in": "hash"}))
        unit = work.finished["part"]
        made = {**manifest.Maker(kind="excise").model_dump(), "parameters": {"beta": 0.0}}
        document = manifest.sealed({**made, "outputs": [file.model_dump() for file in unit.files]})
        private.seal(work.private, [file.written for file in unit.private], document["digest"])
        work.commit(manifest.dump(document))


@pytest.mark.parametrize(
    ("how", "what", "step"),
    [
        ("new", "kill", 5), ("force", "kill", 2), ("force without exchange", "kill", 5), ("force", "EIO", 7),
        ("new", "ENOSPC", 7),
        ("force without exchange", "EACCES", 9), ("force", "short", 11),
    ],
)  # fmt: skip
def test_a_transaction_survives_a_fault_at_any_call(tmp_path, how, what, step, monkeypatch):
    """After each one both outputs are absent, old or new, and a second run ends with the new ones and nothing beside them."""
    flags = {} if how == "new" else {"force": True}
    if how == "force without exchange":
        monkeypatch.setattr(exchange, "_exchange", lambda *_: (_ for _ in ()).throw(OSError(22, "no exchange of names")))
    states = {}
    for text in ("old", "new"):
        job(tmp_path / text, text)
        states[text] = hashes(tmp_path / text)
    place, at = tmp_path / "place", 0
    while True:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(tmp_path / "old", place) if flags else place.mkdir()
        ended = fork(lambda: job(place, "new", **flags), Fault(at, what))
        now = hashes(place)
        for name in ("out", "out.private"):
            found = {n: h for n, h in now.items() if n.split("/")[0] == name}
            allowed = [{n: h for n, h in states[text].items() if n.split("/")[0] == name} for text in ("old", "new")]
            if how != "force without exchange":
                assert found in (allowed if flags else [{}, allowed[1]]), (at, name, ended)
        assert what != "short" or (ended.code == 0 and now == states["new"]), (at, ended)
        settle(place / "out")
        if hashes(place).get("out/model.safetensors") != states["new"]["out/model.safetensors"]:
            job(place, "new", resume=True, **flags)
        assert hashes(place) == states["new"], (at, ended)
        if at >= len(ended.calls) and not ended.hit:
            break
        at += step
    assert at > 40


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    preload()
    return Field(tmp_path_factory.mktemp("torture") / "field", models=False)


def test_commands_survive_a_sample_of_faults(field):
    for whats, count in ((["kill"], 10), (ERRORS, 10), (["short"], 3)):
        trial = field.faults(whats)
        assert [wrong for n in range(count) if (wrong := attempt(trial, n * 47))] == []
    assert [wrong for n in range(2) if (wrong := attempt(field.moment, n))] == []


def attempt(trial, number):
    try:
        return trial(number)
    except Missed:
        return None


def test_faults_reach_every_call_of_every_job(field):
    reached = {(job.name, fault.at) for job, fault in field.every_call(lambda _: "kill")}
    assert reached >= {(name, at) for name, calls in field.calls.items() for at in range(len(calls))}


def test_a_flipped_bit_is_found_in_every_file(field):
    assert [wrong for n in range(9) if (wrong := trials.rot(field, n))] == []


def test_foreign_things_beside_an_output_stay(field):
    assert [wrong for n in range(0, 63, 7) if (wrong := trials.hostile(field, n))] == []


def test_a_core_holds_nothing_of_what_was_in_memory(field):
    """Even where cores are taken through a pipe, which the limit on their size does not stop."""
    done = trials.secret(field, 52), trials.secret(field, 54)
    assert done == (None, None)


def test_what_others_see_of_a_process_is_looked_at():
    """The control of the trial on secrets: what stands in an argument or an environment is found."""
    # The program says when it is there: right after exec the kernel shows an empty environment for a moment.
    with subprocess.Popen(
        ["sh", "-c", "echo; read _", "an argument"], env={"SECRET": "a variable"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline()
        told = b"".join(trials.outside(child.pid))
        child.kill()
    assert b"an argument" in told and b"a variable" in told


def test_damaged_documents_are_refused_in_words(field, monkeypatch):
    monkeypatch.setattr(fuzz, "BATCH", 150)
    for name, trial in fuzz.trials(field.work):
        assert trial(0) is None, name


@pytest.fixture(scope="module")
def bench(field):
    return dishonest.Bench(field.work / "dishonest")


@pytest.mark.parametrize("trick", [t for t in dishonest.TRICKS if t.quick], ids=lambda t: t.name)
def test_a_dishonest_pass_is_refused_before_the_work(bench, trick):
    assert dishonest.refused(bench, trick) is None


@pytest.mark.slow
def test_twenty_of_twenty_dishonest_passes_are_refused_and_the_honest_one_passes(bench):
    assert len(dishonest.TRICKS) == 20
    assert dishonest.passes(bench) is None
    assert [wrong for trick in dishonest.TRICKS if (wrong := dishonest.refused(bench, trick))] == []


def test_mutations_damage(field):
    import random

    sound = json.dumps({"a": [1, 2, {"b": "c"}]}).encode()
    assert len({fuzz.mutate(sound, random.Random(n)) for n in range(100)}) > 80
