"""Curved ways between models: the Bézier bend where a barrier is known to be, and its formula."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import few
from transformers import AutoTokenizer

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.demo import DATA
from liborth_cli.measure.scores import Evaluator, mean_loss
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point, between
from liborth_cli.verify import curves
from liborth_cli.verify.curves import Bezier, on_curve, train_bend


def permuted(weights):
    """The same function in other weights: neurons of every MLP change places, and half way between the two lies a barrier."""
    generator, found = torch.Generator().manual_seed(0), dict(weights)
    for block in range(5):
        names = [f"model.layers.{block}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
        order = torch.randperm(weights[names[0]].shape[0], generator=generator)
        found |= {names[0]: weights[names[0]][order].contiguous(), names[1]: weights[names[1]][order].contiguous()}
        found[names[2]] = weights[names[2]][:, order].contiguous()
    return found


def beginnings(name, count):
    """The first 33 tokens of some texts of the demo."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "base")
    told = [json.loads(line)["text"] for line in (DATA / name).read_text().splitlines()[:count]]
    return [Row(np.array(tokenizer(text).input_ids[:33]), np.ones(32, bool), 1.0, "row") for text in told]


def test_a_bend_goes_round_a_barrier_that_is_known(tmp_path):
    shutil.copytree(DATA / "base", tmp_path / "other")
    weights = permuted(load_file(DATA / "base" / "model.safetensors"))
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    rows = beginnings("retain.jsonl", 4)
    with Checkpoint.open(DATA / "base") as base, Checkpoint.open(tmp_path / "other") as other:
        ends = Point(base), Point(other)
        model = BlockModel(ends[0], torch.float32, torch.device("cpu"))
        untrained, bend = (train_bend(model, ends, (rows, rows), steps, 0) for steps in (0, 40))

        def loss(weights):
            return mean_loss(Evaluator(model, rows, True).score(weights))

        low, *high = (loss(Bezier(ends[0], some, ends[1], 0.5)) for some in (bend, untrained))
        straight, chord = loss(between(*ends, 0.5)), loss(ends[0])
        model.close()
    assert high[0] == pytest.approx(straight, rel=1e-4), "the bend begins on the straight line"
    assert straight - chord > 0.5, "two permutations of one model are far apart on the straight line"
    assert low - chord < 0.5 * (straight - chord)


def test_a_bend_that_learns_its_rows_by_heart_is_not_kept(monkeypatch):
    monkeypatch.setattr(curves, "RATE", 0.02)
    rows = beginnings("held_out.jsonl", 8)
    with Checkpoint.open(DATA / "base") as base, Checkpoint.open(DATA / "finetuned") as tuned:
        ends = Point(base), Point(tuned)
        model = BlockModel(ends[0], torch.float32, torch.device("cpu"))
        learnt, kept = (train_bend(model, ends, (rows[:1], judge), 20, 0) for judge in (rows[:1], rows[1:]))
        judge = Evaluator(model, rows[1:], True)
        by_heart, best, straight = (
            mean_loss(judge.score(way))
            for way in (*(Bezier(ends[0], b, ends[1], 0.5) for b in (learnt, kept)), between(*ends, 0.5))
        )
        model.close()
    assert by_heart > straight + 0.1, "one row, learnt by heart, makes the others worse"
    assert best <= straight + 0.01


@pytest.fixture(scope="module")
def general(once, tmp_path_factory):
    out = tmp_path_factory.mktemp("curves") / "general"
    once("split", DATA / "base", DATA / "finetuned", "--method", "scale", "--scale", 0.5, "-o", out, "-q")
    return out


def test_the_check_measures_all_three_ways(cli, general, tmp_path):
    words = ("--retain-data", few(tmp_path, 4, 60), "--curve-steps", 2, "--no-require", "--json", "-q")
    code, out, err = cli("verify", general, "--lmc", "--curved", *words)
    assert code == 0, err
    found = next(result for result in json.loads(out)["results"] if result["check"] == "lmc")
    assert {"barrier_straight", "barrier_bezier", "barrier_geodesic"} < set(found["metrics"])
    assert [len(figure["series"]) for figure in found["figures"] if figure["kind"] == "plot"] == [1, 3]


def test_without_curved_nothing_changes(cli, general, tmp_path):
    words = ("--retain-data", few(tmp_path, 3), "--no-require", "--json", "-q")
    code, out, err = cli("verify", general, "--lmc", *words)
    assert code == 0, err
    found = next(result for result in json.loads(out)["results"] if result["check"] == "lmc")
    assert set(found["metrics"]) == {"barrier", "barrier_finetuned"}
    code, _, err = cli("verify", general, "--lmc", "--curved", *words)
    assert code == 2 and "--lmc needs 4 different retain rows for --curved" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_the_point_of_a_curve_is_its_formula(t):
    with Checkpoint.open(DATA / "base") as base, Checkpoint.open(DATA / "finetuned") as tuned:
        name = "model.layers.1.mlp.up_proj.weight"
        info, bend = base.tensors[name], torch.randn(base.tensors[name].shape)
        out = torch.empty(bend.numel())
        Bezier(Point(base), {name: bend}, Point(tuned), t).read_into(out, info)
        first, last = base.load(name).float(), tuned.load(name).float()
        torch.testing.assert_close(out.view(bend.shape), (1 - t) ** 2 * first + 2 * t * (1 - t) * bend + t**2 * last)
        torch.testing.assert_close(on_curve(first, bend, last, t), out.view(bend.shape))
        other = base.tensors["model.layers.1.mlp.gate_proj.weight"]
        out = torch.empty(other.shape).view(-1)
        Bezier(Point(base), {name: bend}, Point(tuned), t).read_into(out, other)
        line = torch.lerp(base.load(other.name).float(), tuned.load(other.name).float(), t)
        torch.testing.assert_close(out.view(other.shape), line)
