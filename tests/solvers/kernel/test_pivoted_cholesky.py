"""`PivotedCholesky` as a preconditioner, on Gram matrices with tiny nuggets."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

import operators as ops
from solvers import CG, PivotedCholesky, StructureError
from solvers.kernel.pivoted_cholesky import split_diagonal
from tests.solvers.kernel.grams import PointGram, cloud, rbf


@cache
def elliptic() -> tuple[ops.Dense, Tensor]:
    """Gram matrix of ``-Lap + 3 u^2`` at 900 points and values at 300 of the boundary, and data.

    Of unit diagonal; Gaussian kernel of length 0.2, and the u of Chen et al. with factor 4.
    """
    inside = cloud(900, seed=3)
    t, zero = cloud(300, 1, seed=4)[:, 0], torch.zeros(75, dtype=torch.float64)
    sides = [(t[:75], zero), (t[75:150], zero + 1), (zero, t[150:225]), (zero + 1, t[225:])]
    points = torch.cat([inside, *(torch.stack(side, 1) for side in sides)])
    waves = [torch.sin(k * math.pi * inside).prod(1) for k in (1, 4)]
    u = waves[0] + 4 * waves[1]
    data = 2 * math.pi**2 * (waves[0] + 64 * waves[1]) + 3 * u**3
    values = torch.cat([3 * u**2, torch.ones(300, dtype=torch.float64)])
    laplacians = torch.cat([-torch.ones(900), torch.zeros(300)]).double()
    r = (points[:, None] - points).square().sum(-1).sqrt()
    zeroth, first, second = rbf(r, torch.tensor(0.2, dtype=torch.float64), 2)
    mixed = torch.outer(values, laplacians)
    K = torch.outer(values, values) * zeroth + (mixed + mixed.T) * first
    K = K + torch.outer(laplacians, laplacians) * second
    scale = K.diagonal().rsqrt()
    K = scale[:, None] * K * scale
    b = scale * torch.cat([data, torch.zeros(300, dtype=torch.float64)])
    return ops.Dense((K + K.T) / 2, positive_semidefinite=True), b


@pytest.mark.parametrize("sampling", ["greedy", "random"])
@pytest.mark.parametrize("eta", [1e-6, 1e-8, 1e-10, 1e-12])
def test_few_iterations_at_any_nugget(eta, sampling):
    K, b = elliptic()
    A = K + eta * ops.Identity(1200)
    P = PivotedCholesky(sampling=sampling).prepare(A)
    _, info = CG(rtol=1e-8, preconditioner=P).prepare(A).solve(b)
    assert info.converged
    assert info.iterations <= 10
    assert P.rank < 420
    assert P.factor_nonzeros == 1200 * P.rank == info.factor_nonzeros


def test_rank_300_is_enough_at_1e_10():
    K, b = elliptic()
    A = K + 1e-10 * ops.Identity(1200)
    _, info = CG(rtol=1e-8, preconditioner=PivotedCholesky(rank=300)).prepare(A).solve(b)
    assert info.converged
    assert info.iterations <= 10


def problem() -> tuple[PointGram, Tensor]:
    return PointGram(rbf, cloud(80), torch.zeros(80, dtype=torch.long), 0.5), torch.ones(
        80
    ).double()


@pytest.mark.parametrize("eta", [1e-4, 1e-8, 1e-12])
def test_it_is_the_inverse_of_low_rank_plus_diagonal(eta):
    K, _ = problem()
    d = eta * torch.linspace(0.5, 2, 80, dtype=torch.float64)
    P = PivotedCholesky(rank=15).prepare(K + ops.Diagonal(d))
    pivots = P.pivots
    # The factor by its definition: columns of K through the inverse of the block of the pivots.
    column = K.to_dense()[:, pivots]
    root = torch.linalg.cholesky(column[pivots])
    L = torch.linalg.solve_triangular(root, column.T, upper=False).T
    # P L L^T + P D = I, applied to what each part is large on.
    v = L @ torch.randn(15, 4, dtype=torch.float64)
    image = P @ (L @ (L.T @ v) + d[:, None] * v)
    # A product with A leaves errors of rounding that P divides by eta.
    assert (image - v).norm() <= (1e-5 + 80 * 2.2e-16 / eta) * v.norm()
    # Outside the range of L it is D^-1 all but exactly.
    basis = torch.linalg.qr(L / d.sqrt()[:, None]).Q
    w = torch.randn(80, 4, dtype=torch.float64)
    w = w - basis @ (basis.T @ w)
    expected = w / d.sqrt()[:, None]
    torch.testing.assert_close(
        P @ (d.sqrt()[:, None] * w), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())
    )
    dense = P.to_dense()
    torch.testing.assert_close(dense, dense.T, rtol=0, atol=1e-12 * float(dense.abs().max()))
    assert P.symmetric
    assert P.positive_definite


def test_the_eigenvalues_of_what_is_preconditioned_are_bounded_by_the_trace_left():
    K, _ = problem()
    A = K + 1e-6 * ops.Identity(80)
    P = PivotedCholesky(rank=20, rtol=1e-14).prepare
    with pytest.warns(RuntimeWarning, match="rank 20"):
        P = P(A)
    eigenvalues = torch.linalg.eigvals(P @ A.to_dense()).real
    assert float(eigenvalues.min()) >= 1 - 1e-6
    assert float(eigenvalues.max()) <= 1 + P.residual_trace + 1e-6
    assert P.residual_trace > 0.1


def test_the_diagonal_is_found_or_told():
    K, v = problem()
    eta = 1e-3
    of_sum = PivotedCholesky().prepare(K + eta * ops.Identity(80))
    for other in (
        PivotedCholesky().prepare(ops.Diagonal(torch.full((80,), eta).double()) + K),
        PivotedCholesky().prepare(2.0 * (0.5 * K + eta / 2 * ops.Identity(80))),
        PivotedCholesky(damping=eta).prepare(
            ops.Dense(K.to_dense() + eta * torch.eye(80).double(), symmetric=True)
        ),
    ):
        torch.testing.assert_close(other @ v, of_sum @ v, rtol=1e-3, atol=1e-3)
    diagonal = PivotedCholesky().prepare(ops.Diagonal(torch.full((80,), 2.0).double()))
    torch.testing.assert_close(diagonal @ v, v / 2)
    assert diagonal.rank == 0


def test_split_diagonal():
    K = problem()[0]
    matrix, d = K.to_dense(), torch.linspace(1, 2, 80, dtype=torch.float64)
    A = 2.0 * (K + ops.Diagonal(d)) + (3.0 * ops.Identity(80) + 0.5 * K)
    rest, found = split_diagonal(A)
    torch.testing.assert_close(found, 2 * d + 3)
    torch.testing.assert_close(rest.to_dense(), 2.5 * matrix)
    assert split_diagonal(K) == (K, None)


def test_float32():
    K, v = problem()
    A = ops.Dense(K.to_dense().float(), positive_semidefinite=True) + 1e-3 * ops.Identity(80)
    _, info = CG(preconditioner=PivotedCholesky()).prepare(A).solve(v.float())
    assert info.converged
    assert info.iterations <= 5


def test_what_is_refused():
    K, _ = problem()
    with pytest.raises(StructureError, match="shows no diagonal"):
        PivotedCholesky().prepare(K)
    with pytest.raises(StructureError, match="not positive"):
        PivotedCholesky().prepare(K + ops.Diagonal(torch.zeros(80).double()))
    with pytest.raises(StructureError, match="does not claim"):
        PivotedCholesky().prepare(ops.Dense(torch.randn(3, 3)))
    for wrong in (
        {"rank": 0},
        {"rtol": 1.0},
        {"damping": 0.0},
        {"block_size": 0},
        {"sampling": "uniform"},
    ):
        with pytest.raises(ValueError, match=f"PivotedCholesky: {next(iter(wrong))}="):
            PivotedCholesky(**wrong)
