"""`Triangular`: substitution, dense and sparse, both ways."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
import solvers
from solvers import SingularError, StructureError
from solvers.structured.triangular import Triangular

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
pytestmark = pytest.mark.filterwarnings("error::solvers.ConvergenceWarning")


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def triangle(n: int, lower: bool, seed: int = 0) -> Tensor:
    matrix = sampled(n, n, seed=seed)
    matrix = matrix.tril() if lower else matrix.triu()
    diagonal = matrix.diagonal()
    return matrix + torch.diag(torch.where(diagonal < 0, -2.0, 2.0))


def dense(matrix: Tensor, lower: bool) -> ops.LinearOperator:
    return ops.Dense(matrix, lower_triangular=lower, upper_triangular=not lower)


def sparse(matrix: Tensor, lower: bool) -> ops.LinearOperator:
    return ops.Sparse(matrix)  # reads it off the pattern


@PROPERTY
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 4),
    lower=st.booleans(),
    make=st.sampled_from([dense, sparse]),
    seed=st.integers(0, 999),
)
def test_backward_stable_row_by_row_both_ways(n, k, lower, make, seed):
    matrix, block = triangle(n, lower, seed), sampled(n, k, seed=seed + 1)
    prepared = Triangular().prepare(make(matrix, lower))
    for solve, M in ((prepared.solve, matrix), (prepared.solve_transpose, matrix.T)):
        x, info = solve(block)
        assert ((block - M @ x).abs() <= 1e-14 * (M.abs() @ x.abs() + block.abs())).all()
        assert info.iterations == 0


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sparse_triangle_is_scipys(lower, dtype):
    n, density = 400, 0.02
    random = np.random.default_rng(0)
    matrix = scipy.sparse.random_array((n, n), density=density, rng=random, format="csr")
    matrix = (scipy.sparse.tril if lower else scipy.sparse.triu)(matrix, -1 if lower else 1)
    matrix = scipy.sparse.csr_array(matrix + 2 * scipy.sparse.eye_array(n))
    A = ops.Sparse.from_scipy(matrix, dtype)
    prepared = Triangular().prepare(A)
    b = random.standard_normal((n, 3))
    x, info = prepared.solve(torch.from_numpy(b).to(dtype))
    expected = scipy.sparse.linalg.spsolve_triangular(matrix, b, lower=lower)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(x.double(), torch.from_numpy(expected), rtol=0, atol=tolerance)
    assert x.dtype == dtype
    assert info.backend == "SciPy"
    assert info.factor_nonzeros == A.nnz
    x = prepared.solve_transpose(torch.from_numpy(b[:, 0]).to(dtype)).value
    expected = scipy.sparse.linalg.spsolve_triangular(matrix.T.tocsr(), b[:, 0], lower=not lower)
    torch.testing.assert_close(x.double(), torch.from_numpy(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("make", [dense, sparse])
def test_no_condition_is_too_bad(make):
    """Kahan's triangle, condition 1e21: rounding enters each row as if it were alone."""
    n, c = 60, 0.6
    matrix = torch.eye(n).double() - c * torch.ones(n, n).double().triu(1)
    matrix = (1 - c**2) ** (0.5 * torch.arange(n)).double()[:, None] * matrix
    assert float(torch.linalg.cond(matrix)) > 1e15
    exact = sampled(n)
    x, info = Triangular().prepare(make(matrix, False)).solve(matrix @ exact)
    assert info.converged
    b = matrix @ exact
    assert ((b - matrix @ x).abs() <= 1e-14 * (matrix.abs() @ x.abs())).all()


@pytest.mark.parametrize("make", [dense, sparse])
@pytest.mark.parametrize("row", [0, 2, 3])
def test_a_zero_on_the_diagonal_names_the_row(make, row):
    matrix = triangle(4, True)
    matrix[row, row] = 0.0
    with pytest.raises(SingularError, match=rf"row {row} \(from 0\) has a zero on the diagonal"):
        Triangular().prepare(make(matrix, True))


def test_a_diagonal_that_is_not_stored():
    with pytest.raises(SingularError, match=r"row 1 \(from 0\)"):
        Triangular().prepare(ops.Sparse(torch.tensor([[1.0, 0.0], [3.0, 0.0]])))


def test_only_what_is_known_to_be_triangular():
    with pytest.raises(StructureError, match=r"Triangular needs a triangular operator; Dense\(2"):
        Triangular().prepare(ops.Dense(torch.eye(2)))
    with pytest.raises(StructureError, match=r"claim it \(lower_triangular=True or upper"):
        Triangular().prepare(torch.ones(2, 2))
    # Of a plain matrix it is looked up.
    x = Triangular().prepare(torch.tensor([[2.0, 2.0], [0.0, 2.0]])).solve(torch.ones(2)).value
    torch.testing.assert_close(x, torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize("make", [dense, sparse])
def test_numbers_that_are_not_finite(make):
    matrix = triangle(3, True)
    matrix[2, 0] = float("inf")
    with pytest.raises(ValueError, match=r"Triangular: .* NaN or infinite"):
        Triangular().prepare(make(matrix, True))


def test_products_of_triangles_are_triangles():
    """What the algebra knows is enough: nothing is claimed here."""
    L, M = sparse(triangle(5, True), True), dense(triangle(5, True, seed=1), True)
    b = sampled(5)
    x = Triangular().prepare(L @ M).solve(b).value
    torch.testing.assert_close(x, torch.linalg.solve(L.to_dense() @ M.to_dense(), b))


@pytest.mark.parametrize("make", [dense, sparse])
def test_differentiable(make):
    """A Cholesky factor from outside goes through, as in a Gaussian log likelihood."""
    matrix, b = triangle(4, True), sampled(4, seed=1)
    pattern = ops.Sparse(matrix).pattern

    def rebuilt(values: Tensor) -> ops.LinearOperator:
        if make is sparse:
            return ops.Sparse(values, pattern)
        places = pattern.rows * 4 + pattern.columns
        entries = values.new_zeros(16).index_put((places,), values)
        return ops.Dense(entries.reshape(4, 4), lower_triangular=True)

    def ours(values: Tensor, b: Tensor) -> Tensor:
        return solvers.solve(rebuilt(values), b, solver=Triangular()).sin().sum()

    def theirs(values: Tensor, b: Tensor) -> Tensor:
        M = torch.zeros(4, 4).double().index_put((pattern.rows, pattern.columns), values)
        return torch.linalg.solve(M, b).sin().sum()

    values = matrix[pattern.rows, pattern.columns]
    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(
            transform(ours, (0, 1))(values, b), transform(theirs, (0, 1))(values, b)
        )
