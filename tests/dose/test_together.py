"""Factors that are measured while the split divides by them, and never stored, give what stored ones give."""

import json

import pytest
import torch
from tiny import values, weight_files

from liborth_cli import machine
from liborth_cli.checkpoint.transaction import Transaction
from liborth_cli.curvature import factors
from liborth_cli.curvature.collect import FactorCollector
from liborth_cli.demo import DATA
from liborth_cli.dose import find, measure, passes, sweep
from liborth_cli.stream import store

DATA_WORDS = ("--retain-data", DATA / "retain.jsonl", "--forget-data", DATA / "secrets.jsonl")
FEW = ("--retain-tokens", 500, "--probe-tokens", 500, "-j", 1)


@pytest.fixture
def split(cli):
    def run(*words, check=True):
        code, out, err = cli("split", DATA / "base", DATA / "finetuned", *DATA_WORDS, *FEW, *words)
        assert not check or code == 0, err
        return code, out, err

    return run


METHODS = {
    "tokenwise": ("--method", "tokenwise"),
    "contrastive": ("--method", "contrastive"),
    "kfac": ("--method", "kfac", "--mass", 0.9),
    "ekfac, biases": ("--method", "ekfac", "--mass", 0.9, "--vectors", "split"),
}


@pytest.mark.parametrize("method", METHODS)
def test_nothing_stored_and_the_same_bytes(method, split, tmp_path, monkeypatch):
    words = [*METHODS[method], "--out-shard-size", "150KB"]
    if method.startswith(("kfac", "ekfac")):
        monkeypatch.setitem(globals(), "DATA_WORDS", DATA_WORDS[:2])
    _, _, said = split(*words, "--keep-factors", "-o", tmp_path / "stored")
    assert "private, in" in said
    monkeypatch.setattr(factors, "write", lambda *_: pytest.fail("a factor was stored"))
    _, _, said = split(*words, "-o", tmp_path / "walked")
    assert "not stored" in said
    assert len(weight_files(tmp_path / "walked")) > 3
    assert weight_files(tmp_path / "walked") == weight_files(tmp_path / "stored")
    memories = [tmp_path / f"{name}.private" for name in ("walked", "stored")]
    assert not (memories[0] / "factors").exists()
    ours, theirs = (weight_files(memory) for memory in memories)
    assert ours == {name: data for name, data in theirs.items() if not name.startswith("factors")}
    kept, told = (json.loads((tmp_path / name / "liborth.manifest.json").read_text()) for name in ("stored", "walked"))
    assert told["tensors"] == kept["tensors"]
    assert told["totals"] == kept["totals"]
    used = [told["factors"]["retain"], *told["factors"]["forget"]]
    assert all(one["stored"] is False for one in used)
    assert [{**one, "stored": True} for one in used] == [
        {"stored": True, **one} for one in (kept["factors"]["retain"], *kept["factors"]["forget"])
    ]


def test_a_stopped_walk_goes_on_where_it_was(split, tmp_path, monkeypatch):
    words = ("--method", "contrastive", "--out-shard-size", "150KB")
    split(*words, "-o", tmp_path / "whole")
    finish, done = Transaction.finish, []

    def stop(self, unit):
        finish(self, unit)
        done.append(unit.unit)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Transaction, "finish", stop)
    code, _, _ = split(*words, "-o", tmp_path / "out", check=False)
    assert code != 0
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Transaction, "finish", finish)
    again, measured, take = [], [], FactorCollector.take

    def look(self, stage):
        found = take(self, stage)
        measured.append((stage, bool(found)))
        return found

    monkeypatch.setattr(FactorCollector, "take", look)
    monkeypatch.setattr(Transaction, "finish", lambda self, unit: (again.append(unit.unit), finish(self, unit)))
    split(*words, "-o", tmp_path / "out", "--resume")
    assert not set(again) & set(done), "what was finished is not made again"
    assert all(found for _, found in measured)
    assert "4" not in dict(measured), "nor are its factors measured again"
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")
    assert weight_files(tmp_path / "out.private") == weight_files(tmp_path / "whole.private")


def test_no_model_is_whole_in_memory_while_a_split_walks(split, tmp_path, monkeypatch):
    begin, loaded = passes.Passes.together, []

    def look(self, jobs, stack):
        walk = begin(self, jobs, stack)
        models = [self.model, *(one.job.model for one in walk.passes)]
        loaded.append([name for one in models for name, weight in one.model.named_parameters() if not weight.is_meta])
        return walk

    monkeypatch.setattr(passes.Passes, "together", look)
    split("--method", "contrastive", "-o", tmp_path / "out")
    assert loaded == [[]]


