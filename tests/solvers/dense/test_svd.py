"""`SVD`: the pseudo-inverse, whole and cut off, and what it says of itself."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import ConvergenceWarning, NotConvergedError
from solvers.dense.qr import QR
from solvers.dense.svd import SVD

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(m: int, n: int, rank: int, seed: int = 0) -> Tensor:
    return sampled(m, rank, seed=seed) @ sampled(rank, n, seed=seed + 1)


@PROPERTY
@given(m=st.integers(1, 9), n=st.integers(1, 9), rank=st.integers(1, 9), seed=st.integers(0, 999))
def test_is_the_pseudo_inverse_both_ways(m, n, rank, seed):
    rank = min(m, n, rank)
    matrix = low_rank(m, n, rank, seed)
    prepared = SVD().prepare(ops.Dense(matrix))
    assert prepared.rank == rank
    values = torch.linalg.svdvals(matrix)
    tolerance = 1e-13 * float(values[0] / values[rank - 1]) ** 2
    for solve, M in ((prepared.solve, matrix), (prepared.solve_transpose, matrix.T)):
        block = sampled(M.shape[0], 2, seed=seed + 2)
        x, info = solve(block)
        expected = torch.linalg.pinv(M, rtol=1e-12) @ block
        torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)
        assert info.converged


@pytest.mark.parametrize("consistent", [True, False])
def test_a_singular_square_system(consistent):
    matrix = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 3.0]]).double()
    b = torch.tensor([1.0, 2.0 if consistent else 0.0, 3.0]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        x, info = SVD().prepare(ops.Dense(matrix)).solve(b)
    torch.testing.assert_close(x, torch.linalg.pinv(matrix) @ b)
    assert info.status == "converged"
    assert "kept 2 of 3 singular values" in info.reason
    assert (info.residual < 1e-14) == consistent
    assert info.normal_residual < 1e-14 or consistent


def test_truncation_is_the_nearest_matrix_of_that_rank():
    matrix, b = sampled(7, 5), sampled(7, seed=1)
    U, s, Vt = torch.linalg.svd(matrix, full_matrices=False)
    for k in range(1, 6):
        nearest = (U[:, :k] * s[:k]) @ Vt[:k]
        expected = torch.linalg.pinv(nearest, rtol=1e-12)
        for solver in (SVD(rank=k), SVD(rank_rtol=float(0.999 * s[k - 1] / s[0]))):
            prepared = solver.prepare(ops.Dense(matrix))
            assert prepared.rank == k
            torch.testing.assert_close(prepared.solve(b).value, expected @ b)
            c = sampled(5, seed=2)
            torch.testing.assert_close(prepared.solve_transpose(c).value, expected.T @ c)
    assert SVD(rank=9).prepare(ops.Dense(matrix)).rank == 5


def test_a_truncated_answer_says_so_without_a_warning():
    """It was asked for; but it does not minimise ``|b - A x|``, and nobody claims that it does."""
    matrix, b = sampled(7, 5), sampled(7, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        x, info = SVD(rank=3).prepare(ops.Dense(matrix)).solve(b)
    assert not info.converged
    assert info.status == "truncated"
    s = torch.linalg.svdvals(matrix)
    assert f"kept 3 of 5 singular values, and cut off up to {s[3] / s[0]:.3g} of the" in info.reason
    r = b - matrix @ x
    true = float((matrix.T @ r).norm() / (s[0] * r.norm()))
    assert info.normal_residual == pytest.approx(true, rel=1e-10)
    with pytest.raises(NotConvergedError, match="truncated after 0 iterations"):
        SVD(rank=3, strict=True).prepare(ops.Dense(matrix)).solve(b)
    full = QR().prepare(ops.Dense(matrix)).solve(b).value
    assert (x - full).norm() > 0.01 * full.norm()


def test_what_was_cut_off_does_not_matter_where_b_has_nothing_of_it():
    matrix = sampled(7, 5)
    U, _, _ = torch.linalg.svd(matrix, full_matrices=False)
    info = SVD(rank=3).prepare(ops.Dense(matrix)).solve(U[:, :3] @ torch.ones(3).double()).info
    assert info.converged
    assert info.status == "converged"
    assert "kept 3 of 5" in info.reason


def test_a_default_that_cuts_off_more_than_was_asked_for_is_a_warning():
    """Nobody asked for a truncation here; a tolerance that it cannot meet is not met silently."""
    matrix = torch.diag(torch.tensor([1.0, 1e-17])).double()
    with pytest.warns(ConvergenceWarning, match="truncated.*raise rank or lower rank_rtol"):
        info = SVD(rtol=1e-18).prepare(ops.Dense(matrix)).solve(torch.ones(2).double()).info
    assert not info.converged
    x = SVD(rank_rtol=0.0).prepare(ops.Dense(matrix)).solve(torch.ones(2).double()).value
    torch.testing.assert_close(x, torch.tensor([1.0, 1e17]).double())


def test_the_pseudo_inverse_of_zero_is_zero():
    for matrix in (torch.zeros(3, 2), torch.zeros(2, 2)):
        prepared = SVD().prepare(ops.Dense(matrix))
        x, info = prepared.solve(torch.ones(len(matrix)))
        assert torch.equal(x, torch.zeros(2))
        assert prepared.rank == 0
        assert info.converged  # every x is a minimiser
        assert info.residual == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (0, 3)], ids=str)
def test_nothing_to_solve(shape):
    x, info = SVD().prepare(ops.Dense(torch.zeros(shape))).solve(torch.ones(shape[0], 2))
    assert torch.equal(x, torch.zeros(shape[1], 2))
    assert info.converged


@pytest.mark.parametrize("condition", [1e4, 1e8, 1e12])
@pytest.mark.parametrize("shape", [(20, 8), (8, 8), (8, 20)], ids=str)
def test_ill_conditioned(shape, condition):
    k = min(shape)
    left, right = (torch.linalg.qr(sampled(s, k, seed=i))[0] for i, s in enumerate(shape))
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), k, dtype=torch.float64)
    matrix = (left * values) @ right.T
    exact = matrix.T @ sampled(shape[0], seed=5)
    prepared = SVD().prepare(ops.Dense(matrix))
    x, info = prepared.solve(matrix @ exact)
    assert prepared.rank == k
    assert info.converged
    assert (x - exact).norm() <= 30 * condition * 2.2e-16 * exact.norm()


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_sizes_at_the_ends_of_the_range(size):
    matrix, b = size * low_rank(6, 3, 2), sampled(6, seed=1)
    prepared = SVD().prepare(ops.Dense(matrix))
    x, info = prepared.solve(b)
    assert prepared.rank == 2
    expected = torch.linalg.pinv(matrix / size, rtol=1e-12) @ b
    torch.testing.assert_close(size * x, expected, rtol=1e-11, atol=0)
    assert info.converged


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"SVD: rank=0; expected at least 1, or None"),
        ({"rank_rtol": -1.0}, r"SVD: rank_rtol=-1.0; expected a number in \[0, 1\), or None"),
        ({"rank_rtol": 1.0}, r"SVD: rank_rtol=1.0; expected a number in \[0, 1\), or None"),
        ({"rank_rtol": float("nan")}, r"SVD: rank_rtol=nan; expected"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SVD(**settings)
