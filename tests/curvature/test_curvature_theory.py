"""Cases whose answer is known: linear nets, the exact Fisher, rotations, (x+y)²."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from curvature_cases import FAMILIES, Oracle, make_model, make_tokens, read_tokens, relative
from run_curvature import estimate
from safetensors.torch import load_file, save_file

from liborth_cli.curvature.collect import FactorCollector, MomentCollector
from liborth_cli.curvature.layer import KroneckerFactors, eigenbasis
from liborth_cli.curvature.plan import CurvatureOptions
from liborth_cli.curvature.selection import Factored
from liborth_cli.stream.batches import Batch
from liborth_cli.stream.tap import Site, Tap

CPU = torch.device("cpu")


def factors_of(a, g, **more):
    return KroneckerFactors("w", "w", None, False, 1.0, ("w",), a, g, **more)


def test_x_plus_y_squared_has_curvatures_4_and_0():
    """L = z², z = w·(1, 1): A = aaᵀ, G = d²L/dz² = 2. A diagonal would see 2 and 2."""
    layer = factors_of(torch.ones(2, 2, dtype=torch.float64), torch.full((1, 1), 2.0, dtype=torch.float64))
    assert torch.allclose(layer.curvature(), torch.tensor([[4.0, 0.0]], dtype=torch.float64), atol=1e-12)
    top = layer.basis.input_vectors[:, 0]
    assert torch.allclose(top.abs(), torch.full((2,), 0.5**0.5, dtype=torch.float64))


def test_kfac_is_the_dense_fisher_of_a_linear_net():
    """Squared loss, y = W₂W₁x: G does not depend on x, so A ⊗ G is the Fisher itself, to the last digits of float64."""
    torch.manual_seed(0)
    d0, d1, d2, n = 5, 4, 3, 20
    w1, w2 = torch.randn(d1, d0, dtype=torch.float64), torch.randn(d2, d1, dtype=torch.float64)
    data = torch.randn(n, d0, dtype=torch.float64)
    sites = {name: Site(name, None, *w.shape, False, ()) for name, w in (("w1", w1), ("w2", w2))}
    targets = {name: [Factored(name, name, "0", *w.shape, False, slice(0, len(w)))] for name, w in (("w1", w1), ("w2", w2))}
    chosen = {"0": [(sites[name], targets[name]) for name in sites]}
    collector = FactorCollector(chosen, CPU, dtype=torch.float64)
    addresses = {(w.data_ptr(), "linear"): sites[name] for name, w in (("w1", w1), ("w2", w2))}
    collector.begin(Batch(data, data, data, None, 1.0, "x"))
    with Tap(addresses, collector):
        x = data.clone().requires_grad_()
        y = torch.nn.functional.linear(torch.nn.functional.linear(x, w1), w2)
    for output in range(d2):
        # The Hessian of ½‖y − t‖² is the identity: the sum over labels is one backward pass for each output.
        y.backward(torch.eye(d2, dtype=torch.float64)[output].expand(n, -1), retain_graph=True)
    sums = collector.take("0")

    def dense(which):
        jacobian = torch.func.vmap(
            torch.func.jacrev(lambda w, x: (w2 @ (w @ x)) if which == "w1" else w @ (w1 @ x)), in_dims=(None, 0)
        )(w1 if which == "w1" else w2, data).flatten(2)
        return torch.einsum("nci,ncj->ij", jacobian, jacobian) / n

    for name in ("w1", "w2"):
        a, g = ((sums[f"{kind}_covariance/{name}"].triu() / n) for kind in ("input", "gradient"))
        a, g = a + a.triu(1).T, g + g.triu(1).T
        # Row-major vec(W): the factor of the outputs comes first.
        assert relative(torch.kron(g, a), dense(name)) < 1e-14


def test_the_exact_fisher_is_the_sum_over_all_labels(tmp_path):
    """Every position and label by itself through the whole model, and the head's G in closed form: mean of diag p − ppᵀ."""
    model = make_model("llama", tmp_path / "model")
    data = make_tokens(tmp_path, rows=3, length=8)
    rows, oracle = read_tokens(data), Oracle(model)
    name, wanted, closed, count = "model.layers.1.mlp.down_proj.weight", 0.0, 0.0, 0
    for row in rows:
        logits = oracle.model(row[None, :-1]).logits[0]
        p = logits.softmax(-1).detach()
        closed = closed + (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).sum(0)
        count += len(p)
        logs = logits.log_softmax(-1)
        for t in range(len(p)):
            for c in range(p.shape[1]):
                oracle.gradients.clear()
                (-logs[t, c]).backward(retain_graph=True)
                g = oracle.gradients[name][0]
                wanted = wanted + p[t, c] * g.T @ g
    with estimate(model, data, tmp_path / "out", fisher="exact", full_head=True) as factors:
        assert relative(factors.layer(name).gradient_covariance, wanted / count) < 1e-5
        assert relative(factors.layer("lm_head.weight").gradient_covariance, closed / count) < 1e-5


