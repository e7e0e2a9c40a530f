"""`QR`: least squares of full rank, shortest solutions, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import ConvergenceWarning, SingularError
from solvers.dense.qr import QR

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
EPS = 2.2e-16


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conditioned(m: int, n: int, condition: float, seed: int = 0) -> Tensor:
    k = min(m, n)
    left, _ = torch.linalg.qr(sampled(m, k, seed=seed))
    right, _ = torch.linalg.qr(sampled(n, k, seed=seed + 1))
    return (left * torch.logspace(0, -np.log10(condition), k, dtype=torch.float64)) @ right.T


@PROPERTY
@given(m=st.integers(1, 10), n=st.integers(1, 10), k=st.integers(1, 3), seed=st.integers(0, 999))
def test_is_numpys_least_squares_both_ways(m, n, k, seed):
    matrix = sampled(m, n, seed=seed)
    prepared = QR().prepare(ops.Dense(matrix))
    assert prepared.rank == min(m, n)
    for solve, M in ((prepared.solve, matrix), (prepared.solve_transpose, matrix.T)):
        block = sampled(M.shape[0], k, seed=seed + 1)
        x, info = solve(block)
        expected = torch.from_numpy(np.linalg.lstsq(M.numpy(), block.numpy(), rcond=None)[0])
        tolerance = 1e-13 * float(torch.linalg.cond(matrix)) ** 2
        torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)
        assert info.converged


def test_a_minimum_is_where_the_residual_is_orthogonal():
    matrix, b = sampled(9, 4), sampled(9, seed=1)
    x, info = QR().prepare(ops.Dense(matrix)).solve(b)
    r = b - matrix @ x
    assert info.status == "converged"
    assert info.residual == pytest.approx(float(r.norm() / b.norm()), rel=1e-12)
    assert info.residual > 0.3  # there is no solution, and that is no failure
    assert info.normal_residual < 1e-14
    assert (matrix.T @ r).norm() < 1e-14 * r.norm() * matrix.norm()


def test_the_shortest_of_many_solutions():
    matrix, b = sampled(4, 9), sampled(4, seed=1)
    x, info = QR().prepare(ops.Dense(matrix)).solve(b)
    assert info.residual < 1e-14
    null = torch.eye(9).double() - torch.linalg.pinv(matrix) @ matrix
    assert (null @ x).norm() < 1e-13 * x.norm()


@pytest.mark.parametrize("condition", [1e4, 1e8, 1e12])
@pytest.mark.parametrize("shape", [(20, 8), (8, 8), (8, 20)], ids=str)
def test_ill_conditioned(shape, condition):
    """With b in the range the residual is small, and x as far off as the condition lets it be."""
    matrix = conditioned(*shape, condition)
    exact = matrix.T @ sampled(shape[0], seed=5)  # in the row space, so the shortest
    x, info = QR().prepare(ops.Dense(matrix)).solve(matrix @ exact)
    assert info.converged
    assert info.residual < 1e-14
    assert (x - exact).norm() <= 30 * condition * EPS * exact.norm()


def test_what_rounding_leaves_is_told():
    """An inconsistent system of condition 1e12: r is not orthogonal to the range any more."""
    matrix, b = conditioned(30, 10, 1e12), sampled(30, seed=3)
    with pytest.warns(ConvergenceWarning, match=r"inaccurate .* \|A\^T r\| / \(\|A\| \|r\|\)"):
        x, info = QR().prepare(ops.Dense(matrix)).solve(b)
    r = b - matrix @ x
    true = (matrix.T @ r).norm() / (torch.linalg.matrix_norm(matrix, 2) * r.norm())
    # Both are rounding, of one size.
    assert 0.1 * float(true) < info.normal_residual < 10 * float(true)
    assert info.normal_residual > 1e-7
    assert not info.converged
    loose = QR(rtol=1e-3).prepare(ops.Dense(matrix)).solve(b).info
    assert loose.converged


@PROPERTY
@given(
    m=st.integers(2, 10), rank=st.integers(1, 5), extra=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_low_rank_is_refused(m, rank, extra, seed):
    rank = min(rank, m - 1)
    matrix = sampled(m, rank, seed=seed) @ sampled(rank, rank + extra, seed=seed + 1)
    for M in (matrix, matrix.T):
        with pytest.raises(SingularError, match=r"does not have full rank .* use SVD"):
            QR().prepare(ops.Dense(M))


def test_the_first_dependent_column_or_row_is_named():
    columns = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0], [1.0, 2.0, 5.0], [3.0, 6.0, 1.0]])
    message = r"does not have full rank 3: column 1 \(from 0\) is a combination of those before it"
    with pytest.raises(SingularError, match=message):
        QR().prepare(ops.Dense(columns))
    with pytest.raises(SingularError, match=message.replace("column", "row")):
        QR().prepare(ops.Dense(columns.T.contiguous()))
    with pytest.raises(SingularError, match=r"column 0 \(from 0\).*torch's QR has no column pivot"):
        QR().prepare(ops.Dense(torch.zeros(3, 2)))


def test_near_dependence_is_a_matter_of_rank_rtol():
    matrix = sampled(6, 3)
    matrix[:, 2] = matrix[:, 0] + 1e-6 * matrix[:, 2]
    assert QR(rank_rtol=1e-8).prepare(ops.Dense(matrix)).rank == 3
    with pytest.raises(SingularError, match=r"column 2 \(from 0\).*up to 1e-05 of its norm"):
        QR(rank_rtol=1e-5).prepare(ops.Dense(matrix))


@pytest.mark.parametrize("shape", [(7, 3), (3, 7)], ids=str)
def test_scale_of_columns_is_no_dependence(shape):
    """Units of the unknowns (of the equations, of a wide A) do not make a rank."""
    matrix, scale = sampled(*shape), torch.tensor([1.0, 1e-60, 1e60], dtype=torch.float64)
    if shape[0] > shape[1]:
        b = sampled(7, seed=1)
        x = QR().prepare(ops.Dense(matrix * scale)).solve(b).value
        expected = torch.linalg.pinv(matrix) @ b / scale
    else:
        b = sampled(3, seed=1)
        x = QR().prepare(ops.Dense(scale[:, None] * matrix)).solve(scale * b).value
        expected = torch.linalg.pinv(matrix) @ b
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_squares_out_of_range(size):
    """Neither the rank nor the judge squares what would overflow, or vanish."""
    matrix, b = size * sampled(6, 3), sampled(6, seed=1)
    x, info = QR().prepare(ops.Dense(matrix)).solve(b)
    torch.testing.assert_close(size * x, torch.linalg.pinv(matrix / size) @ b, rtol=1e-12, atol=0)
    assert info.converged
    assert info.normal_residual < 1e-14


@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (0, 3)], ids=str)
def test_nothing_to_solve(shape):
    prepared = QR().prepare(ops.Dense(torch.zeros(shape)))
    x, info = prepared.solve(torch.ones(shape[0], 2))
    assert torch.equal(x, torch.zeros(shape[1], 2))
    assert info.converged
    assert prepared.rank == 0


def test_single_precision():
    matrix, b = sampled(8, 3).float(), sampled(8, seed=1).float()
    x, info = QR().prepare(ops.Dense(matrix)).solve(b)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), torch.linalg.pinv(matrix.double()) @ b.double())
    assert info.converged


def test_a_sparse_or_nested_operator():
    matrix, b = sampled(6, 3), sampled(6, seed=1)
    expected = torch.linalg.pinv(matrix) @ b
    x = QR().prepare(ops.Sparse(matrix)).solve(b).value
    torch.testing.assert_close(x, expected)
    y = {"a": torch.zeros(2).double(), "b": torch.zeros(()).double()}
    J = ops.Jacobian(lambda y: {"r": matrix @ torch.cat([y["a"], y["b"].reshape(1)])}, y)
    x = QR().prepare(J).solve({"r": b}).value
    torch.testing.assert_close(torch.cat([x["a"], x["b"].reshape(1)]), expected)


@pytest.mark.parametrize("value", [-1e-3, 1.0, float("nan"), float("inf")])
def test_rank_rtol_out_of_range(value):
    with pytest.raises(ValueError, match=r"QR: rank_rtol=.*; expected a number in \[0, 1\), or"):
        QR(rank_rtol=value)
