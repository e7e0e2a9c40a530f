"""Triangular systems, against those of scipy.linalg."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers.sparse.substitution import Substitution


def triangle(matrix: np.ndarray, lower: bool, scale: float) -> np.ndarray:
    strict = np.tril(matrix, -1) if lower else np.triu(matrix, 1)
    return strict + scale * np.diag(np.diag(matrix))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 30),
    columns=st.integers(0, 5),
    density=st.floats(0, 1),
    lower=st.booleans(),
    scale=st.sampled_from([1.0, 0.6]),
    wide=st.booleans(),
    long=st.booleans(),
    seed=st.integers(0, 99),
)
def test_against_scipy(n, columns, density, lower, scale, wide, long, seed):
    rng = np.random.default_rng(seed)
    dtype = np.float64 if wide else np.float32
    dense = (rng.uniform(-1, 1, (n, n)) * (rng.random((n, n)) < density)).astype(dtype)
    dense[np.arange(n), np.arange(n)] = n + rng.random(n)
    matrix = sp.csr_array(dense)
    if long:
        matrix.indices, matrix.indptr = matrix.indices.astype("i8"), matrix.indptr.astype("i8")
    b = rng.standard_normal((n, columns) if columns else n).astype(dtype)
    before = b.copy()
    x = Substitution(matrix, lower=lower, scale=scale)(b)
    expected = scipy.linalg.solve_triangular(triangle(dense, lower, scale), b, lower=lower)
    np.testing.assert_allclose(x, expected, rtol=1e-12 if wide else 1e-4, atol=1e-12)
    assert x.dtype == dtype
    assert np.array_equal(b, before)


@pytest.mark.parametrize("lower", [True, False])
def test_unit_is_what_is_left_of_the_diagonal(lower):
    rng = np.random.default_rng(0)
    dense = rng.uniform(-1, 1, (9, 9)) + 9 * np.eye(9)
    b = np.asfortranarray(rng.standard_normal((18, 3)))[::2]
    solve = Substitution(sp.csr_array(dense), lower=lower)
    np.testing.assert_allclose(solve.unit(b), solve(np.diag(dense)[:, None] * b), rtol=1e-13)


def test_rows_without_a_diagonal_are_left_out():
    dense = np.array([[2.0, 0, 0], [0, 0, 0], [4.0, 0, 8.0]])
    x = Substitution(sp.csr_array(dense), lower=True)(np.array([2.0, 5.0, 12.0]))
    assert x.tolist() == [1.0, 0.0, 1.0]
