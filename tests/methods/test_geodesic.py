"""The path between two weights whose curvatures differ: against one minimised by brute force, and where it is straight."""

import pytest
import torch

from liborth_cli.curvature.layer import KroneckerFactors
from liborth_cli.errors import BadInput
from liborth_cli.methods.geodesic import Chart, joint, pace


def covariance(size, seed, low=-2.0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return (q * torch.logspace(0, low, size, dtype=torch.float64)[torch.randperm(size, generator=generator)]) @ q.T


def factors(a, g):
    return KroneckerFactors("w", "w", None, False, 100.0, ("w",), a, g)


def test_with_the_factors_of_one_point_the_geodesic_is_the_straight_line():
    """A constant metric is flat; so is one that has only grown everywhere alike: the line is the same, at another pace."""
    d, one = torch.randn(4, 6, dtype=torch.float64), factors(covariance(6, 1), covariance(4, 2))
    torch.testing.assert_close(Chart.of(one, one).travelled(d, 0.3), 0.3 * d)
    grown = factors(4 * one.input_covariance, one.gradient_covariance)
    found = Chart.of(one, grown, damping=0.0).travelled(d, 0.3)
    share = (found / d).mean()
    torch.testing.assert_close(found, share * d)
    assert share > 0.3, "it hurries where the loss is flat, at the start"


def test_it_is_the_shortest_path_by_brute_force():
    """∫ẋᵀg(x)ẋ over 80 steps of a path, minimised by L-BFGS without the closed form."""
    start, end = (factors(covariance(2, a, -0.7), covariance(2, g, -0.7)) for a, g in ((3, 4), (5, 6)))
    d = torch.tensor([[1.0, -0.5], [0.3, 0.8]], dtype=torch.float64)
    left = joint(start.gradient_covariance, end.gradient_covariance, "w")
    right = joint(start.input_covariance, end.input_covariance, "w")
    ends = left.to @ d @ right.to.T
    rho = torch.outer(left.ratios, right.ratios)
    steps = 80
    inner = (torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:-1, None, None] * ends).clone().requires_grad_()

    def energy():
        inside = torch.cat([torch.zeros(1, 2, 2, dtype=torch.float64), inner, ends[None]])
        metric, step = 1 + (rho - 1) * (inside / ends).clamp(0, 1), inside[1:] - inside[:-1]
        return ((metric[1:] + metric[:-1]) / 2 * step.square()).sum() * steps

    optimiser = torch.optim.LBFGS(
        [inner], max_iter=4000, history_size=50, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = energy()
        value.backward()
        return value

    optimiser.step(closure)
    for t in (0.25, 0.5, 0.75):
        by_force = left.back @ inner.detach()[round(t * steps) - 1] @ right.back.T
        found = Chart.of(start, end).travelled(d, t)
        torch.testing.assert_close(found, by_force, atol=5e-3, rtol=0)
        assert (found - t * d).abs().max() > 0.02, "it does bend"


def test_both_metrics_are_diagonal_in_its_coordinates():
    a, b = covariance(5, 7), covariance(5, 8)
    side = joint(a, b, "w", damping=0.0)
    torch.testing.assert_close(side.back.T @ a @ side.back, torch.eye(5).double())
    torch.testing.assert_close(side.back.T @ b @ side.back, torch.diag(side.ratios))
    torch.testing.assert_close(side.to @ side.back, torch.eye(5).double())


@pytest.mark.parametrize("form", ["diagonal", "blocks"])
def test_every_form_of_a_factor_is_that_of_the_whole_matrix(form):
    d = torch.randn(6, 4, dtype=torch.float64)
    inputs = covariance(4, 1), covariance(4, 2)
    if form == "diagonal":
        short = [covariance(6, seed).diagonal().clone() for seed in (3, 4)]
        whole = [torch.diag(one) for one in short]
    else:
        short = [torch.stack([covariance(3, seed), covariance(3, seed + 1)]) for seed in (3, 5)]
        whole = [torch.block_diag(*one) for one in short]
    found, expected = (
        Chart.of(*(factors(a, g) for a, g in zip(inputs, outputs, strict=True))).travelled(d, 0.4) for outputs in (short, whole)
    )
    torch.testing.assert_close(found, expected)


def test_the_pace_is_exact_at_both_ends_and_smooth_at_one():
    rho = torch.tensor([0.0, 1e-9, 0.5, 1.0, 1.00005, 1.0002, 50.0, 1e9], dtype=torch.float64)
    torch.testing.assert_close(pace(rho, 0.0), torch.zeros(8).double())
    torch.testing.assert_close(pace(rho, 1.0), torch.ones(8).double())
    half = pace(rho, 0.5)
    assert (half[1:] >= half[:-1] - 1e-9).all(), "the sharper the end, the sooner it is on its way"
    assert abs(float(half[4]) - 0.5) < 1e-4


def test_a_factor_that_is_not_positive_is_refused():
    with pytest.raises(BadInput, match="not positive"):
        joint(torch.zeros(3, 3), covariance(3, 1), "w")
