"""Sums of Kronecker products: several forget sets, and matrices that are used twice."""

import pytest
import torch
from test_contract import covariance, factors, layer_of, rotated_factors, rotation, update

from liborth_cli.curvature.layer import KroneckerFactors
from liborth_cli.errors import BadInput
from liborth_cli.methods import Amount
from liborth_cli.methods.kronecker import SummedFactors, terms_of, unit
from liborth_cli.split import SplitOptions, split_matrix

SHAPE, STRENGTH, DAMPING = (6, 7), 0.5, 1e-2


def kept(u, retain, forget, strength=STRENGTH, hard=False, **settings):
    layer = layer_of(u, retain=retain)
    layer.forget = tuple(forget)
    amount = Amount("strength", strength, hard)
    return split_matrix(layer, SplitOptions("contrastive", amount, settings=settings))[0]


def dense(parts, damping=0.0):
    """Σ share·(G + δ) ⊗ (A + δ) for vec by rows, every factor at mean eigenvalue 1."""
    total = 0
    for term in terms_of(parts):
        g, a = (unit(m) if m.dim() == 2 else torch.diag(unit(m)) for m in (term.output, term.input))
        total = total + term.share * torch.kron(g + damping * torch.eye(len(g)), a + damping * torch.eye(len(a)))
    return total


def objective(x, u, retain, forget):
    d = (x - u).reshape(-1)
    return (d @ dense(retain, DAMPING) @ d + STRENGTH * sum(x.reshape(-1) @ dense(f) @ x.reshape(-1) for f in forget)).item()


def minimiser(u, retain, forget):
    r = dense(retain, DAMPING)
    return torch.linalg.solve(r + STRENGTH * sum(dense(f) for f in forget), r @ u.reshape(-1)).view_as(u)


def merged(forget, nearest):
    """One Kronecker product in place of a sum: the mean of each side, or the nearest product (Van Loan & Pitsianis 1993)."""
    g, a = ([unit(getattr(f, side)) for f in forget] for side in ("gradient_covariance", "input_covariance"))
    if not nearest:
        return KroneckerFactors("w", "w", None, False, 1.0, ("w",), sum(a), sum(g))
    left, _, right = torch.linalg.svd(torch.stack([m.reshape(-1) for m in g]).T @ torch.stack([m.reshape(-1) for m in a]))
    a_near, g_near = right[0].view(len(a[0]), -1), left[:, 0].view(len(g[0]), -1)
    return KroneckerFactors("w", "w", None, False, 1.0, ("w",), a_near * a_near.trace().sign(), g_near * g_near.trace().sign())


def excess(x, u, retain, forget):
    """By how much the objective misses its minimum, as a share of what there is to gain over leaving U."""
    best = objective(minimiser(u, retain, forget), u, retain, forget)
    return (objective(x, u, retain, forget) - best) / (objective(u, u, retain, forget) - best)


def narrow(seed):
    """Data that live in a few directions, as a handful of secrets do."""
    f = factors(SHAPE, seed)
    a, g = (torch.linalg.matrix_power(m, 3) for m in (f.input_covariance, f.gradient_covariance))
    return KroneckerFactors("w", "w", None, False, 1.0, ("w",), a, g)


def test_two_forget_sets_come_close_to_the_minimum():
    """A sum of products is no product; the corrected diagonal gets nearer to the minimum than one merged product does."""
    ours, mean, nearest = [], [], []
    for seed in range(8):
        u, r = update(SHAPE, seed).double(), factors(SHAPE, 100 * seed + 1)
        forget = [narrow(100 * seed + 31), narrow(100 * seed + 61)]
        ours.append(excess(kept(u, r, forget), u, r, forget))
        for found, near in ((mean, False), (nearest, True)):
            found.append(excess(kept(u, r, [merged(forget, near)], 2 * STRENGTH), u, r, forget))
    assert min(ours) >= 0
    assert max(ours) < 0.15
    assert sum(ours) < sum(mean)
    assert sum(ours) < sum(nearest)


def test_one_set_is_the_exact_minimiser():
    u, r, f = update(SHAPE).double(), factors(SHAPE, 1), factors(SHAPE, 31)
    assert torch.allclose(kept(u, r, [f]), minimiser(u, r, [f]), atol=1e-9)


def test_sets_that_commute_are_exact():
    """Share the eigenvectors, and the sum is diagonal in the basis: nothing is approximated."""
    q_a, q_g, u = rotation(7, 1), rotation(6, 2), update(SHAPE).double()
    draw = torch.Generator().manual_seed(0)

    def of(seed):
        a, g = (torch.rand(n, generator=draw, dtype=torch.float64) + 0.05 for n in (7, 6))
        return KroneckerFactors("w", "w", None, False, 1.0, ("w",), (q_a * a) @ q_a.T, (q_g * g) @ q_g.T)

    r, forget = of(0), [of(1), of(2), of(3)]
    assert torch.allclose(kept(u, r, forget), minimiser(u, r, forget), atol=1e-8)


