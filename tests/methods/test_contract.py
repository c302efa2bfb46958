"""Every method through one table: parts add up, seeds repeat, sides swap, rotations behave."""

import math

import pytest
import torch

from liborth_cli.errors import UsageError
from liborth_cli.linalg.truncated import energy
from liborth_cli.main import MethodName
from liborth_cli.methods import METHODS, Amount, Layer
from liborth_cli.methods.selection import AMOUNTS, check
from liborth_cli.split import SplitOptions, split_matrix

VALUES = {"rank": 5, "energy": 0.6, "noise-edge": None, "density": 0.3, "scale": 0.7}
CASES = [(name, kind) for name, method in METHODS.items() for kind in method.amounts]
SHAPES = [(12, 20), (20, 12), (9, 9), (1, 7)]


def split(u, method, kind, side="tail", seed=0, value=None):
    layer = Layer("w", u.clone(), energy(u), torch.Generator().manual_seed(seed))
    amount = Amount(kind, VALUES[kind] if value is None else value)
    return split_matrix(layer, SplitOptions(method, amount, side))


def update(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_command_line_knows_every_method_and_amount():
    assert [m.value for m in MethodName] == list(METHODS)
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
    largest = {"svd": torch.linalg.matrix_norm(u, 2) ** 2, "magnitude": u.abs().max() ** 2, "random": u.abs().max() ** 2}
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


@pytest.mark.parametrize(("method", "commutes"), [("svd", True), ("scale", True), ("magnitude", False)])
def test_rotation_tells_a_basis_from_an_accident_of_coordinates(method, commutes):
    u = update((12, 20)).double()
    left, right = rotation(12, 1), rotation(20, 2)
    kind = METHODS[method].amounts[-1]
    plain, _ = split(u, method, kind)
    rotated, _ = split(left @ u @ right.T, method, kind)
    gap = (left @ plain @ right.T - rotated).norm() / plain.norm()
    assert (gap.item() < 1e-6) == commutes


@pytest.mark.parametrize(
    "amount", [Amount("rank", 0), Amount("energy", 1.5), Amount("energy", math.nan), Amount("scale", -1), Amount("density")]
)
def test_numbers_outside_their_range_are_refused(amount):
    with pytest.raises(UsageError, match=f"--{amount.kind} takes a number"):
        check(amount)
