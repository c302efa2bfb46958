"""Barriers, controls and entanglement on models where the answer is known, or comes from another library."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import subspace_angles
from tiny import llama
from verify_cases import DATA, SECRETS, UNSEEN, place, split, subject

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.linalg.angles import leading_spaces, principal_angles
from liborth_cli.measure.scores import Evaluator, mean_loss
from liborth_cli.measure.unwritten import Unwritten
from liborth_cli.methods import Amount
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Moved, Point, between
from liborth_cli.verify.check import Need, Options
from liborth_cli.verify.checks import controls, entanglement, lmc
from liborth_cli.verify.checks.controls import alternative, measure_edits
from liborth_cli.verify.checks.entanglement import EntanglementOptions, cosine, felt, held_out_factors, read_streams
from liborth_cli.verify.statistics import alone, jackknife
from liborth_cli.verify.subject import States


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = place(tmp_path_factory.mktemp("pair"))
    split(found, "svd16", "svd", Amount("rank", 16))
    return found


@pytest.fixture(scope="module")
def rows():
    draw = np.random.default_rng(0)
    return [Row(draw.integers(0, 64, 20), np.ones(19, bool), 1.0, f"row {i}") for i in range(12)]


def line(a, b, rows, resident=True):
    """The barrier between two checkpoints on disk, and their losses at the points."""
    with Checkpoint.open(a) as one, Checkpoint.open(b) as other:
        evaluator = Evaluator(BlockModel(Point(one), torch.float32, torch.device("cpu")), rows, resident)
        grid = np.linspace(0, 1, 11)
        scores = [evaluator.score(between(Point(one), Point(other), float(t))) for t in grid]
        table = np.stack([[s.loss.sum() for s in found] for found in scores])
        tokens = np.array([float(row.tokens) for row in rows])
        return lmc.barrier((table, tokens, alone(len(tokens))), grid, 0, ""), table.sum(1) / tokens.sum()


def edited(source, out, change):
    """Copy a model with some tensors changed."""
    out.mkdir()
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file({n: change(n, t).contiguous() for n, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def hf_loss(folder, rows, change=None):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters() if change else ():
            parameter.copy_(change(name, parameter))
        losses = [model(torch.from_numpy(r.ids[None, :-1])).logits[0].log_softmax(-1) for r in rows]
    total = sum(-x.gather(-1, torch.from_numpy(r.ids[1:, None])).sum().item() for x, r in zip(losses, rows, strict=True))
    return total / sum(r.tokens for r in rows)


@pytest.mark.parametrize("resident", [True, False])
def test_the_barrier_of_flipped_signs_is_known(tmp_path, rows, resident):
    """Negating v and o is the same function; at t it is attention times (1 − 2t)², so the barrier is that of damping."""
    base = llama(tmp_path / "base", initializer_range=0.3)

    def flip(name, t):
        return -t if "v_proj" in name or "o_proj" in name else t

    found, losses = line(base, edited(base, tmp_path / "flipped", flip), rows, resident)
    expected = []
    for t in np.linspace(0, 1, 11):
        scale = (1 - 2 * t) ** 2
        expected.append(hf_loss(base, rows, lambda n, p, s=scale: p * s if "o_proj" in n else p))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert found.value == pytest.approx(max(expected) - expected[0], rel=1e-3, abs=1e-6)
    assert found.value > 0.001
    assert found.low <= found.value <= found.high


def test_no_barrier_where_the_loss_is_convex(tmp_path, rows):
    """Only the head differs: logits are linear in t, cross-entropy is convex, so the barrier is 0 for any two heads."""
    base = llama(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)

    def other(name, t):
        return t + torch.randn(t.shape, generator=generator) if name == "lm_head.weight" else t

    found, losses = line(base, edited(base, tmp_path / "head", other), rows)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    assert losses.max() - losses.min() > 0.1, "max − min is not 0, and is not the barrier"


def test_points_on_a_line_end_in_the_models_themselves(folder):
    with Checkpoint.open(folder / "base") as old, Checkpoint.open(folder / "finetuned") as new:
        a, b = Point(old), Point(new)
        assert (between(a, b, 0.0), between(a, b, 1.0)) == (a, b)
        name = "model.layers.0.mlp.up_proj.weight"
        info, out = new.tensors[name], torch.empty(math.prod(new.tensors[name].shape))
        w_r, w_f = (load_file(DATA / side / "model.safetensors")[name].double().flatten() for side in ("base", "finetuned"))
        between(a, b, 0.25).read_into(out, info)
        torch.testing.assert_close(out.double(), 0.75 * w_r + 0.25 * w_f, rtol=1e-6, atol=1e-7)
        Moved(a, 2.0, b, b).read_into(out, info)
        assert torch.equal(out, w_r.float()), "where two models agree, nothing moves"


def test_general_and_memory_stand_for_the_fine_tuned_files(folder, tmp_path):
    """With the fine-tuned checkpoint gone, every score is the same to the bit."""
    import shutil

    options = {"canary": str(SECRETS), "fresh": str(UNSEEN)}
    with subject(folder / "svd16", **options) as here:
        assert here.finetuned is not None and here.finetuned.path == folder / "finetuned"
        there = [score.loss for score in here.score("canaries", "finetuned")]
    shutil.copytree(folder / "svd16.private", tmp_path / "svd16.private")
    alone = shutil.copytree(folder / "svd16", tmp_path / "svd16")
    with subject(alone, **options) as lonely:
        assert "not beside the model" in lonely.why(Need.REFERENCE)
        for mine, theirs in zip(lonely.score("canaries", "finetuned"), there, strict=True):
            assert (mine.loss == theirs).all()


def test_controls_edit_the_same_tensors_by_the_same_energy(folder, monkeypatch):
    scored, real = [], States.score_at

    def score_at(self, rows, weights):
        if isinstance(weights, Unwritten):
            options = weights._divider.options
            scored.append((rows, options.method, options.amount.value))
        return real(self, rows, weights)

    monkeypatch.setattr(States, "score_at", score_at)
    with subject(folder / "svd16", retain=(str(folder / "few.jsonl"),)) as found:
        edits = measure_edits(found)
        bare = replace(found, manifest=None)
        for name, edit in measure_edits(bare).items():
            assert edits[name].memory == pytest.approx(edit.memory, rel=2e-2), "the manifest tells what the weights hold"
    with subject(folder / "svd16", retain=(str(folder / "few.jsonl"),), canary=str(SECRETS)) as found:
        result = controls.run(found, Options())
        assert len(set(scored)) == len(scored) > 8, "no control is scored twice at one amount"
        assert all(amount < 1 for *_, amount in scored), "all of the update is the fine-tuned model"
        assert len([rows for rows, *_ in scored if rows == "retain"]) <= 16, "26 by bisection"
        w_f = load_file(folder / "finetuned" / "model.safetensors")
        for name, edit in edits.items():
            info = found.finetuned.tensors[name]
            out = torch.empty(math.prod(info.shape))
            found.states.weights["random"].read_into(out, info)
            dropped = (w_f[name].double().flatten() - out.double()).square().sum().item()
            assert dropped == pytest.approx(edit.memory, rel=0.05)
        untouched = next(n for n in found.general.tensors if n not in edits)
        out = torch.empty(math.prod(found.general.tensors[untouched].shape))
        found.states.weights["scale"].read_into(out, found.general.tensors[untouched])
        assert torch.equal(out, w_f[untouched].float().flatten())
        levels = {c["state"]: c for c in result.facts.controls}
        gain = levels["reference"]["retain_loss"] - levels["finetuned"]["retain_loss"]
        for name, near in (("scale", 0.02), ("svd", 0.05)):  # ranks are whole numbers: svd cannot match exactly
            assert abs(levels[name]["retain_loss"] - levels["general"]["retain_loss"]) < near * gain
        expected = (levels["reference"]["retain_loss"] - levels["general"]["retain_loss"]) / gain
        assert result.metrics["retention"].value == pytest.approx(expected)
        oracle = [hf_loss(folder / name, found.rows("retain")) for name in ("base", "svd16", "finetuned")]
        assert expected == pytest.approx((oracle[0] - oracle[1]) / (oracle[0] - oracle[2]), rel=1e-3)
        assert not (folder / "scale").exists()


def test_a_scale_control_is_the_point_on_the_line(folder):
    with subject(folder / "svd16", canary=str(SECRETS)) as found:
        edits = measure_edits(found)
        split_half = alternative(found, edits, "scale", Amount("scale", 0.5))
        name = next(iter(edits))
        info, out = found.finetuned.tensors[name], torch.empty(math.prod(found.finetuned.tensors[name].shape))
        split_half.read_into(out, info)
        w_r, w_f = (load_file(folder / side / "model.safetensors")[name].float() for side in ("base", "finetuned"))
        assert torch.equal(out.view_as(w_r), ((w_r + w_f) / 2).bfloat16().float())


@pytest.mark.parametrize("shape", [(9, 3, 3), (12, 5, 2), (6, 6, 4)])
def test_principal_angles_are_scipys(shape):
    d, k, other = shape
    generator = torch.Generator().manual_seed(d)
    q = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]
    tilt = torch.linalg.qr(q[:, : min(k, other)] + 1e-9 * torch.randn(d, min(k, other), generator=generator).double())[0]
    p = torch.linalg.qr(torch.randn(d, other, generator=generator, dtype=torch.float64))[0]
    for second in (p, q, tilt):
        expected = np.sort(subspace_angles(q.numpy(), second.numpy()))
        np.testing.assert_allclose(np.sort(principal_angles(q, second).numpy()), expected, atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("shape", [(20, 14), (14, 20)])
def test_leading_spaces_are_those_of_the_svd(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, right, share = leading_spaces(matrix, 4)
    u, s, v = torch.linalg.svd(matrix)
    for mine, theirs in ((left, u[:, :4]), (right, v[:4].T)):
        assert np.max(subspace_angles(mine.numpy(), theirs.numpy())) < 1e-6
    assert share == pytest.approx((s[:4].square().sum() / s.square().sum()).item())


@pytest.mark.parametrize("kind", ["full", "diagonal", "heads"])
def test_inner_products_are_those_of_the_whole_kronecker_matrix(kind):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, y, a = draw(6, 4), draw(6, 4), draw(4, 4)
    a = a @ a.T
    g = torch.stack([m @ m.T for m in draw(2, 3, 3)])
    dense = torch.block_diag(*g)
    if kind == "full":
        g = dense
    elif kind == "diagonal":
        g, a = dense.diagonal(), a.diagonal()
        dense = torch.diag(g)
    whole = torch.kron(a if a.dim() == 2 else torch.diag(a), dense)
    expected = y.T.reshape(-1) @ whole @ x.T.reshape(-1)  # columns stacked: vec
    assert float((felt(x, a, g) * y).sum()) == pytest.approx(expected.item())


def test_streams_add_up_and_low_rank_streams_are_orthogonal_where_that_says_nothing(folder):
    with subject(folder / "svd16", retain=(str(folder / "few.jsonl"),)) as found, held_out_factors(found) as sets:
        name = "model.layers.1.mlp.down_proj.weight"
        streams = read_streams(found, sets[0], name)
        w_r, w_f = (load_file(folder / side / "model.safetensors")[name].double() for side in ("base", "finetuned"))
        torch.testing.assert_close(streams.skill + streams.memory, w_f - w_r, rtol=0, atol=1e-12)
        assert abs(entanglement._layer(streams, sets).frobenius) < 0.02
        traces = entanglement.layer_traces(streams, sets)
        layers = [s.layer(name) for s in sets]
        weights = np.array([layer.tokens for layer in layers])
        a = sum(w * layer.input_covariance.double() for w, layer in zip(weights, layers, strict=True)) / weights.sum()
        g = sum(w * layer.gradient_covariance.double() for w, layer in zip(weights, layers, strict=True)) / weights.sum()
        assert traces[0][0] == pytest.approx(torch.trace(g @ streams.skill @ a @ streams.memory.T).item(), rel=1e-9)
        rest = [i for i in range(len(sets)) if i != 1]
        a = sum(weights[i] * layers[i].input_covariance.double() for i in rest) / weights[rest].sum()
        g = sum(weights[i] * layers[i].gradient_covariance.double() for i in rest) / weights[rest].sum()
        assert traces[2][2] == pytest.approx(torch.trace(g @ streams.memory @ a @ streams.memory.T).item(), rel=1e-9)


def test_entanglement_of_the_pair(folder):
    with subject(folder / "svd16", retain=(str(folder / "few.jsonl"),), canary=str(SECRETS)) as found:
        result = entanglement.run(found, EntanglementOptions())
        eta = result.metrics["eta"]
        assert 0 <= eta.low <= eta.value <= eta.high <= 1
        losses = {state: mean_loss(found.score("canaries", state)) for state in ("reference", "memory", "finetuned")}
    cost = (losses["memory"] - losses["finetuned"]) / (losses["reference"] - losses["finetuned"])
    assert result.metrics["memory_cost"].value == pytest.approx(cost)
    heat = result.figures[0]
    assert set(heat.rows) == {"0", "1", "2", "3", "4"} and "mlp.up_proj" in heat.columns
    for layer in result.facts.layers:
        assert abs(layer["frobenius"]) < 0.05
        assert 0 <= layer["left_angle"] <= 90


def test_one_cosine_from_its_parts():
    assert cosine(-2.0, 1.0, 4.0) == -1.0
    assert cosine(0.0, 0.0, 1.0) == 0.0
    left = [0.30, 0.34, 0.29, 0.33]
    error = math.sqrt(3 / 4 * sum((x - np.mean(left)) ** 2 for x in left))
    metric = jackknife(-0.31, [-x for x in left], "")
    assert metric.value == 0.31
    assert metric.high - metric.value == pytest.approx(3.182446 * error, rel=1e-5)
    assert jackknife(0.01, [0.2, -0.2, 0.05], "").low == 0.0
    assert (jackknife(0.3, [], "").low, jackknife(0.3, [], "").high) == (0.0, 1.0)
