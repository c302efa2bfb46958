"""What must not matter does not: how the work is cut up, the order of files, the number of parts."""

from __future__ import annotations

import contextlib
import hashlib
import json

import numpy as np
import pytest
import torch
from curvature_cases import make_model, make_tokens, relative
from run_curvature import cli, estimate

from liborth_cli.checkpoint import pace
from liborth_cli.curvature.state import Keeper
from liborth_cli.errors import OutOfResources, PairMismatch, Stopped

ROUNDING = 2e-6


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("invariance")
    models = {family: make_model(family, folder / family) for family in ("llama", "mixtral")}
    return models, [make_tokens(folder, seed=s, name=f"part{s}") for s in (0, 1)], folder


def tensors(factors):
    """Return every stored tensor of a set."""
    return {key: factors.read(key) for file in factors.files for key in factors.keys(file)}


def agree(one, two, tolerance=ROUNDING):
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    for key in a:
        assert relative(a[key], b[key]) <= tolerance, key
    for name in one.names:
        assert one.layer(name).tokens == two.layer(name).tokens


def digest(folder):
    """Hash everything in a directory."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize(
    "cut",
    [
        {"weights": "stream"},
        {"weights": "stream", "group_tokens": 20},
        {"group_tokens": 33},
        {"weights": "stream", "scratch": True},
    ],
    ids=["streamed", "streamed-small-groups", "resident-groups", "scratch"],
)
def test_grouping_streaming_and_scratch_change_only_rounding(family, cut, shelf, tmp_path):
    models, data, _ = shelf
    cut = {**cut, **({"scratch": tmp_path} if "scratch" in cut else {})}
    with (
        estimate(models[family], data, tmp_path / "whole", weights="resident", moments="marginal", diagonal=True) as whole,
        estimate(models[family], data, tmp_path / "cut", moments="marginal", diagonal=True, **cut) as other,
    ):
        agree(whole, other)
    assert not [file for file in tmp_path.iterdir() if "scratch" in file.name]


def test_a_small_memory_budget_means_groups_and_the_same_factors(shelf, tmp_path, monkeypatch):
    models, data, _ = shelf
    monkeypatch.setattr("liborth_cli.curvature.plan.process_bytes", lambda: 0)
    with estimate(models["llama"], data, tmp_path / "much", memory=1 << 30) as much:
        assert much.manifest.machine.resident
        with estimate(models["llama"], data, tmp_path / "little", memory=700_000) as little:
            assert not little.manifest.machine.resident
            agree(much, little)


def test_groups_for_exact_moments_change_only_rounding(shelf, tmp_path):
    models, data, _ = shelf
    with (
        estimate(models["llama"], data, tmp_path / "whole", moments="exact") as whole,
        estimate(models["llama"], data, tmp_path / "cut", moments="exact", weights="stream", group_tokens=40) as cut,
    ):
        for name in whole.names[1:-1]:
            # Eigenvectors of close eigenvalues may turn; what they diagonalise does not, and neither does the trace.
            one, two = whole.layer(name), cut.layer(name)
            assert one.second_moments is not None and two.second_moments is not None
            assert relative(one.second_moments.sum(), two.second_moments.sum()) < 1e-5
            assert relative(one.gradient_covariance, two.gradient_covariance) < ROUNDING


def test_the_order_of_files_does_not_matter(shelf, tmp_path):
    models, data, _ = shelf
    with estimate(models["llama"], data, tmp_path / "a") as one, estimate(models["llama"], data[::-1], tmp_path / "b") as two:
        agree(one, two)
        assert one.data == two.data


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_merged_halves_equal_the_whole(family, shelf, tmp_path, monkeypatch, capsys):
    models, data, _ = shelf
    with estimate(models[family], data, tmp_path / "whole", moments="marginal", diagonal=True) as whole:
        for number, part in enumerate(data):
            estimate(models[family], part, tmp_path / f"half{number}", moments="marginal", diagonal=True).close()
        got = cli(monkeypatch, capsys, "curvature", "--merge", tmp_path / "half0", tmp_path / "half1", "-o", tmp_path / "sum")
        assert got.code == 0, got.err
        from liborth_cli.curvature.factor_set import FactorSet

        with FactorSet.open(tmp_path / "sum") as merged:
            agree(whole, merged)
            assert merged.manifest.totals.loss == pytest.approx(whole.manifest.totals.loss, rel=1e-6)
            assert sorted(merged.data) != whole.data and len(merged.data) == 2


def test_a_weight_of_two_is_the_file_twice(shelf, tmp_path):
    models, data, folder = shelf
    twice = folder / "twice.npy"
    np.save(twice, np.concatenate([np.load(data[0]), np.load(data[0])]))
    with (
        estimate(models["llama"], [twice, data[1]], tmp_path / "a", moments="marginal") as one,
        estimate(models["llama"], [f"{data[0]}=2", data[1]], tmp_path / "b", moments="marginal") as two,
    ):
        agree(one, two)


def test_padding_changes_nothing(shelf, tmp_path):
    models, data, folder = shelf
    rows = np.load(data[0])
    wide = np.full((len(rows), 30), -1)
    wide[:, : rows.shape[1]] = rows
    np.save(folder / "wide.npy", wide)
    with (
        estimate(models["mixtral"], data[0], tmp_path / "a") as one,
        estimate(models["mixtral"], folder / "wide.npy", tmp_path / "b") as two,
    ):
        assert all(torch.equal(a, tensors(two)[key]) for key, a in tensors(one).items())


def test_the_same_seed_gives_the_same_bits_and_another_does_not(shelf, tmp_path):
    models, data, _ = shelf
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        estimate(models["llama"], data, tmp_path / name, seed=seed, eigen=True).close()
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert (
        digest(tmp_path / "a")["factors.block-00000.safetensors"] != digest(tmp_path / "c")["factors.block-00000.safetensors"]
    )


@pytest.mark.parametrize("moments", ["marginal", "exact"])
@pytest.mark.parametrize("weights", ["stream", "resident"])
def test_a_stopped_run_goes_on_with_the_next_group(weights, moments, shelf, tmp_path, monkeypatch):
    from liborth_cli.curvature import passes as module

    models, data, _ = shelf
    asked = {"weights": weights, "moments": moments, "group_tokens": 40}
    estimate(models["llama"], data, tmp_path / "whole", **asked).close()
    walk, seen = module._Walk.run, []

    def stopping(*args):
        seen.append(1)
        if len(seen) == 3:
            raise Stopped(15)
        return walk(*args)

    monkeypatch.setattr(module._Walk, "run", stopping)
    with pytest.raises(Stopped):
        estimate(models["llama"], data, tmp_path / "again", **asked)
    assert not (tmp_path / "again").exists()
    assert len((tmp_path / "again.liborth-partial" / "journal.jsonl").read_text().splitlines()) == 3
    seen[:] = [1] * 3
    estimate(models["llama"], data, tmp_path / "again", resume=True, **asked).close()
    passes = 2 if moments == "exact" else 1
    groups = json.loads((tmp_path / "again" / "liborth.manifest.json").read_text())["data"][0]["tokens"] // 40 + 2
    assert len(seen) - 3 <= passes * groups - 2
    assert digest(tmp_path / "whole") == digest(tmp_path / "again")


WALKS = {
    "streamed": {"weights": "stream"},
    "scratch, in groups": {"weights": "stream", "group_tokens": 60, "scratch": True},
    "tokens": {"weights": "stream", "per_token": True, "fisher": "empirical", "group_tokens": 60},
    "exact moments": {"weights": "stream", "moments": "exact"},
    "resident": {"weights": "resident", "moments": "marginal", "diagonal": True},
    "resident tokens": {"weights": "resident", "per_token": True},
    "exact Fisher": {"fisher": "exact"},
}


QUICK = ("scratch, in groups", "exact moments", "resident tokens")


@pytest.mark.parametrize("walk", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in WALKS])
def test_a_kill_within_a_walk_loses_what_came_after_the_last_state(walk, shelf, tmp_path, monkeypatch):
    """The state is kept at every chance there is, and each of them is the last one once; the bytes are those of one run."""
    models, data, _ = shelf
    asked = {key: tmp_path if key == "scratch" else value for key, value in WALKS[walk].items()}
    monkeypatch.setattr("liborth_cli.stream.sizes.batch_tokens", lambda *_: 16)
    estimate(models["llama"], data, tmp_path / "whole", **asked).close()
    monkeypatch.setattr(pace, "SECONDS", 0.0)
    monkeypatch.setattr(pace, "SHARE", 0.0)
    note, kept = Keeper._note, []

    def stopping(self, state, files):
        note(self, state, files)
        kept.append((state.group, state.done, state.back))
        raise Stopped(15)

    monkeypatch.setattr(Keeper, "_note", stopping)
    while not (tmp_path / "again").exists():
        with contextlib.suppress(Stopped):
            estimate(models["llama"], data, tmp_path / "again", resume=True, **asked).close()
            break
        files = tmp_path / "again.liborth-partial" / "files"
        assert {path.stat().st_mode & 0o777 for path in files.iterdir()} == {0o600}
    assert len(kept) == len(set(kept)) > 2, "every state was gone on from"
    assert digest(tmp_path / "whole") == digest(tmp_path / "again")
    assert not list(tmp_path.glob("*partial"))


def test_no_room_for_a_state_is_said_once_and_stops_nothing(shelf, tmp_path, monkeypatch, capsys):
    models, data, _ = shelf
    monkeypatch.setattr(pace, "SECONDS", 0.0)

    def full(*_):
        raise OutOfResources("full")

    monkeypatch.setattr(pace, "check_space", full)
    words = ("curvature", models["llama"], "--data", data[0], "--weights", "stream", "-o", tmp_path / "out")
    got = cli(monkeypatch, capsys, *words)
    assert got.code == 0 and got.err.count("no room on the disk to keep the state") == 1


def test_sets_of_other_models_points_or_data_do_not_merge(shelf, tmp_path, monkeypatch, capsys):
    models, data, folder = shelf
    other = make_model("llama", folder / "other", seed=5)
    estimate(models["llama"], data[0], tmp_path / "a").close()
    estimate(other, data[1], tmp_path / "b").close()
    estimate(models["llama"], data[1], tmp_path / "c", fisher="empirical").close()
    for wrong, said in (("b", "another model"), ("c", "fisher"), ("a2", "same data")):
        if wrong == "a2":
            estimate(models["llama"], data[0], tmp_path / "a2", seed=1).close()
        got = cli(monkeypatch, capsys, "curvature", "--merge", tmp_path / "a", tmp_path / wrong, "-o", tmp_path / "out")
        assert (got.code, got.err.count("\n")) == (4, 1) and said in got.err, got.err
        assert not list(tmp_path.glob("out*"))


def test_a_factor_set_knows_its_model(shelf, tmp_path):
    from liborth_cli.checkpoint.reader import Checkpoint

    models, data, folder = shelf
    with estimate(models["llama"], data[0], tmp_path / "a") as factors:
        with Checkpoint.open(models["llama"]) as own:
            factors.check_belongs(own, {n: f.sha256 for n, f in factors.manifest.inputs["model"].files.items()})
            with pytest.raises(PairMismatch, match="another version"):
                factors.check_belongs(own, {"model.safetensors": "0" * 64})
        narrow = make_model("llama", folder / "narrow", intermediate_size=40)
        with Checkpoint.open(narrow) as other, pytest.raises(PairMismatch, match="another model"):
            factors.check_belongs(other)
