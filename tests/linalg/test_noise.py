"""Noise edges against the law they come from and against drawn matrices."""

import math

import pytest
import torch

from liborth_cli.linalg.noise import bulk_edge, bulk_median, effective_rank, optimal_threshold


def test_known_constants():
    """Gavish & Donoho 2014: ω(1) = 2.858, and their polynomial for other shapes (equation 5, good to 0.02)."""
    assert bulk_median(1.0) == pytest.approx(0.6528, abs=1e-4)
    values = torch.tensor([2.0, 1.0, 0.5])
    assert optimal_threshold(values, (3, 3)) == pytest.approx(2.858, abs=1e-3)
    for c in (0.1, 0.3, 0.5, 0.8):
        approximate = 0.56 * c**3 - 0.95 * c**2 + 1.82 * c + 1.43
        assert optimal_threshold(values, (round(100 * c), 100)) == pytest.approx(approximate, abs=0.02)


@pytest.mark.parametrize("shape", [(400, 400), (200, 800), (900, 300)])
def test_pure_noise_has_nothing_above_its_edge(shape):
    values = torch.linalg.svdvals(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    edge = bulk_edge(values, shape)
    assert edge == pytest.approx(math.sqrt(shape[0]) + math.sqrt(shape[1]), rel=0.02)
    assert (values > optimal_threshold(values, shape)).sum() == 0


def test_signal_above_noise_is_counted():
    g = torch.Generator().manual_seed(2)
    u = torch.randn(300, 300, generator=g) + 3 * torch.randn(300, 5, generator=g) @ torch.randn(5, 300, generator=g)
    values = torch.linalg.svdvals(u)
    assert (values > optimal_threshold(values, (300, 300))).sum() == 5


def test_effective_rank():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
