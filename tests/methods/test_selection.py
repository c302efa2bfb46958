"""Which coordinates an amount keeps: held against sorting them."""

import pytest
import torch

from liborth_cli.methods.amount import Amount
from liborth_cli.methods.selection import PIECE, ElementBasis, select


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["density", "mass", "energy"])
def test_the_least_scores_that_reach_a_share_are_left_out(kind, dtype):
    draw = torch.Generator().manual_seed(0)
    count = PIECE + 1000  # more than one piece
    elements, scores = (torch.randn(count, generator=draw, dtype=dtype) for _ in range(2))
    scores = scores.exp() ** 8
    scores[:500], scores[500:900] = 0.0, 2.0  # ties
    weights = {"density": torch.ones(count), "mass": scores, "energy": elements.square()}[kind].double()
    for share in (0.001, 0.3, 0.9, 0.999):
        keep = select(Amount(kind, share), ElementBasis(elements), scores, (1, count), float(elements.double().square().sum()))
        order = scores.argsort(descending=True)
        reached = int((weights[order].cumsum(0) < share * weights.sum()).sum())
        assert torch.equal(keep, scores >= scores[order[reached]]), share


def test_looking_for_a_share_reads_the_scores_a_few_times(monkeypatch):
    looks = []
    real = torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda *given: looks.append(1) or real(*given))
    elements = torch.randn(1000)
    select(Amount("energy", 0.7), ElementBasis(elements), torch.rand(1000), (1, 1000), float(elements.double().square().sum()))
    assert len(looks) == 2
