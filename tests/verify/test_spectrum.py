"""Products, quadrature and restricted curvature against dense matrices of small nets, formed by torch.func."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from deep_cases import CPU, finance_rows, subject
from tiny import OWNGPT, llama
from torch.func import functional_call, hessian, jacrev, jvp, vjp

from liborth_cli import machine
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.linalg.lanczos import eigenvalues_above, lanczos, merged
from liborth_cli.linalg.noise import covariance_edge
from liborth_cli.measure.directions import Subspace, Whole, decompose, matrices, random_bases
from liborth_cli.measure.products import Products
from liborth_cli.measure.thin import Thin
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.stream.weights import Point
from liborth_cli.verify.checks import spectrum
from liborth_cli.verify.checks.spectrum import Matrix, SpectrumOptions

SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}


def token_rows(vocabulary, lengths=(5, 9, 5), seed=0):
    draw = np.random.default_rng(seed)
    return [Row(draw.integers(0, vocabulary, n + 1), np.arange(n) >= 1, 1.0 + (n == 9), "row") for n in lengths]


class Dense:
    """The same model by Transformers' loader, in float64, and its curvature formed whole."""

    def __init__(self, folder, rows):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
        self.rows = rows
        self.parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        kept = [(torch.from_numpy(row.ids[1:])[torch.from_numpy(row.keep)], row.weight) for row in rows]
        self.labels = torch.cat([labels for labels, _ in kept])
        self.weights = torch.cat([torch.full((len(labels),), weight, dtype=torch.float64) for labels, weight in kept])
        self.weights /= self.weights.sum()

    def logits(self, parameters):
        run = [functional_call(self.model, parameters, (torch.from_numpy(row.ids[:-1])[None],)).logits[0] for row in self.rows]
        return torch.cat([out[torch.from_numpy(row.keep)] for out, row in zip(run, self.rows, strict=True)])

    def loss(self, parameters):
        each = torch.nn.functional.cross_entropy(self.logits(parameters), self.labels, reduction="none")
        return (each * self.weights).sum()

    def product(self, direction, of_hessian):
        direction = {name: direction[name] for name in self.parameters}
        if of_hessian:
            return jvp(torch.func.grad(self.loss), (self.parameters,), (direction,))[1]
        z, turn = jvp(self.logits, (self.parameters,), (direction,))
        p = z.softmax(-1)
        at_logits = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) @ turn[..., None]
        return vjp(self.logits, self.parameters)[1](at_logits[..., 0] * self.weights[:, None])[0]

    def flat(self, parts, names):
        return torch.cat([parts[name].reshape(-1) for name in names])

    def matrix(self, names, of_hessian):
        """The whole curvature, (n, n), parameters in the order of `names`."""
        sizes = [self.parameters[name].numel() for name in names]

        def unflatten(flat):
            pieces = flat.split(sizes)
            return {n: piece.view(self.parameters[n].shape) for n, piece in zip(names, pieces, strict=True)}

        flat = self.flat(self.parameters, names)
        if of_hessian:
            return hessian(lambda w: self.loss(unflatten(w)))(flat)
        jacobian = jacrev(lambda w: self.logits(unflatten(w)))(flat)
        p = self.logits(self.parameters).softmax(-1)
        middle = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) * self.weights[:, None, None]
        return torch.einsum("tan,tab,tbm->nm", jacobian, middle, jacobian)


def make(folder, kind):
    if kind == "gpt2":
        return OWNGPT / "finetuned", 40
    return llama(folder / kind, tie=kind == "tied"), 64


