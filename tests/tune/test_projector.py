"""The projector against explicit projections of vec(U), in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liborth_cli.tune.ogd import Projector, Subspace, leading


def covariance(size, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * size, size, generator=draw, dtype=torch.float64) * torch.logspace(0, -2, size, dtype=torch.float64)
    return x.T @ x


def space(size, seed, mass):
    values, vectors = torch.linalg.eigh(covariance(size, seed))
    return leading(values, vectors, mass)


def dense(subspace):
    return subspace.right(torch.eye(subspace.size, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 9), cols=st.integers(2, 9), mass=st.floats(0.1, 0.95), seed=st.integers(0, 999))
def test_the_kronecker_form_is_the_projection_of_vec_u(rows, cols, mass, seed):
    a, g = space(cols, seed, mass), space(rows, seed + 1, mass)
    u = torch.randn(rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    explicit = np.eye(rows * cols) - np.kron(dense(g).numpy(), dense(a).numpy())
    found = u - Projector(a, g).inside(u)
    assert np.allclose(explicit @ u.numpy().reshape(-1), found.numpy().reshape(-1), atol=1e-10)
    assert Projector(a, g).leak(found) < 1e-12
    assert float(Projector(a, g).inside(found).abs().max()) < 1e-12


def test_the_input_form_leaves_every_protected_input_its_answer():
    a = space(7, 3, 0.8)
    u = torch.randn(5, 7, dtype=torch.float64)
    u = u - Projector(a).inside(u)
    x = dense(a) @ torch.randn(7, dtype=torch.float64)
    assert float((u @ x).norm()) < 1e-12
    assert Projector(a).leak(torch.outer(torch.ones(5, dtype=torch.float64), x)) == pytest.approx(1.0)


def test_leading_takes_the_fewest_directions_that_hold_the_mass():
    values, vectors = torch.tensor([1.0, 5.0, 3.0, 1.0]), torch.eye(4)
    assert [leading(values, vectors, m).rank for m in (0.0, 0.4, 0.5, 0.51, 0.8, 0.9, 1.0)] == [0, 1, 1, 2, 2, 3, 4]
    assert torch.equal(leading(values, vectors, 0.8).vectors, vectors[:, [1, 2]])


def test_a_diagonal_protects_coordinates_and_blocks_stay_blocks():
    found = leading(torch.tensor([1.0, 8.0, 1.0]), torch.empty(0), 0.8)
    assert found.axes.tolist() == [1] and found.rank == 1
    assert torch.equal(found.right(torch.ones(2, 3)), torch.tensor([[0.0, 1.0, 0.0]] * 2))
    assert torch.equal(found.left(torch.ones(3, 2)), torch.tensor([[0.0] * 2, [1.0] * 2, [0.0] * 2]))
    heads = leading(torch.tensor([[3.0, 1.0], [9.0, 0.0]]), torch.eye(2).repeat(2, 1, 1), 0.9)
    assert heads.vectors.tolist() == [[0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]


def test_free_directions_are_counted():
    whole = Subspace(3, vectors=torch.eye(3))
    assert Projector(whole).free == 0 and Projector(whole, Subspace(4, vectors=torch.eye(4)[:, :3])).free == 3
    assert Projector(Subspace(4, vectors=torch.eye(4)[:, :2]), Subspace(2, vectors=torch.eye(2)[:, :1])).protected == 0.25