def test_sampled_labels_approach_the_exact_fisher(tmp_path):
    model = make_model("llama", tmp_path / "model")
    data = make_tokens(tmp_path, rows=3, length=8)
    name = "model.layers.1.mlp.up_proj.weight"
    with estimate(model, data, tmp_path / "exact", fisher="exact") as exact:
        target = exact.layer(name).gradient_covariance
    found = []
    for seed in range(40):
        with estimate(model, data, tmp_path / f"s{seed}", seed=seed, tensors=(name,)) as sampled:
            found.append(sampled.layer(name).gradient_covariance)
    one, many = relative(found[0], target), relative(torch.stack(found).mean(0), target)
    assert many < 0.35 * one


def test_factors_of_a_rotated_layer_are_the_rotated_factors(tmp_path):
    """Turn every head's values by R and undo it in the output projection: the same model, in other coordinates."""
    from safetensors.torch import load_file, save_file

    model = make_model("mistral", tmp_path / "model")
    data = make_tokens(tmp_path)
    turned = make_model("mistral", tmp_path / "turned")
    weights = load_file(turned / "model.safetensors")
    r = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    r2, r4 = torch.block_diag(r, r), torch.block_diag(r, r, r, r)
    v, o = "model.layers.1.self_attn.v_proj.weight", "model.layers.1.self_attn.o_proj.weight"
    weights[v] = (r2 @ weights[v].double()).float()
    weights[o] = (weights[o].double() @ r4.T).float()
    save_file(weights, turned / "model.safetensors", metadata={"format": "pt"})
    with (
        estimate(model, data, tmp_path / "a", fisher="empirical", moments="marginal") as plain,
        estimate(turned, data, tmp_path / "b", fisher="empirical", moments="marginal") as rotated,
    ):
        one, two = plain.layer(v), rotated.layer(v)
        assert relative(two.gradient_covariance, r2 @ one.gradient_covariance.double() @ r2.T) < 1e-5
        assert relative(two.input_covariance, one.input_covariance) < 1e-5
        assert relative(two.curvature(), one.curvature()) < 1e-5
        assert relative(two.curvature("marginal"), one.curvature("marginal")) < 1e-5
        one, two = plain.layer(o), rotated.layer(o)
        assert relative(two.input_covariance, r4 @ one.input_covariance.double() @ r4.T) < 1e-5
        assert relative(two.curvature(), one.curvature()) < 1e-5