def test_block_inputs_that_do_not_fit_wait_in_a_private_file(split, tmp_path, monkeypatch):
    """Those of the retain rows first, then those of rows to forget as well: else all their tokens would be stored."""
    words = ("--method", "tokenwise")
    split(*words, "-o", tmp_path / "memory")
    opened, begin, waiting = [], store.FileStore.__init__, {"retain": 1 << 60, "forget": 1 << 60}

    def look(self, folder, sizes, levels):
        opened.append(folder)
        assert folder.stat().st_mode & 0o077 == 0
        begin(self, folder, sizes, levels)

    monkeypatch.setattr(store.FileStore, "__init__", look)
    monkeypatch.setattr(passes, "held_bytes", lambda one: 0 if one.scratch is not None else waiting[one.kind])
    _, _, said = split(*words, "-o", tmp_path / "file")
    assert "not stored" in said
    assert len(opened) == 4, "the retain pass, and three points of the path"
    assert weight_files(tmp_path / "file") == weight_files(tmp_path / "memory")
    waiting["forget"] = 0
    split(*words, "-o", tmp_path / "one")
    assert len(opened) == 5, "the retain pass alone"


def test_too_little_memory_stores_them(split, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "held_bytes", lambda _: 1 << 60)
    _, _, said = split("-o", tmp_path / "out")
    assert "do not fit into memory side by side" in said
    assert not (tmp_path / "out.private" / "factors").exists()


@pytest.mark.parametrize("method", ["contrastive", pytest.param("tokenwise", marks=pytest.mark.slow)])
def test_a_search_stores_nothing_and_finds_the_same(method, split, tmp_path, monkeypatch):
    """Whether all factors stay in memory or only what doses need of them: then they are measured twice."""
    monkeypatch.setitem(sweep.GRID, "strength", (1.0,))
    monkeypatch.setattr(sweep, "STEPS", 0)
    monkeypatch.setattr(measure, "ATTACK_STEPS", 1)
    words = ("--method", method, "--target", "forget>=1,retention>=0.5")
    split(*words, "--keep-factors", "-o", tmp_path / "stored")
    monkeypatch.setattr(factors, "write", lambda *_: pytest.fail("a factor was stored"))
    split(*words, "-o", tmp_path / "whole")
    monkeypatch.setattr(find, "whole_bytes", lambda _: 1 << 60)
    split(*words, "-o", tmp_path / "thin")
    dose = {
        name: json.loads((tmp_path / name / "liborth.manifest.json").read_text())["dose"]
        for name in ("stored", "whole", "thin")
    }
    for name in ("whole", "thin"):
        assert weight_files(tmp_path / name) == weight_files(tmp_path / "stored")
        assert not (tmp_path / f"{name}.private" / "factors").exists()
        assert dose[name]["frontier"] == dose["stored"]["frontier"]


def test_a_search_without_room_stores_the_factors(split, tmp_path, monkeypatch):
    monkeypatch.setitem(sweep.GRID, "strength", (0.1,))
    monkeypatch.setattr(find, "half_the_room", lambda: 1000)
    _, out, said = split("--method", "contrastive", "--probe", "--json", "-o", tmp_path / "out")
    assert "are free: the factors are stored" in said
    assert [one["amount"] for one in json.loads(out)["dose"]["frontier"]][:1] == ["strength 0.1"]


@pytest.mark.parametrize("stored", [(), ("--keep-factors",)], ids=["walked", "stored"])
@pytest.mark.parametrize("method", ["tokenwise", "contrastive"])
def test_passes_in_bfloat16_change_less_than_a_seed_does(method, stored, split, tmp_path, monkeypatch):
    """Products with weights are narrower, everything after them is not; it is told what they were, and where they are slow."""
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda _: False)
    taken = {}
    for name, words in {"float32": (), "bfloat16": ("--dtype", "bfloat16"), "seed": ("--seed", 1)}.items():
        out = tmp_path / name
        _, _, said = split("--method", method, *words, *stored, "-o", out)
        assert ("float32 is several times faster" in said) == (name == "bfloat16")
        told = json.loads((out / "liborth.manifest.json").read_text())
        assert told["texts"]["dtype"] == ("float32" if name == "seed" else name)
        general, finetuned = values(out), values(DATA / "finetuned")
        taken[name] = torch.cat([(finetuned[one] - general[one]).flatten() for one in sorted(general)])
    bfloat16, seed = (float((taken[name] - taken["float32"]).norm()) for name in ("bfloat16", "seed"))
    assert 0 < bfloat16 < seed
