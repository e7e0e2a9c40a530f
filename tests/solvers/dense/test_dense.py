"""`DenseCholesky` and `DenseLU`: what they refuse, and that they are direct."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import (
    ConvergenceWarning,
    DenseCholesky,
    DenseLU,
    NotPositiveDefiniteError,
    SingularError,
    StructureError,
)

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@PROPERTY
@given(n=st.integers(1, 10), k=st.integers(1, 4), seed=st.integers(0, 999))
def test_lu_is_backward_stable_both_ways(n, k, seed):
    matrix, block = sampled(n, n, seed=seed), sampled(n, k, seed=seed + 1)
    factor = DenseLU().prepare(ops.Dense(matrix))
    for solve, m in ((factor.solve, matrix), (factor.solve_transpose, matrix.T)):
        x = solve(block).value
        residual = torch.linalg.matrix_norm(block - m @ x)
        scale = torch.linalg.matrix_norm(matrix) * torch.linalg.matrix_norm(x)
        assert residual <= 1e-13 * scale


@PROPERTY
@given(n=st.integers(1, 10), seed=st.integers(0, 999))
def test_cholesky_agrees_with_lu(n, seed):
    root = sampled(n, n, seed=seed)
    A = ops.Dense(root @ root.T + torch.eye(n, dtype=torch.float64), symmetric=True)
    b = sampled(n, seed=seed + 1)
    x = DenseCholesky().prepare(A).solve(b)
    torch.testing.assert_close(x.value, DenseLU().prepare(A).solve(b).value, rtol=1e-10, atol=1e-12)
    assert x.info.iterations == 0


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_not_positive_definite_names_the_leading_minor(order):
    values = torch.ones(4)
    values[order - 1] = -1.0
    with pytest.raises(NotPositiveDefiniteError, match=rf"leading minor of order {order} is not"):
        DenseCholesky().prepare(ops.Diagonal(values))


def test_a_false_claim_of_definiteness_is_found_out():
    matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(ops.FalseClaimError, match=r"positive_definite=True.*<v, A v> = -1"):
        DenseCholesky().prepare(ops.Dense(matrix, positive_definite=True))
    A = ops.Dense(matrix, symmetric=True)
    with pytest.raises(NotPositiveDefiniteError, match=r"order 2.*add damping, or use DenseLU"):
        DenseCholesky().prepare(A)
    assert issubclass(NotPositiveDefiniteError, StructureError)
    with pytest.raises(NotPositiveDefiniteError, match="order 1"):
        DenseCholesky().prepare(ops.Dense(torch.zeros(2, 2), symmetric=True))


def test_cholesky_refuses_what_does_not_claim_symmetry():
    with pytest.raises(StructureError, match=r"needs a symmetric operator; Dense\(2, 2\) does not"):
        DenseCholesky().prepare(ops.Dense(torch.eye(2)))


@pytest.mark.parametrize(
    ("matrix", "pivot"),
    [
        ([[0.0, 0.0], [0.0, 1.0]], 1),
        ([[1.0, 2.0], [2.0, 4.0]], 2),
        ([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]], 3),
    ],
)
def test_singular(matrix, pivot):
    with pytest.raises(SingularError, match=rf"singular: pivot {pivot} of its LU is exactly zero"):
        DenseLU().prepare(ops.Dense(torch.tensor(matrix)))


def test_nearly_singular_is_told_by_the_residual_or_solved():
    """The tolerance that is asked for is judged on the true residual, for direct solvers too."""
    n = 12
    index = torch.arange(1, n + 1, dtype=torch.float64)
    hilbert = 1.0 / (index[:, None] + index[None] - 1)
    b = sampled(n)
    with pytest.warns(ConvergenceWarning, match="inaccurate after 0 iterations"):
        _, info = DenseLU(rtol=1e-14).prepare(ops.Dense(hilbert)).solve(b)
    assert not info.converged
    assert info.status == "inaccurate"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_matrices_that_are_not_finite(value):
    matrix = torch.eye(2)
    matrix[0, 0] = value
    with pytest.raises(ValueError, match=r"DenseLU: the matrix of Dense\(2, 2\) holds NaN or inf"):
        DenseLU().prepare(ops.Dense(matrix))
    with pytest.raises(ValueError, match=r"DenseCholesky: the matrix of .* holds NaN or infinite"):
        DenseCholesky().prepare(ops.Dense(matrix, symmetric=True))


@pytest.mark.parametrize("solver", [DenseLU(), DenseCholesky()])
def test_rectangles(solver):
    with pytest.raises(StructureError, match=r"needs a square operator; got Dense\(2, 3\)"):
        solver.prepare(ops.Dense(torch.zeros(2, 3)))


def test_the_operator_is_not_changed_by_its_factorisation():
    matrix = sampled(4, 4)
    before = matrix.clone()
    DenseLU().prepare(ops.Dense(matrix)).solve(sampled(4))
    assert torch.equal(matrix, before)


def test_plain_operators_get_what_torch_returns():
    """Bit for bit: one factorisation, one substitution, nothing in between."""
    root, unit = sampled(6, 6), torch.eye(6, dtype=torch.float64)[:, 2]  # its norm is exactly one
    spd = root @ root.T + torch.eye(6, dtype=torch.float64)
    spd = (spd + spd.T) / 2
    x = DenseCholesky().prepare(ops.Dense(spd, symmetric=True)).solve(unit).value
    assert torch.equal(x, torch.cholesky_solve(unit[:, None], torch.linalg.cholesky(spd))[:, 0])
    factor, (LU, pivots) = DenseLU().prepare(ops.Dense(root)), torch.linalg.lu_factor(root)
    for solve, adjoint in ((factor.solve, False), (factor.solve_transpose, True)):
        expected = torch.linalg.lu_solve(LU, pivots, unit[:, None], adjoint=adjoint)[:, 0]
        assert torch.equal(solve(unit).value, expected)


def test_transposed_solves_share_the_factor(monkeypatch):
    factor = DenseLU().prepare(ops.Dense(sampled(4, 4)))
    monkeypatch.delattr(torch.linalg, "lu_factor_ex")
    factor.solve_transpose(sampled(4))


@pytest.mark.parametrize("solver", [DenseLU(), DenseCholesky()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_that_torch_does_not_factorise(solver, dtype):
    with pytest.raises(TypeError, match=rf"{dtype}, which torch does not factorise; expected fl"):
        solver.prepare(ops.Dense(torch.eye(2, dtype=dtype), symmetric=True))