def test_the_same_set_twice_is_a_double_dose():
    u, r, f = update(SHAPE).double(), factors(SHAPE, 1), factors(SHAPE, 31)
    assert torch.allclose(kept(u, r, [f, f]), kept(u, r, [f], 2 * STRENGTH), atol=1e-9)


@pytest.mark.parametrize("hard", [False, True])
def test_several_sets_commute_with_rotations(hard):
    u, r, forget = update(SHAPE).double(), factors(SHAPE, 1), [factors(SHAPE, 31), factors(SHAPE, 61)]
    left, right = rotation(6, 5), rotation(7, 6)
    turned = kept(left @ u @ right.T, rotated_factors(r, left, right), [rotated_factors(f, left, right) for f in forget],
                  hard=hard)  # fmt: skip
    assert torch.allclose(turned, left @ kept(u, r, forget, hard=hard) @ right.T, atol=1e-8)


def test_a_tied_matrix_is_both_of_its_uses():
    """Embedding: tokens by frequency. Head: tokens by the diagonal of G. The curvature is the sum of both."""
    u, draw = update((9, 5)).double(), torch.Generator().manual_seed(3)

    def tied(seed):
        table, head = (KroneckerFactors("w", "w", None, False, 1.0, ("w",), covariance(5, seed + k),
                                        torch.rand(9, generator=draw, dtype=torch.float64)) for k in (0, 1))  # fmt: skip
        return SummedFactors.of([table, head])

    r, f = tied(1), tied(51)
    result = kept(u, r, [f])
    assert excess(result, u, r, [f]) < 0.1
    assert 0.05 < ((u - result).norm() / u.norm()).item() < 1
    trace = sum(p.input_covariance.trace() * p.gradient_covariance.sum() for p in r.parts)
    assert r.curvature().sum().item() == pytest.approx(trace.item()), "the trace of the sum is that of the terms"
    assert (r.input_covariance.trace() * r.gradient_covariance.sum()).item() == pytest.approx(trace.item())


def test_one_side_alone_is_its_formula():
    u, r, f = update(SHAPE).double(), factors(SHAPE, 1), factors(SHAPE, 31)
    a_r, a_f = unit(r.input_covariance) + DAMPING * torch.eye(7), unit(f.input_covariance)
    assert torch.allclose(kept(u, r, [f], sides="input"), u @ a_r @ torch.linalg.inv(a_r + STRENGTH * a_f), atol=1e-9)
    g_r, g_f = unit(r.gradient_covariance) + DAMPING * torch.eye(6), unit(f.gradient_covariance)
    expected = torch.linalg.inv(g_r + STRENGTH * g_f) @ g_r @ u
    assert torch.allclose(kept(u, r, [f], sides="output"), expected, atol=1e-9)


def test_more_damping_removes_less_where_retain_data_feel_little():
    u, r, f = update(SHAPE).double(), factors(SHAPE, 1), factors(SHAPE, 31)
    removed = [(u - kept(u, r, [f], damping=d)).norm().item() for d in (1e-6, 1e-2, 1e2)]
    assert removed[2] < 1e-2 * removed[1] < 1e-2 * 2 * removed[0]


def test_a_hard_cut_is_an_orthogonal_projection():
    """Near-singular factors make the filter's own coordinates oblique; a cut along them kept a thousand times U's energy."""
    sharp = KroneckerFactors("w", "w", None, False, 1.0, ("w",), *(covariance(n, n) @ covariance(n, n) for n in (7, 6)))
    u, f = update(SHAPE).double(), factors(SHAPE, 31)
    for strength in (1e-4, 1e-2, 1.0):
        part = kept(u, sharp, [f], strength, hard=True)
        assert torch.allclose(kept(part, sharp, [f], strength, hard=True), part, atol=1e-9)
        assert torch.dot(part.reshape(-1), (u - part).reshape(-1)).item() == pytest.approx(0, abs=1e-9)


def test_hard_and_soft_cut_the_same_ratios():
    u, r, f = update(SHAPE).double(), factors(SHAPE, 1), factors(SHAPE, 31)
    assert torch.allclose(kept(u, r, [f], 1e-9, hard=True), u)
    assert kept(u, r, [f], 1e9, hard=True).norm() < 1e-9
    commuting = KroneckerFactors("w", "w", None, False, 1.0, ("w",), torch.eye(7).double(), torch.eye(6).double())
    values = layer_of(u, retain=commuting)
    values.forget = (f,)
    soft = SplitOptions("contrastive", Amount("strength", 0.5)).rule.basis(values, Amount("strength", 0.5))
    expected = soft.rebuild(soft.ratios * 0.5 < 1)  # type: ignore[attr-defined]
    assert torch.allclose(kept(u, commuting, [f], hard=True), expected, atol=1e-9), "nothing is oblique against the identity"


def test_forms_that_differ_are_refused():
    u, r = update(SHAPE).double(), factors(SHAPE, 1)
    other = KroneckerFactors("w", "w", None, False, 1.0, ("w",), covariance(7, 2), covariance(6, 3).diagonal().clone())
    with pytest.raises(BadInput, match="different forms"):
        kept(u, r, [other])
