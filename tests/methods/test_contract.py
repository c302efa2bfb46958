"""Every method through one table: parts add up, seeds repeat, sides swap, rotations behave."""

import math

import pytest
import torch

from liborth_cli.cli.split import MethodName
from liborth_cli.curvature.layer import DiagonalFisher, KroneckerFactors, TokenGradients
from liborth_cli.errors import BadInput, UsageError
from liborth_cli.linalg.truncated import energy
from liborth_cli.methods import AMOUNTS, METHODS, Amount, Layer
from liborth_cli.split import SplitOptions, split_matrix

VALUES = {
    "rank": 5, "energy": 0.6, "noise-edge": None, "density": 0.3, "scale": 0.7, "mass": 0.7, "threshold": 1.0, "strength": 0.5,
    "steps": 3,
    "epochs": 3,
}  # fmt: skip
CASES = [(name, kind) for name, method in METHODS.items() for kind in method.amounts]
SHAPES = [(12, 20), (20, 12), (9, 9), (1, 7)]


def covariance(size, seed):
    """A positive matrix with a spectrum that falls over three decades."""
    q = rotation(size, seed)
    return (q * torch.logspace(0, -3, size, dtype=torch.float64)) @ q.T


def factors(shape, seed):
    return KroneckerFactors("w", "w", None, False, 100.0, ("w",), covariance(shape[1], seed), covariance(shape[0], seed + 1),
                            covariance(shape[1], seed + 2), covariance(shape[0], seed + 3))  # fmt: skip


def tokens(shape, seed, count=15):
    g = torch.Generator().manual_seed(seed)
    return TokenGradients(torch.randn(count, shape[1], generator=g), torch.randn(count, shape[0], generator=g))


def layer_of(u, seed=0, retain=None, forget=None, felt=None, shares=()):
    fisher = DiagonalFisher("w", 100.0, 0.1 + torch.rand(u.shape, generator=torch.Generator().manual_seed(9)).double())
    shape = tuple(u.shape)
    return Layer("w", u.clone(), energy(u), torch.Generator().manual_seed(seed),
                 retain=retain or factors(shape, 10), forget=(forget or factors(shape, 20),), diagonal=fisher,
                 tokens=felt or (tokens(shape, 30),), shares=shares, edit=update(shape, 40))  # fmt: skip


def split(u, method, kind, side="tail", seed=0, value=None, **given):
    amount = Amount(kind, VALUES[kind] if value is None else value, given.pop("hard", False))
    settings = {name: given.pop(name) for name in ("damping",) if name in given}
    return split_matrix(layer_of(u, seed, **given), SplitOptions(method, amount, side, settings=settings))


