"""The swept factor against elimination, entry by entry."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import operators as ops
import solvers
from solvers.preconditioners.incomplete_cholesky import IncompleteCholesky, incomplete_factor
from tests.solvers.preconditioners.problems import condition, convection, poisson, rough, sampled


def eliminated(M: np.ndarray, modified: float) -> np.ndarray:
    """Right-looking IC(0) or MIC(0), by its definition."""
    n, pattern, left, L = len(M), M != 0, M.copy(), np.zeros_like(M)
    for k in range(n):
        L[k, k] = np.sqrt(left[k, k])
        below = [i for i in range(k + 1, n) if pattern[i, k]]
        for i in below:
            L[i, k] = left[i, k] / L[k, k]
        for i in below:
            for j in below:
                if j > i:
                    continue
                update = L[i, k] * L[j, k]
                if pattern[i, j]:
                    left[i, j] -= update
                else:
                    left[i, i] -= modified * update
                    left[j, j] -= modified * update
    return L


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 15),
    density=st.floats(0.05, 0.6),
    modified=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 999),
)
def test_against_elimination(n, density, modified, seed):
    """M-matrices, on which neither breaks down."""
    rng = np.random.default_rng(seed)
    off = -np.triu(rng.random((n, n)) * (rng.random((n, n)) < density), 1)
    M = off + off.T
    M += np.diag(-M.sum(1) + 0.1 + rng.random(n))
    A = ops.Sparse(sp.csr_array(M), symmetric=True)
    L = incomplete_factor(A, IncompleteCholesky(modified=modified, rtol=0.0)).to_dense().numpy()
    np.testing.assert_allclose(L, eliminated(M, modified), rtol=1e-12, atol=1e-13)


def test_the_product_is_the_matrix_on_its_pattern():
    A = rough(9, 1.0)
    L = incomplete_factor(A, IncompleteCholesky(rtol=0.0)).to_dense()
    M = A.to_dense()
    on = M != 0
    torch.testing.assert_close((L @ L.T)[on], M[on], rtol=1e-12, atol=1e-12)
    assert (L @ L.T)[~on].abs().max() > 0.01


def test_modified_keeps_the_row_sums():
    A = rough(9, 1.0)
    L = incomplete_factor(A, IncompleteCholesky(modified=1.0, rtol=0.0)).to_dense()
    torch.testing.assert_close((L @ L.T).sum(1), A.to_dense().sum(1), rtol=1e-9, atol=1e-9)


def test_exact_without_fill():
    """Of a tridiagonal matrix the factor is the Cholesky factor, in whatever form it comes."""
    M = poisson(50).to_dense() + torch.diag(sampled(50) ** 2)
    b = sampled(50, 2, seed=1)
    for A in (ops.Sparse(M, symmetric=True), ops.Dense(M, symmetric=True)):
        P = IncompleteCholesky(rtol=0.0).prepare(A)
        torch.testing.assert_close(P @ b, torch.linalg.solve(M, b), rtol=1e-10, atol=1e-10)


def test_the_condition_number():
    """O(1 / h^2) with a smaller constant by IC(0), O(1 / h) by MIC(0)."""
    ratio = {}
    for modified in (0.0, 1.0):
        conditions = []
        for side in (12, 24):
            A = poisson(side, side)
            P = IncompleteCholesky(modified=modified).prepare(A).to_dense()
            conditions.append(condition((P + P.T) / 2, A.to_dense()))
        ratio[modified] = conditions[1] / conditions[0]
    assert ratio[0.0] > 3.2
    assert ratio[1.0] < 2.1


def test_a_breakdown_and_its_remedy():
    """Kershaw's matrix: positive definite, and IC(0) breaks down in its last row."""
    M = torch.tensor([[3.0, -2, 0, 2], [-2, 3, -2, 0], [0, -2, 3, -2], [2, 0, -2, 3]]).double()
    A = ops.Sparse(M, symmetric=True, positive_definite=True)
    with pytest.raises(solvers.NotPositiveDefiniteError, match=r"pivot of row 3 .*raise shift=0"):
        IncompleteCholesky().prepare(A)
    P = IncompleteCholesky(shift=0.5).prepare(A)
    assert torch.linalg.eigvalsh(P.to_dense())[0] > 0
    negative = ops.Sparse(torch.diag(torch.tensor([1.0, -1.0])), symmetric=True)
    with pytest.raises(solvers.NotPositiveDefiniteError, match="pivot of row 1"):
        IncompleteCholesky().prepare(negative)


def test_what_it_refuses():
    with pytest.raises(solvers.StructureError, match=r"does not claim to be: .*IncompleteLU"):
        IncompleteCholesky().prepare(convection(3, 3))
    with pytest.raises(ValueError, match=r"modified=2; expected a number from 0 to 1"):
        IncompleteCholesky(modified=2)
    with pytest.raises(ValueError, match=r"shift=-1; expected"):
        IncompleteCholesky(shift=-1)
