"""Every factor against hooks on the whole model, on every family."""

from __future__ import annotations

import pytest
import torch
from curvature_cases import FAMILIES, Oracle, make_model, make_tokens, oracle_name, read_tokens, relative
from run_curvature import estimate

from liborth_cli.stream.labels import row_seed, sample, uniforms

CLOSE = 1e-5


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Keep models and their oracles (real labels) for the whole module."""
    folder, made = tmp_path_factory.mktemp("oracle"), {}

    def get(family):
        if family not in made:
            model = make_model(family, folder / family)
            data = make_tokens(folder, name=f"{family}-data")
            oracle = Oracle(model)
            oracle.run(read_tokens(data))
            made[family] = (model, data, oracle)
        return made[family]

    return get


def pair(oracle, name):
    """Return a and g of every token for one layer of a factor set."""
    known, place = oracle_name(name)
    a, g = oracle.matrix(known)
    return a, g if place is None else g[:, place]


@pytest.mark.parametrize("weights", ["stream", "resident"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_factors_are_those_of_the_whole_model(family, weights, shelf, tmp_path):
    model, data, oracle = shelf(family)
    with estimate(model, data, tmp_path / "out", fisher="empirical", weights=weights) as factors:
        assert factors.manifest.machine.resident == (weights == "resident")
        tokens = sum(len(row) - 1 for row in read_tokens(data))
        assert factors.tokens == tokens
        assert factors.manifest.totals.loss == pytest.approx(oracle.loss / tokens, rel=1e-5)
        linear = 0
        for name in factors.names:
            layer = factors.layer(name)
            if name == oracle.table:
                ids, g = torch.cat(oracle.inputs[name]), torch.cat(oracle.gradients[name])
                assert relative(layer.input_covariance, torch.bincount(ids, minlength=67) / tokens) < 1e-7
                assert relative(layer.gradient_covariance, g.T @ g / tokens) < CLOSE
                continue
            a, g = pair(oracle, name)
            assert layer.tokens == len(a)
            assert relative(layer.input_covariance, a.T @ a / len(a)) < CLOSE, name
            wanted = (g**2).mean(0) if layer.gradient_covariance.dim() == 1 else g.T @ g / len(g)
            assert relative(layer.gradient_covariance, wanted) < CLOSE, name
            linear += 1
        expected = sum(1 for name in oracle.inputs if name != oracle.table)
        fused = sum(1 for name in oracle.inputs if "gate_up_proj[" in name)
        assert linear == expected + fused


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("weights", ["stream", "resident"])
def test_moments_are_those_of_the_whole_model(family, weights, shelf, tmp_path):
    model, data, oracle = shelf(family)
    with (
        estimate(
            model, data, tmp_path / "m", fisher="empirical", weights=weights, moments="marginal", diagonal=True
        ) as marginal,
        estimate(model, data, tmp_path / "e", fisher="empirical", weights=weights, moments="exact") as exact,
    ):
        for name in marginal.names:
            layer = marginal.layer(name)
            if marginal.layers[name].kind != "linear":
                assert layer.input_moment is None
                continue
            a, g = pair(oracle, name)
            n = len(a)
            assert relative(layer.input_moment, (a * g.norm(dim=1)[:, None] ** 2).T @ a / n) < CLOSE, name
            assert relative(layer.gradient_moment, (g * a.norm(dim=1)[:, None] ** 2).T @ g / n) < CLOSE, name
            assert relative(marginal.diagonal(name).values, (g**2).T @ a**2 / n) < CLOSE, name
            whole = exact.layer(name)
            basis = whole.basis
            wanted = ((g @ basis.gradient_vectors) ** 2).T @ (a @ basis.input_vectors) ** 2 / n
            assert relative(whole.second_moments, wanted) < CLOSE, name
            # The marginal curvature has the exact row and column sums, in any basis.
            product = layer.curvature("marginal")
            full = ((g @ layer.basis.gradient_vectors) ** 2).T @ (a @ layer.basis.input_vectors) ** 2 / n
            assert relative(product.sum(0), full.sum(0)) < CLOSE, name
            assert relative(product.sum(1), full.sum(1)) < CLOSE, name


def test_sampled_labels_come_from_the_model_and_from_the_seed(shelf, tmp_path):
    model, data, _ = shelf("llama")
    rows, oracle = read_tokens(data), Oracle(model)
    with torch.no_grad():
        chances = [oracle.model(row[None, :-1]).logits[0].float().softmax(-1) for row in rows]
    oracle.inputs.clear()
    labels = [sample(p, uniforms(row_seed(7, row.numpy().tobytes()), len(p))) for p, row in zip(chances, rows, strict=True)]
    oracle.run(rows, labels)
    with estimate(model, data, tmp_path / "out", fisher="sampled", seed=7) as factors:
        for name in factors.names[1:-1]:
            _, g = pair(oracle, name)
            assert relative(factors.layer(name).gradient_covariance, g.T @ g / len(g)) < CLOSE, name


def test_q_k_v_and_gate_up_share_one_input_covariance(shelf, tmp_path):
    model, data, _ = shelf("llama")
    with estimate(model, data, tmp_path / "out", fisher="empirical") as factors:
        stored = [key for file in factors.files for key in factors.keys(file) if key.startswith("input_covariance/")]
        assert len(stored) == 3 * 4 + 2  # a block has four different inputs; the embedding and the head
        prefix = "model.layers.1.self_attn"
        assert factors.layer(f"{prefix}.v_proj.weight").shares_input_with == tuple(f"{prefix}.{p}_proj.weight" for p in "qkv")


def test_completion_masks_count_as_the_definition_says(tmp_path):
    """Positions before the mask carry no loss of their own but do receive gradients; what follows the last loss is dropped."""
    import numpy as np

    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.curvature.collect import FactorCollector
    from liborth_cli.curvature.selection import choose
    from liborth_cli.stream.batches import batches
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.relay import Relay, Turns
    from liborth_cli.stream.store import MemoryStore
    from liborth_cli.stream.texts import Row
    from liborth_cli.stream.walk import walk_streamed
    from liborth_cli.stream.weights import Point

    folder = make_model("llama", tmp_path / "model")
    ids = torch.randint(0, 67, (12,))
    keep = torch.zeros(11, dtype=torch.bool)
    keep[6:] = True
    oracle = Oracle(folder)
    oracle.run([ids], keep=[keep])
    with Checkpoint.open(folder) as checkpoint:
        model = BlockModel(Point(checkpoint), torch.float32, torch.device("cpu"))
        chosen, _ = choose(model, (), False, False)
        collector, sums = FactorCollector(chosen, torch.device("cpu")), {}
        some = batches([Row(ids.numpy(), np.asarray(keep), 1.0, "row")], 64, None, torch.device("cpu"))
        losses = walk_streamed(
            model,
            some,
            collector,
            Relay(MemoryStore(), Turns(len(model.blocks))),
            lambda stage: sums.update(collector.take(stage)),
        )
        model.close()
    assert losses.tokens == 5 and losses.total == pytest.approx(oracle.loss, rel=1e-5)
    name = "model.layers.1.mlp.down_proj.weight"
    a, g = oracle.matrix(name)
    assert collector.tokens[name] == 11
    assert relative(sums["gradient_covariance/" + name].triu(), (g.T @ g).triu()) < CLOSE
    assert relative(sums["input_covariance/" + name].triu(), (a.T @ a).triu()) < CLOSE
