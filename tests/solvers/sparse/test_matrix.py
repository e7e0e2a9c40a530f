"""Operators as sparse matrices: every class that holds its nonzeros, against its dense form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import operators as ops
from operators import LinearOperator
from solvers import StructureError
from solvers.sparse.matrix import csc_of, nonzeros_of, sparse_of
from tests.solvers.sparse.matrices import FLOAT64, poisson, random_square, sampled

S, P, LINE = random_square(4, 0), poisson(4), poisson(3)
EYE = ops.Identity(4, FLOAT64)
G = ops.Sparse(torch.tensor([[1.0, 0, 2, 0], [0, 0, 3, 4], [5, 0, 0, 0]], dtype=FLOAT64))
ORDER = ops.Permutation(torch.tensor([2, 0, 3, 1]), dtype=FLOAT64)
HELD: dict[str, LinearOperator] = {
    "sparse": S,
    "transposed": S.T,
    "identity": EYE,
    "diagonal": ops.Diagonal(sampled(4)),
    "permutation": ORDER,
    "multiple of a block": -2.0 * ops.BlockDiagonal(LINE, EYE),
    "sum": ops.BlockDiagonal(LINE, 2.0 * ops.Identity(1, FLOAT64)) + P + 0.5 * ops.Identity(4),
    "difference": ops.Kronecker(P, LINE) - 3.0 * ops.Identity(12),
    "product": ops.BlockDiagonal(LINE, ops.Identity(1, FLOAT64)) @ S,
    "permuted": ORDER @ S,
    "gram": ops.Gram(G),
    "weighted gram": ops.Gram(G, LINE),
    "gram of blocks": ops.Gram(ops.BlockDiagonal(G, LINE)),
    "block diagonal": ops.BlockDiagonal(S, G, EYE),
    "nested blocks": ops.BlockDiagonal(ops.BlockDiagonal(S, LINE), ORDER),
    "block": ops.Block([[S, G.T, None], [None, LINE, G]]),
    "saddle": ops.Saddle(P, G),
    "regularised saddle": ops.Saddle(P, G, LINE),
    "kronecker": ops.Kronecker(S, G, LINE),
    "kronecker of blocks": ops.Kronecker(ops.BlockDiagonal(LINE, EYE), G),
    "kronecker sum": ops.KroneckerSum(S, LINE, P),
}


@pytest.mark.parametrize("name", list(HELD))
def test_the_matrix_is_that_of_the_operator(name):
    A = HELD[name]
    sparse = sparse_of(A, "test")
    assert torch.equal(sparse.to_dense(), A.to_dense())
    matrix = csc_of(sparse, "test", FLOAT64)
    np.testing.assert_array_equal(matrix.toarray(), A.to_dense().numpy())
    assert matrix.indices.dtype == matrix.indptr.dtype == np.int32
    if A.symmetric:
        mirrored = csc_of(sparse, "test", FLOAT64, symmetric=True)
        np.testing.assert_array_equal(mirrored.toarray(), A.to_dense().numpy())


@pytest.mark.parametrize(
    "A",
    [
        ops.Dense(torch.eye(4)),
        ops.BlockDiagonal(S, ops.Dense(torch.eye(2, dtype=FLOAT64))),
        ops.Block([[S, None], [ops.Dense(torch.eye(4, dtype=FLOAT64)), S]]),
        ops.KroneckerSum(S, ops.Dense(torch.eye(2, dtype=FLOAT64))),
        ops.LowRankPlusDiagonal(torch.ones(1, 3), 1.0),
        S + ops.Dense(torch.eye(4, dtype=FLOAT64)),
    ],
    ids=repr,
)
def test_what_does_not_hold_its_nonzeros(A):
    assert nonzeros_of(A) is None
    with pytest.raises(StructureError, match=r"Solver needs the nonzeros of a matrix.*ops\.Sparse"):
        sparse_of(A, "Solver")


def test_values_that_are_not_finite():
    values = P.values.clone()
    values[3] = torch.inf
    with pytest.raises(ValueError, match=r"test: Sparse.* holds 1 NaN or infinite values"):
        csc_of(ops.Sparse(values, P.pattern), "test", FLOAT64)