def update(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_command_line_knows_every_method_and_amount():
    assert [m.value for m in MethodName] == [*METHODS, "auto"]
    assert {kind for m in METHODS.values() for kind in m.amounts} == set(AMOUNTS)


@pytest.mark.parametrize(("method", "kind"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_report_tells_the_energies(method, kind, shape):
    u = update(shape)
    skill, report = split(u, method, kind)
    assert skill.shape == u.shape
    assert report.skill == pytest.approx(energy(skill) / energy(u), abs=1e-5)
    assert report.memory == pytest.approx(energy(u - skill) / energy(u), abs=1e-5)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_sides_swap(method, kind):
    u = update((12, 20))
    tail, a = split(u, method, kind, "tail")
    top, b = split(u, method, kind, "top")
    assert torch.allclose(tail + top, u, atol=1e-5)
    assert (a.skill, a.memory) == (b.memory, b.skill)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_same_seed_same_bits(method, kind):
    u = update((12, 20))
    assert torch.equal(split(u, method, kind)[0], split(u, method, kind)[0])


def test_random_depends_on_its_seed():
    u = update((12, 20))
    assert not torch.equal(split(u, "random", "energy", seed=1)[0], split(u, "random", "energy", seed=2)[0])


@pytest.mark.parametrize("method", ["svd", "magnitude", "random"])
@pytest.mark.parametrize("goal", [0.0, 0.3, 0.9, 1.0])
def test_energy_is_reached_with_the_fewest_coordinates(method, goal):
    u = update((30, 40))
    _, report = split(u, method, "energy", value=goal)
    assert report.skill >= goal - 1e-6
    largest: dict = {"svd": torch.linalg.matrix_norm(u, 2) ** 2, "magnitude": u.abs().max() ** 2, "random": u.abs().max() ** 2}
    assert report.skill <= goal + largest[method].item() / energy(u) + 1e-6


def test_svd_keeps_the_best_rank():
    u = update((30, 40))
    skill, report = split(u, "svd", "rank", value=4)
    left, sigma, right = torch.linalg.svd(u)
    assert torch.allclose(skill, (left[:, :4] * sigma[:4]) @ right[:4], atol=1e-4)
    assert report.facts["rank"] == 4


def test_svd_noise_edge_finds_the_signal():
    g = torch.Generator().manual_seed(0)
    signal = torch.randn(200, 3, generator=g) @ torch.randn(3, 150, generator=g)
    skill, report = split(signal + torch.randn(200, 150, generator=g), "svd", "noise-edge")
    assert report.facts["rank"] == 3
    assert ((skill - signal).norm() / signal.norm()).item() < 0.25


def test_magnitude_keeps_the_largest():
    u = update((10, 10))
    skill, _ = split(u, "magnitude", "density", value=0.2)
    assert torch.equal(skill != 0, u.abs() >= u.abs().flatten().topk(20).values.min())


def test_random_removes_the_same_energy_as_svd():
    """The placebo has the size of what it stands beside."""
    u = update((60, 80))
    _, svd = split(u, "svd", "rank", value=6)
    _, random = split(u, "random", "energy", value=svd.skill)
    assert random.memory == pytest.approx(svd.memory, abs=2e-3)


def test_scale_is_plain_scaling():
    u = update((10, 10))
    assert torch.equal(split(u, "scale", "scale", value=0.25)[0], u * 0.25)


def rotation(n, seed):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def rotated_factors(found, left, right):
    """The factors of the layer W → L W Rᵀ, whose inputs are R a and whose gradients are L g."""
    turn = lambda m, q: q @ m @ q.T  # noqa: E731
    return KroneckerFactors("w", "w", None, False, 100.0, ("w",), turn(found.input_covariance, right),
                            turn(found.gradient_covariance, left), turn(found.input_moment, right),
                            turn(found.gradient_moment, left))  # fmt: skip


@pytest.mark.parametrize(
    ("method", "commutes"),
    [
        ("svd", True), ("scale", True), ("kfac", True), ("ekfac", True), ("contrastive", True), ("tokenwise", True),
        ("magnitude", False), ("diagonal", False), ("impact", False),
    ],
)  # fmt: skip
def test_rotation_tells_a_basis_from_an_accident_of_coordinates(method, commutes):
    u = update((12, 20)).double()
    left, right = rotation(12, 1), rotation(20, 2)
    kind = METHODS[method].amounts[0] if METHODS[method].needs else METHODS[method].amounts[-1]
    retain, forget = factors((12, 20), 10), factors((12, 20), 20)
    plain, _ = split(u, method, kind, retain=retain, forget=forget)
    turned = {name: rotated_factors(f, left, right) for name, f in (("retain", retain), ("forget", forget))}
    felt = tokens((12, 20), 30)
    felt = TokenGradients((felt.inputs.double() @ right.T), (felt.gradients.double() @ left.T))
    rotated, _ = split(left @ u @ right.T, method, kind, **turned, felt=(felt,))
    gap = (left @ plain @ right.T - rotated).norm() / plain.norm()
    assert (gap.item() < 1e-6) == commutes


def test_contrastive_minimises_its_objective():
    """Brute force: no step away from the kept part lowers tr(G_r(X−U)A_r(X−U)ᵀ) + λ·tr(G_f X A_f Xᵀ), forget traces scaled."""
    u, strength = update((4, 5)).double(), 0.5
    r, f = factors((4, 5), 10), factors((4, 5), 20)
    kept, _ = split(u, "contrastive", "strength", "top", value=strength, retain=r, forget=f)
    damp = lambda m: m + 1e-2 * m.trace() / len(m) * torch.eye(len(m), dtype=m.dtype)  # noqa: E731
    a_r, g_r = damp(r.input_covariance), damp(r.gradient_covariance)
    a_f = f.input_covariance * r.input_covariance.trace() / f.input_covariance.trace()
    g_f = f.gradient_covariance * r.gradient_covariance.trace() / f.gradient_covariance.trace()
    x = kept.clone().requires_grad_()
    loss = (g_r @ (x - u) @ a_r @ (x - u).T).trace() + strength * (g_f @ x @ a_f @ x.T).trace()
    loss.backward()
    assert x.grad.abs().max().item() < 1e-10
    assert kept.norm() > 0.1 * u.norm()


def test_contrastive_with_equal_factors_is_plain_scaling():
    u, same = update((6, 7)).double(), factors((6, 7), 10)
    kept, _ = split(u, "contrastive", "strength", "top", value=1.0, retain=same, forget=same, damping=1e-6)
    assert torch.allclose(kept, u / 2, rtol=1e-3, atol=1e-3), "up to the damping of the retain factors"


def test_contrastive_at_the_ends_of_its_strength():
    u = update((6, 7)).double()
    assert torch.allclose(split(u, "contrastive", "strength", "top", value=0.0)[0], u)
    assert torch.allclose(split(u, "contrastive", "strength", "top", value=0.0, hard=True)[0], u)
    assert split(u, "contrastive", "strength", "top", value=1e14)[0].norm() < 1e-6 * u.norm()
    assert split(u, "contrastive", "strength", "top", value=1e14, hard=True)[0].norm() < 1e-6 * u.norm()


def test_the_textbook_case():
    """L = (x + y)² has curvatures 4 along (1, 1) and 0 along (1, −1). A diagonal sees 2 and 2 and cannot tell them apart."""
    hessian = torch.tensor([[2.0, 2.0], [2.0, 2.0]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    found = KroneckerFactors("w", "w", None, False, 1.0, ("w",), hessian, one)
    assert found.basis.input_values.tolist() == pytest.approx([4.0, 0.0])
    sharp, flat = torch.tensor([[1.0, 1.0]]).double(), torch.tensor([[1.0, -1.0]]).double()
    kept, _ = split(sharp + flat, "kfac", "mass", value=0.9, retain=found)
    assert torch.allclose(kept, sharp), "the flat direction is what kfac takes for memory"


def test_impact_takes_every_weight_above_one_threshold_in_all_matrices():
    """The founding formula by hand, in a loop over weights: memory is where |U|²/H reaches τ, whatever the matrix."""
    tau = 0.8
    for shape in ((12, 20), (9, 9)):
        u = update(shape).double()
        h = layer_of(u).need("diagonal").values
        kept, _ = split(u, "impact", "threshold", METHODS["impact"].memory_side, value=tau)
        for i in range(shape[0]):
            for j in range(shape[1]):
                memory = u[i, j].item() ** 2 / (h[i, j].item() + 1e-6 * h.mean().item()) >= tau
                assert kept[i, j] == (0.0 if memory else u[i, j])


def test_impact_and_diagonal_rank_against_each_other_where_curvature_decides():
    """Equal updates: what the retain loss feels least has most impact, so the formula takes flat weights first."""
    u = torch.ones(3, 4)
    layer = layer_of(u)
    felt, impact = (METHODS[name].score(METHODS[name].basis(layer, Amount("mass", 0.5)), layer).flatten().argsort()
                    for name in ("diagonal", "impact"))  # fmt: skip
    assert felt.tolist() == impact.flip(0).tolist()


def test_impact_is_finite_where_nothing_is_felt():
    u = torch.tensor([[1.0, 0.0]])
    layer = Layer("w", u, 1.0, torch.Generator(), diagonal=DiagonalFisher("w", 1.0, torch.zeros(1, 2).double()))
    found = METHODS["impact"].score(METHODS["impact"].basis(layer, Amount("mass", 0.5)), layer)
    assert found.isfinite().all()
    assert found[0, 1] == 0


def test_kfac_keeps_the_directions_that_hold_the_mass():
    u = update((12, 20)).double()
    found = factors((12, 20), 10)
    _, report = split(u, "kfac", "mass", value=0.9, retain=found)
    curvature = found.curvature("kfac").flatten().sort(descending=True).values
    count = int((curvature.cumsum(0) < 0.9 * curvature.sum()).sum()) + 1
    coordinates = (found.basis.gradient_vectors.T @ u @ found.basis.input_vectors).square().flatten()
    order = found.curvature("kfac").flatten().argsort(descending=True)[:count]
    assert report.skill == pytest.approx((coordinates[order].sum() / coordinates.sum()).item(), rel=1e-9)


def test_diagonal_and_blocked_factors():
    """Embeddings have a diagonal A, the head a diagonal G, per-head attention a G in blocks."""
    u = update((6, 8)).double()
    full_a, full_g = covariance(8, 1), covariance(6, 2)
    for a, g, dense_a, dense_g in (
        (full_a.diagonal().clone(), full_g, torch.diag(full_a.diagonal()), full_g),
        (full_a, full_g.diagonal().clone(), full_a, torch.diag(full_g.diagonal())),
        (full_a, torch.stack([full_g[:3, :3], full_g[3:, 3:]]), full_a, torch.block_diag(full_g[:3, :3], full_g[3:, 3:])),
    ):
        compact, dense = (KroneckerFactors("w", "w", None, False, 1.0, ("w",), x, y) for x, y in ((a, g), (dense_a, dense_g)))
        for method, kind in (("kfac", "mass"), ("contrastive", "strength")):
            pairs = [split(u, method, kind, retain=f, forget=f)[0] for f in (compact, dense)]
            assert torch.allclose(*pairs, atol=1e-8), (method, a.shape, g.shape)


def test_missing_and_singular_factors_are_refused():
    u = update((6, 7))
    bare = Layer("w", u.clone(), energy(u), torch.Generator())
    for name in ("kfac", "contrastive", "diagonal"):
        with pytest.raises(BadInput, match="needs"):
            METHODS[name].basis(bare, Amount("mass", 0.5)) if name != "diagonal" else METHODS[name].score(
                METHODS[name].basis(bare, Amount("mass", 0.5)), bare
            )
    nothing = KroneckerFactors("w", "w", None, False, 1.0, ("w",), torch.zeros(7, 7), torch.zeros(6, 6))
    with pytest.raises(BadInput, match="not positive"):
        split(u, "contrastive", "strength", retain=nothing)


@pytest.mark.parametrize(
    "amount",
    [
        Amount("rank", 0),
        Amount("rank", 2.5),
        Amount("rank", math.inf),
        Amount("energy", 1.5),
        Amount("energy", math.nan),
        Amount("scale", -1),
        Amount("density"),
    ],
)
def test_numbers_outside_their_range_are_refused(amount):
    with pytest.raises(UsageError, match=f"--{amount.kind} takes a (whole )?number"):
        amount.check()