@pytest.mark.parametrize("kind", ["untied", "tied", "gpt2"])
@pytest.mark.parametrize("of_hessian", [False, True])
@pytest.mark.parametrize("resident", [False, True])
def test_a_streamed_product_is_that_of_torch_func(tmp_path, kind, of_hessian, resident):
    folder, vocabulary = make(tmp_path, kind)
    rows = token_rows(vocabulary)
    dense = Dense(folder, rows)
    with Checkpoint.open(folder) as checkpoint:
        model = BlockModel(Point(checkpoint), torch.float64, CPU)
        if resident:
            model.load_all()
        whole = Whole(model)
        assert set(whole._places) == set(dense.parameters)
        vector = torch.randn(whole.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        products = Products(model, rows, of_hessian)
        found = whole.multiply(products.product, vector)
        expected = dense.product({name: whole._view(vector, name) for name in whole._places}, of_hessian)
        for name, part in expected.items():
            # Llama's norms are float32 inside.
            np.testing.assert_allclose(whole._view(found, name), part.detach(), atol=2e-6 * float(part.abs().max()))
        if not of_hessian:
            each = products.forms(whole)
            weights = torch.tensor([row.weight for row in sorted(rows, key=lambda r: (r.tokens, r.weight), reverse=True)])
            form = float((each[:, 0] * weights).sum() / (each[:, 1] * weights).sum())
            assert form == pytest.approx(float(vector @ dense.flat(expected, list(whole._places))), rel=1e-5)
        model.close()


@pytest.mark.parametrize("of_hessian", [False, True])
def test_the_model_is_run_once_for_all_products_at_the_same_weights(tmp_path, monkeypatch, of_hessian):
    folders, rows = [llama(tmp_path / name, seed=seed) for name, seed in (("one", 0), ("two", 1))], token_rows(64)
    with Checkpoint.open(folders[0]) as one, Checkpoint.open(folders[1]) as two:
        model = BlockModel(Point(one), torch.float64, CPU)
        model.load_all()
        runs, block, points = [], BlockModel.block, (Point(one), Point(two))
        monkeypatch.setattr(BlockModel, "block", lambda *given: runs.append(1) or block(*given))
        whole = Whole(model)
        vectors = torch.randn(3, whole.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

        def at(point, spare, threads=1):
            monkeypatch.setattr("liborth_cli.measure.products.spare_bytes", lambda: spare)
            torch.set_num_threads(threads)
            model.use(point)
            products, before = Products(model, rows, of_hessian), len(runs)
            found = torch.stack([whole.multiply(products.product, v) for v in vectors])
            return found, len(runs) - before, products

        try:
            kept, few, products = at(points[0], 1 << 34)
            again, many, _ = at(points[0], 1000)
            beside, _, _ = at(points[0], 1 << 34, threads=2)
        finally:
            torch.set_num_threads(1)
        # Two batches of two blocks, once, and the longer rows' once more to see what they take; or there and back each time.
        assert (few, many) == (2 * 2 + 2, 1 + 3 * 2 * (2 * 2))
        torch.testing.assert_close(kept, again, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(kept, beside, rtol=1e-12, atol=1e-15)
        model.use(points[1])
        moved = whole.multiply(products.product, vectors[0])
        torch.testing.assert_close(moved, at(points[1], 1000)[0][0], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(moved, kept[0])
        model.close()


@pytest.mark.parametrize("of_hessian", [False, True])
def test_quadrature_gives_the_spectrum_of_a_small_net(tmp_path, of_hessian):
    folder = llama(tmp_path / "net", **{**SMALL, "num_key_value_heads": 1})
    rows = token_rows(11, (4, 6, 4))
    dense = Dense(folder, rows)
    with Checkpoint.open(folder) as checkpoint:
        model = BlockModel(Point(checkpoint), torch.float64, CPU)
        whole, products = Whole(model), Products(model, rows, of_hessian)
        matrix = dense.matrix(list(whole._places), of_hessian).detach()
        true = torch.linalg.eigvalsh(matrix).numpy()
        generator = torch.Generator().manual_seed(0)
        starts = [torch.randn(whole.size, generator=generator, dtype=torch.float64) for _ in range(4)]
        multiply = [lambda v: whole.multiply(products.product, v), lambda v: matrix @ v]
        runs = [lanczos(multiply[number > 0], start, 30) for number, start in enumerate(starts)]
        model.close()
    top = np.abs(true).max()
    for run in runs:
        assert run.nodes[-1] == pytest.approx(true[-1], abs=1e-6 * top)
        assert run.nodes[0] == pytest.approx(true[0], abs=1e-4 * top)
        # Every node is as close to an eigenvalue as its residual says.
        gaps = np.abs(run.nodes[:, None] - true[None]).min(1)
        assert (gaps <= run.residuals + 1e-6 * top).all()
    nodes, weights = merged(runs)
    # Moments, with the error that a few random starts may have (variance of a Gaussian start's quadratic form).
    for power in (1, 2):
        moment, spread = (true**power).mean(), np.sqrt(2 * (true ** (2 * power)).mean() / len(true) / len(runs))
        assert abs(weights @ nodes**power - moment) < 4 * spread
    # The distribution function, away from 0 where most of a degenerate spectrum sits.
    for share in (0.02, 0.1, 0.3, 0.7):
        mass, count = weights[nodes > share * top].sum(), (true > share * top).mean()
        assert abs(mass - count) < 4 * np.sqrt(max(count, 1 / len(true)) * 2 / len(true) / len(runs)) + 1e-9


def test_without_reorthogonalisation_the_density_is_the_same_and_copies_count_once():
    true = np.concatenate([np.linspace(0, 1, 390), np.linspace(5, 60, 10)])
    basis = torch.linalg.qr(torch.randn(400, 400, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    matrix = (basis * torch.from_numpy(true)) @ basis.T
    start = torch.randn(400, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    kept, light = (lanczos(lambda v: matrix @ v, start, 120, keep) for keep in (True, False))
    assert kept.weights[kept.nodes > 3].sum() == pytest.approx(light.weights[light.nodes > 3].sum(), rel=1e-8)
    assert (light.nodes > 3).sum() > 10, "no copies came up: this proves nothing"
    for run in (kept, light):
        found, complete = eigenvalues_above(run, 3.0)
        assert complete or run is light  # a copy may be in the making whenever a run ends
        np.testing.assert_allclose(found, true[::-1][:10], rtol=1e-6)


def test_sums_over_millions_of_weights_keep_their_digits():
    start = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))
    assert lanczos(lambda v: 2.0 * v, start, 1).nodes[0] == pytest.approx(2.0, rel=1e-6)


def test_lanczos_ends_when_the_space_is_exhausted():
    run = lanczos(lambda v: 2.0 * v, torch.ones(7, dtype=torch.float64), 5)
    assert len(run.nodes) == 1 and run.nodes[0] == pytest.approx(2.0) and run.weights[0] == 1.0 and run.residuals[0] == 0.0
    diagonal = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    np.testing.assert_allclose(lanczos(lambda v: diagonal * v, torch.ones(3, dtype=torch.float64), 9).nodes, [1, 2, 3])


@pytest.mark.parametrize("size, samples", [(300, 100), (100, 300)])
def test_planted_outliers_are_counted_and_noise_is_not(size, samples):
    generator = torch.Generator().manual_seed(size)
    data = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    for planted in (0, 3):
        shifted = data.clone()
        shifted[:, :planted] *= 12.0
        matrix = shifted.T @ shifted / samples
        runs = [lanczos(lambda v, m=matrix: m @ v, torch.randn(size, generator=generator).double(), 60) for _ in range(3)]
        nodes, weights = merged(runs)
        edge = covariance_edge(float(weights @ nodes), size, samples)
        assert len(eigenvalues_above(runs[0], 1.05 * edge)[0]) == planted
        if not planted:
            assert float(torch.linalg.eigvalsh(matrix)[-1]) == pytest.approx(edge, rel=0.1)


@pytest.mark.parametrize("resident", [False, True])
def test_restricted_curvature_is_the_projected_matrix(tmp_path, resident):
    folder = llama(tmp_path / "net", **{**SMALL, "num_key_value_heads": 1})
    rows = token_rows(11, (4, 6))
    dense = Dense(folder, rows)
    with Checkpoint.open(folder) as checkpoint:
        model = BlockModel(Point(checkpoint), torch.float64, CPU)
        if resident:
            model.load_all()
        names = matrices(model)
        generator = torch.Generator().manual_seed(0)
        parts = {name: decompose(torch.randn(dense.parameters[name].shape, generator=generator).double(), 2) for name in names}
        for bases in ({n: (p.left, p.right) for n, p in parts.items()}, random_bases(parts, 5)):
            space = Subspace(bases, names)
            unit = torch.eye(space.size, dtype=torch.float64)
            products = Products(model, rows, bases=bases)
            found = torch.stack([space.multiply(products.product, row) for row in unit])
            columns = []
            for row in unit:
                space.vector = row
                cores = {n: t for stage in model.stages for n, t in space.tangents(stage).items()}
                update = {n: (bases[n][0] @ core @ bases[n][1].mT)[0] for n, core in cores.items()}
                columns.append(
                    dense.flat({n: update.get(n, torch.zeros_like(p)) for n, p in dense.parameters.items()}, dense.parameters)
                )
            basis = torch.stack(columns, 1)
            np.testing.assert_allclose(basis.T @ basis, unit, atol=1e-12)
            expected = basis.T @ dense.matrix(list(dense.parameters), False).detach() @ basis
            np.testing.assert_allclose(found, expected, atol=1e-6 * float(expected.abs().max()))
        model.close()


def test_a_thin_weight_is_itself_wherever_it_is_used_and_takes_its_factors_one_by_one():
    draw = torch.Generator().manual_seed(0)
    weight, stack = torch.randn(6, 6, generator=draw), torch.randn(3, 6, 6, generator=draw)
    x, core = torch.randn(4, 6, generator=draw), torch.randn(3, 2, 2, generator=draw)
    u, v = (torch.linalg.qr(torch.randn(3, 6, 2, generator=draw))[0] for _ in range(2))
    uses = [
        (weight, lambda w: F.linear(x, w, torch.ones(6))), (weight, lambda w: torch.addmm(torch.ones(6), x, w)),
        (weight, lambda w: x @ w), (stack, lambda w: F.linear(x, w[1])), (stack, lambda w: torch.bmm(x.expand(3, 4, 6), w)),
    ]  # fmt: skip
    for held, use in uses:
        count = held.dim() ** 2 // 9 * 2 + 1
        basis = u[:count], v[:count]
        thin, plain = Thin.of(held, basis), held.clone().requires_grad_()
        assert thin.shape == held.shape and torch.equal(use(thin), use(held))
        (found,) = torch.autograd.grad(use(thin).sin().sum(), thin.core)
        (dense,) = torch.autograd.grad(use(plain).sin().sum(), plain)
        torch.testing.assert_close(found, basis[0].mT @ dense.view(count, 6, 6) @ basis[1])
        thin = Thin.of(held, basis)
        with torch.no_grad():
            thin.core.copy_(core[:count])
        moved = held + (basis[0] @ core[:count] @ basis[1].mT).view_as(held)
        torch.testing.assert_close(use(thin), use(moved))
    thin = Thin.of(weight, (u[:1], v[:1]))
    F.linear(x, thin)
    assert "whole" not in vars(thin), "W + U C Vᵀ is not formed for a product"


def test_decomposition_is_the_svd():
    update = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    for some in (update, update.mT.contiguous()):
        parts = decompose(some, 3)
        u, s, vh = torch.linalg.svd(some.double(), full_matrices=False)
        np.testing.assert_allclose(parts.values, s, rtol=1e-6)
        for left, right in zip(parts.left, parts.right, strict=True):
            np.testing.assert_allclose(left.T @ left, np.eye(3), atol=1e-6)
            np.testing.assert_allclose(right.T @ right, np.eye(3), atol=1e-6)
        for mine, his in ((parts.left, u[..., :3]), (parts.right, vh.mT[..., :3])):
            np.testing.assert_allclose((mine.double().mT @ his).abs(), np.eye(3)[None].repeat(2, 0), atol=1e-5)
    low = decompose(torch.outer(torch.arange(1.0, 5), torch.ones(6)), 3)
    assert low.left.shape == (1, 4, 1) and low.right.shape == (1, 6, 1) and (low.values[0, 1:] == 0).all()


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
def test_the_check_on_the_pair_that_ships(matrix):
    options = SpectrumOptions(Matrix(matrix), 200, 12, 1, 3)
    with subject(retain=finance_rows(12), canaries=finance_rows(3, 9_000)) as it:
        result = spectrum.run(it, options)
        assert json.dumps(result.to_json()) == json.dumps(spectrum.run(it, options).to_json())
    metrics = result.metrics
    assert set(metrics) == {"sharpness", "outliers", "skill_curvature", "memory_curvature"}
    # Halfway between the two checkpoints both streams are the same direction, and it is not noise.
    assert metrics["skill_curvature"].value == pytest.approx(metrics["memory_curvature"].value, rel=1e-3)
    assert metrics["skill_curvature"].low > 1
    kinds = [type(figure).__name__ for figure in result.figures]
    assert kinds.count("Plot") == 5 and kinds.count("Table") == 3
    for figure in result.figures:
        assert getattr(figure, "alt", "a table")


def test_one_start_makes_the_density_and_two_the_mean(monkeypatch):
    spaces = []
    monkeypatch.setattr(spectrum, "_start", lambda *given, start=spectrum._start: spaces.append(given[0]) or start(*given))
    with subject(retain=finance_rows(4)) as it:
        found = [
            spectrum.run(it, SpectrumOptions(spectrum_steps=5, spectrum_probes=probes, spectrum_rank=2)).facts
            for probes in (1, 3)
        ]
    assert len(spaces) == 4 * (2 + 3)
    for facts, probes in zip(found, (1, 3), strict=True):
        assert {len(runs) for runs in facts.lanczos.values()} == {probes}
        assert {len(run.nodes) for runs in facts.lanczos.values() for run in runs} == {5}
    # The first start is the same, and so is what it found; the mean is that of all starts.
    for name, (first, *others) in found[1].lanczos.items():
        assert first == found[0].lanczos[name][0]
        means = [np.dot(run.nodes, run.weights) for run in (first, *others)]
        assert found[1].mean_eigenvalue[name] == pytest.approx(np.mean(means), rel=1e-6)
        assert found[0].mean_eigenvalue[name] == pytest.approx(np.mean(means[:2]), rel=1e-6)


def test_what_is_missing_is_said():
    with subject(retain=finance_rows(4)) as it:
        alone = replace(it, reference=None)
        result = spectrum.run(alone, SpectrumOptions(spectrum_steps=3, spectrum_probes=1))
        assert "needs --reference and --finetuned" in result.verdict and set(result.metrics) == {"sharpness", "outliers"}
    with subject() as it:
        assert "--retain-data" in spectrum.CHECK.missing(it, SpectrumOptions())


def test_vectors_that_do_not_fit_are_left_out_and_the_rest_is_measured(monkeypatch):
    monkeypatch.setattr(machine, "spare_bytes", lambda: 1000)
    with subject(retain=finance_rows(4)) as it:
        result = spectrum.run(it, SpectrumOptions(spectrum_steps=3, spectrum_rank=2))
    assert "The spectrum over all weights was left out" in result.verdict
    assert set(result.metrics) == {"skill_curvature", "memory_curvature"}
    assert "memory directions" in result.facts.lanczos and "all weights" not in result.facts.lanczos
