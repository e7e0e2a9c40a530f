"""`KLCholesky` as a preconditioner of conjugate gradients."""

from __future__ import annotations

import pickle

import pytest
import torch

import operators as ops
from solvers import CG, KLCholesky, KLPattern, kl_factor
from tests.solvers.kernel.grams import PointGram, cloud, grid, matern72, values_and_laplacians


def gram(length: float = 0.3) -> PointGram:
    points, orders = values_and_laplacians(grid(12))
    return PointGram(matern72, points, orders, length)


@pytest.mark.parametrize("ordering", ["derivatives-last", "follow"])
def test_conjugate_gradients_take_few_iterations(ordering):
    A = gram()
    dense = ops.Dense(A.to_dense(), symmetric=True)
    b = dense @ torch.sin(torch.arange(288.0, dtype=torch.float64))
    P = KLCholesky(ordering=ordering).prepare(A)
    _, info = CG(rtol=1e-8, preconditioner=P).prepare(dense).solve(b)
    assert info.converged
    assert info.iterations <= 30
    assert info.factor_nonzeros == P.factor_nonzeros == P.pattern.nnz
    _, plain = CG(rtol=1e-8, maxiter=300, stop_at_maxiter=True).prepare(dense).solve(b)
    assert not plain.converged


def test_it_is_the_inverse_that_the_factor_applies():
    A = gram()
    P = KLCholesky().prepare(A)
    v = torch.randn(288, 3, dtype=torch.float64)
    factor = kl_factor(A)
    torch.testing.assert_close(P @ v, factor.solve(v))
    torch.testing.assert_close(P.T @ v[:, 0], factor.solve(v[:, 0]))
    assert P.symmetric
    assert P.positive_definite


def test_update_keeps_the_pattern():
    P = KLCholesky().prepare(gram(0.3))
    updated = P.update(gram(0.25))
    assert updated.pattern is P.pattern
    fresh = KLCholesky().prepare(gram(0.25))
    assert fresh.pattern is P.pattern  # it is in use
    v = torch.ones(288, dtype=torch.float64)
    assert torch.equal(updated @ v, fresh @ v)
    handed = KLCholesky(pattern=P.pattern).prepare(gram(0.25))
    assert handed.pattern is P.pattern
    assert torch.equal(handed @ v, fresh @ v)


def test_conjugate_gradients_renew_it_with_the_same_pattern():
    A, B = (ops.Dense(gram(length).to_dense(), symmetric=True) for length in (0.3, 0.1))
    pattern = KLPattern.of(gram().points, gram().orders)
    prepared = CG(rtol=1e-8, preconditioner=KLCholesky(pattern=pattern)).prepare(A)
    prepared.solve(A @ torch.ones(288, dtype=torch.float64))
    updated = prepared.update(B)
    for _ in range(2):
        _, info = updated.solve(B @ torch.ones(288, dtype=torch.float64))
    assert info.converged
    assert info.refreshed
    assert updated.preconditioner.pattern is pattern


def test_a_pattern_serves_operators_without_points():
    points = cloud(60)
    A = PointGram(matern72, points, torch.zeros(60, dtype=torch.long), 0.3)
    pattern = KLPattern.of(points)
    settings = KLCholesky(pattern=pattern)
    v = torch.ones(60, dtype=torch.float64)
    dense = ops.Dense(A.to_dense(), symmetric=True)
    torch.testing.assert_close(
        settings.prepare(dense) @ v, KLCholesky().prepare(A) @ v, rtol=1e-6, atol=1e-6
    )


def test_no_derivative_goes_through_a_preconditioner():
    length = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    points, orders = values_and_laplacians(grid(4))
    P = KLCholesky().prepare(PointGram(matern72, points, orders, length))
    assert not (P @ torch.ones(32, dtype=torch.float64)).requires_grad


def test_a_copy_prepares_anew():
    P = KLCholesky(rho=2.0).prepare(gram())
    v = torch.ones(288, dtype=torch.float64)
    assert torch.equal(pickle.loads(pickle.dumps(P)) @ v, P @ v)


@pytest.mark.parametrize("name", ["rho", "supernodes", "neighbours", "nugget"])
def test_settings_out_of_range(name):
    with pytest.raises(ValueError, match=f"KLCholesky: {name}=-1"):
        KLCholesky(**{name: -1})