def test_expand_factors_are_those_of_curvlinops(tmp_path):
    """Real labels, summed loss, and their "expand" setting; only the normalisation differs: their G is a sum."""
    import curvlinops

    torch.manual_seed(0)
    model = make_model("mistral", tmp_path / "model")
    np.save(tmp_path / "data.npy", np.random.default_rng(0).integers(0, 67, (4, 13)))
    rows = torch.stack(read_tokens(tmp_path / "data.npy"))
    oracle = Oracle(model)

    class Logits(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, ids):
            return self.inner(ids).logits.flatten(0, 1)

    names = [f"model.layers.{i}.{p}.weight" for i in range(3) for p in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
    network = Logits(oracle.model.requires_grad_(False))
    parameters = [p.requires_grad_() for n, p in oracle.model.named_parameters() if n in names]
    operator = curvlinops.KFACLinearOperator(
        network,
        torch.nn.CrossEntropyLoss(reduction="sum"),
        parameters,
        [(rows[:, :-1], rows[:, 1:].flatten())],
        fisher_type="empirical",
        kfac_approx="expand",
        check_deterministic=False,
        separate_weight_and_bias=True,
        num_data=len(rows),
        batch_size_fn=len,
    )
    blocks = curvlinops_factors(operator)
    with estimate(model, tmp_path / "data.npy", tmp_path / "out", fisher="empirical", tensors=("proj",)) as factors:
        for name, (a, g) in zip(sorted(names), blocks(sorted(names), oracle.model), strict=True):
            layer = factors.layer(name)
            for ours, theirs in ((layer.input_covariance, a), (layer.gradient_covariance, g)):
                scale = float(theirs.diagonal().sum() / ours.double().diagonal().sum())
                assert relative(ours.double() * scale, theirs) < 1e-5, name
            # One product of scales for all layers: the normalisation is a convention, and nothing else differs.
            both = float(a.trace() * g.trace()) / float(
                layer.input_covariance.double().trace() * layer.gradient_covariance.double().trace()
            )
            assert both == pytest.approx(rows[:, 1:].numel(), rel=1e-5)


def curvlinops_factors(operator):
    """Return a function that finds A and G of named parameters in whatever form this version of curvlinops keeps them."""
    compute = getattr(operator, "compute_kronecker_factors", None) or operator._compute_kfac
    result = compute()
    inputs, gradients = result if result is not None else (operator._input_covariances, operator._gradient_covariances)

    def find(names, model):
        modules = {name.removesuffix(".weight"): name for name in names}
        keys = {name: next(k for k in inputs if k.removeprefix("inner.") == module) for module, name in modules.items()}
        return [(inputs[keys[name]], gradients[keys[name]]) for name in names]

    return find


def test_per_head_keeps_the_blocks_of_the_whole_matrix(tmp_path):
    model, data = make_model("gpt2", tmp_path / "model"), make_tokens(tmp_path)
    with (
        estimate(model, data, tmp_path / "a", moments="exact") as whole,
        estimate(model, data, tmp_path / "b", per_head=True, moments="exact") as heads,
    ):
        name = "transformer.h.1.attn.c_attn.weight"
        full, parts = whole.layer(name).gradient_covariance, heads.layer(name)
        assert parts.gradient_covariance.shape == (12, 8, 8) and parts.transposed
        for h in range(12):
            assert torch.equal(parts.gradient_covariance[h], full[8 * h : 8 * h + 8, 8 * h : 8 * h + 8])
        assert parts.curvature().shape == (96, 32)
        # In an orthonormal basis of each head the squares still add up to E[‖g‖²‖a‖²].
        assert relative(parts.second_moments.sum(), whole.layer(name).second_moments.sum()) < 1e-5


def test_eigenbases_are_cached_in_full(tmp_path):
    model, data = make_model("llama", tmp_path / "model"), make_tokens(tmp_path)
    with estimate(model, data, tmp_path / "a", eigen=True) as factors:
        for name in factors.names:
            layer = factors.layer(name)
            assert layer.cached_basis is not None
            for matrix, values, vectors in (
                (layer.input_covariance, layer.cached_basis.input_values, layer.cached_basis.input_vectors),
                (layer.gradient_covariance, layer.cached_basis.gradient_values, layer.cached_basis.gradient_vectors),
            ):
                if matrix.dim() == 2:
                    assert relative((vectors * values) @ vectors.T, matrix) < 1e-6
                    assert bool((values[:-1] >= values[1:]).all())
                else:
                    assert torch.equal(values, matrix.double()) and vectors.numel() == 0


def test_eigenvalues_are_float64_and_never_negative():
    x = torch.randn(3, 6)
    values, vectors = eigenbasis(x.T @ x)
    assert values.dtype == vectors.dtype == torch.float64
    assert float(values.min()) >= 0.0 and float(values[3]) < 1e-5 * float(values[0])


@pytest.mark.parametrize("weights", ["stream", "resident"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_bfloat16_arithmetic_stays_close_to_float32(family, weights, tmp_path):
    """Weights are rounded before both, as in a published checkpoint; a router that chooses another expert is not rounding."""
    model, data = make_model(family, tmp_path / "model"), make_tokens(tmp_path)
    for file in model.glob("*.safetensors"):
        save_file({name: w.bfloat16() for name, w in load_file(file).items()}, file, {"format": "pt"})
    with (
        estimate(model, data, tmp_path / "a", fisher="empirical", weights=weights) as one,
        estimate(model, data, tmp_path / "b", fisher="empirical", weights=weights, dtype="bfloat16") as two,
    ):
        errors = {"input_covariance": [], "gradient_covariance": []}
        for name in one.names[1:]:
            assert two.layer(name).input_covariance.dtype == torch.float32
            for kind, found in errors.items():
                found.append(relative(getattr(two.layer(name), kind), getattr(one.layer(name), kind)))
    assert statistics.median(errors["input_covariance"]) < 0.01
    assert statistics.median(errors["gradient_covariance"]) < 0.02


def test_moment_collector_needs_its_own_basis():
    """In the identity basis the corrected eigenvalues are the diagonal Fisher."""
    torch.manual_seed(0)
    w, x = torch.randn(3, 4), torch.randn(10, 4)
    site, target = Site("w", None, 3, 4, False, ()), Factored("w", "w", "0", 3, 4, False, slice(0, 3))
    batch = Batch(x, x, x, None, 1.0, "x")
    found = []
    for collector in (
        FactorCollector({"0": [(site, [target])]}, CPU, CurvatureOptions(diagonal=True)),
        MomentCollector({"0": [(site, [target])]}, CPU, lambda name: (torch.eye(4), torch.eye(3)), torch.float32),
    ):
        collector.begin(batch)
        with Tap({(w.data_ptr(), "linear"): site}, collector):
            y = torch.nn.functional.linear(x.clone().requires_grad_(), w)
        y.pow(3).sum().backward()
        sums = collector.take("0")
        found.append(next(v for k, v in sums.items() if k.startswith(("diagonal/", "second_moments/"))))
    assert torch.allclose(*found)
