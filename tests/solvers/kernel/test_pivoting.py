"""Partial pivoted Cholesky factors against dense eigenvalues and the elimination by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import operators as ops
from solvers import NotPositiveDefiniteError, StructureError, pivoted_cholesky
from tests.operators.opaque import Opaque
from tests.solvers.kernel.grams import PointGram, cloud, rbf


def kernel(n: int = 150, length: float = 0.3) -> PointGram:
    return PointGram(rbf, cloud(n), torch.zeros(n, dtype=torch.long), length)


def by_hand(matrix: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Residual and pivots of elimination with the largest diagonal, one row at a time."""
    rest, pivots = matrix.clone(), []
    for _ in range(count):
        i = int(rest.diagonal().argmax())
        rest = rest - torch.outer(rest[:, i], rest[i]) / rest[i, i]
        pivots.append(i)
    return rest, pivots


def test_one_row_at_a_time_it_is_elimination_with_the_largest_diagonal():
    A = kernel()
    found = pivoted_cholesky(A, rank=20, block_size=1)
    rest, pivots = by_hand(A.to_dense(), 20)
    assert found.pivots.tolist() == pivots
    torch.testing.assert_close(A.to_dense() - found.factor @ found.factor.T, rest)


@pytest.mark.parametrize("sampling", ["greedy", "random"])
@pytest.mark.parametrize("block_size", [1, 7, 64, 1000])
def test_the_trace_of_the_residual_is_as_asked_for(sampling, block_size):
    A = kernel()
    matrix = A.to_dense()
    found = pivoted_cholesky(A, atol=1e-6, sampling=sampling, block_size=block_size)
    rest = matrix - found.factor @ found.factor.T
    assert float(rest.trace()) <= 1.01e-6
    torch.testing.assert_close(found.residual, rest.diagonal(), rtol=0, atol=1e-13)
    assert found.weighted == pytest.approx(float(found.residual.sum()))
    assert len(set(found.pivots.tolist())) == found.rank
    # Equal in the rows of the pivots, and not many more of them than eigenvalues.
    assert float(rest[found.pivots].abs().max()) < 1e-13
    eigenvalues = torch.linalg.eigvalsh(matrix).flip(0)
    needed = int((eigenvalues.sum() - eigenvalues.cumsum(0) > 1e-6).sum()) + 1
    assert needed <= found.rank <= 1.6 * needed


def test_blocks_of_greedy_pivots_are_half_as_large_as_the_largest_at_least():
    A = kernel()
    found = pivoted_cholesky(A, rank=40, block_size=16)
    left = A.to_dense()
    for i in found.pivots.tolist():
        assert left[i, i] >= 0.49 * left.diagonal().max()
        left = left - torch.outer(left[:, i], left[i]) / left[i, i]


@pytest.mark.parametrize("block_size", [1, 3])
def test_random_pivots_have_their_distribution(block_size):
    # Of two pivots: P(i) = A_ii / tr A, then P(j | i) in proportion to the residual diagonal.
    B = torch.tensor([[2.0, 0.3, 0.0], [0.0, 1.0, 0.4], [0.2, 0.0, 1.5], [1.0, 1.0, 0.0]]).double()
    matrix = B @ B.T + 0.1 * torch.eye(4)
    A = ops.Dense(matrix, positive_semidefinite=True)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for i in range(4):
        rest = matrix - torch.outer(matrix[:, i], matrix[i]) / matrix[i, i]
        expected[i] = matrix[i, i] / matrix.trace() * rest.diagonal() / rest.trace()
    counts, runs = torch.zeros(4, 4, dtype=torch.float64), 3000
    for seed in range(runs):
        i, j = pivoted_cholesky(
            A, rank=2, sampling="random", seed=seed, block_size=block_size
        ).pivots
        counts[i, j] += 1
    error = (counts / runs - expected).abs() / (expected.clamp_min(1e-3) / runs).sqrt()
    assert float(error.max()) < 4.5


def test_it_stops_where_the_rest_is_rounding():
    B = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = pivoted_cholesky(ops.Dense(B @ B.T, positive_semidefinite=True))
    assert found.rank == 5
    assert float((found.factor @ found.factor.T - B @ B.T).abs().max()) < 1e-12
    assert pivoted_cholesky(ops.Dense(torch.zeros(3, 3), symmetric=True)).rank == 0
    assert pivoted_cholesky(ops.Dense(torch.zeros(0, 0), symmetric=True)).rank == 0


def test_weights_say_which_rows_count():
    A = kernel()
    weights = torch.where(torch.arange(150) < 75, 1e4, 1.0).double()
    found = pivoted_cholesky(A, rank=20, weights=weights, block_size=1)
    scaled = weights.sqrt()[:, None] * A.to_dense() * weights.sqrt()
    _, pivots = by_hand(scaled, 20)
    assert found.pivots.tolist() == pivots


def test_what_is_refused():
    indefinite = ops.Dense(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), symmetric=True)
    with pytest.raises(NotPositiveDefiniteError, match="row 1"):
        pivoted_cholesky(indefinite)
    with pytest.raises(StructureError, match="diagonal"):
        pivoted_cholesky(Opaque(torch.eye(3)))
    for wrong in ({"rank": 0}, {"block_size": 0}, {"atol": -1.0}, {"sampling": "uniform"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            pivoted_cholesky(kernel(5), **wrong)
    with pytest.raises(ValueError, match="weights has shape"):
        pivoted_cholesky(kernel(5), weights=torch.ones(3))
