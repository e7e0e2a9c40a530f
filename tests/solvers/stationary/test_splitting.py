"""Triangular sweeps against triangular solves of dense algebra, sparse and dense alike."""

from __future__ import annotations

import math

import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import SingularError, StructureError
from solvers.stationary.splitting import Splitting

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def sparse_matrix(n: int, seed: int) -> Tensor:
    """Not symmetric, a third of it filled, its diagonal away from zero with both signs."""
    matrix = sampled(n, n, seed=seed) * (sampled(n, n, seed=seed + 1000) > 0.4)
    d = sampled(n, seed=seed + 2000)
    return matrix - torch.diag(matrix.diag()) + torch.diag(d + d.sign())


@PROPERTY
@given(
    n=st.integers(1, 12), k=st.integers(1, 3), omega=st.floats(0.2, 1.9), seed=st.integers(0, 99)
)
def test_both_sweeps_solve_with_the_triangle(n, k, omega, seed):
    matrix, V = sparse_matrix(n, seed), sampled(n, k, seed=seed + 3000)
    lower = matrix.tril(-1) + torch.diag(matrix.diag() / omega)
    upper = matrix.triu(1) + torch.diag(matrix.diag() / omega)
    for A in (ops.Sparse(matrix), ops.Dense(matrix)):
        split = Splitting(A, omega)
        pairs = [
            (split.forward(V), lower),
            (split.backward(V), lower.T),
            (split.upper.backward(V), upper),
            (split.upper.forward(V), upper.T),
        ]
        for x, M in pairs:
            # Backward error: triangular solves have a tiny one, however ill-conditioned M is.
            scale = torch.linalg.matrix_norm(M) * x.norm(dim=0) + V.norm(dim=0)
            assert ((M @ x - V).norm(dim=0) <= 1e-13 * scale).all()
        torch.testing.assert_close(split.diagonal, matrix.diag(), rtol=0, atol=0)


def test_no_pivot_is_taken_off_the_diagonal():
    """Entries below the diagonal 1e8 times as large; SuperLU would like to exchange rows."""
    matrix = torch.tensor([[1e-8, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1e-8]], dtype=FLOAT64)
    V = torch.tensor([[1e-8], [2.0], [1.0]], dtype=FLOAT64)
    x = Splitting(ops.Sparse(matrix)).forward(V)
    torch.testing.assert_close(x, torch.tensor([[1.0], [1.0], [-1e8]]).double())


def test_a_symmetric_operator_needs_one_triangle():
    A = ops.Sparse(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), symmetric=True)
    split = Splitting(A)
    assert split.upper is split
    assert split.upper.upper is split


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("cls", [ops.Sparse, ops.Dense])
def test_keeps_the_dtype(dtype, cls):
    A = cls(torch.tensor([[2.0, 5.0], [1.0, 4.0]], dtype=dtype))
    V = torch.tensor([[2.0, 4.0], [9.0, 6.0]], dtype=dtype)
    for x in (Splitting(A).forward(V), Splitting(A).backward(V.T)):
        assert x.dtype == dtype
    torch.testing.assert_close(
        Splitting(A).forward(V), torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=dtype)
    )


def test_indices_of_64_bits_and_blocks_that_are_not_contiguous():
    wide = scipy.sparse.csr_array(sparse_matrix(9, 0).numpy())
    wide.indices, wide.indptr = wide.indices.astype("int64"), wide.indptr.astype("int64")
    split, V = Splitting(ops.Sparse(wide)), sampled(3, 9).T
    assert not V.is_contiguous()
    torch.testing.assert_close(split.forward(V), split.forward(V.contiguous()), rtol=0, atol=0)


def test_other_operators_are_formed():
    A = ops.Dense(sparse_matrix(5, 1)) + 2.0 * ops.Identity(5)
    V = sampled(5, 1)
    torch.testing.assert_close(
        Splitting(A).forward(V), torch.linalg.solve_triangular(A.to_dense().tril(), V, upper=False)
    )


@pytest.mark.parametrize("cls", [ops.Sparse, ops.Dense])
def test_what_cannot_be_split(cls):
    with pytest.raises(SingularError, match=r"entry 1 on the diagonal .* is zero \(1 in all\)"):
        Splitting(cls(torch.tensor([[1.0, 2.0], [2.0, 0.0]])))
    with pytest.raises(StructureError, match="square"):
        Splitting(cls(torch.ones(2, 3)))
    with pytest.raises(ValueError, match="NaN or infinite"):
        Splitting(cls(torch.tensor([[1.0, math.nan], [2.0, 1.0]])))
    with pytest.raises(TypeError, match=r"bfloat16.*float32"):
        Splitting(cls(torch.eye(2, dtype=torch.bfloat16)))


@pytest.mark.parametrize("cls", [ops.Sparse, ops.Dense])
def test_nothing_at_all(cls):
    assert Splitting(cls(torch.zeros(0, 0))).forward(torch.zeros(0, 2)).shape == (0, 2)
    assert Splitting(cls(torch.eye(3))).backward(torch.zeros(3, 0)).shape == (3, 0)
