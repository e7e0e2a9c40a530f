"""`SparseCholesky` where CHOLMOD is not installed: SuperLU, announced, with the same answers."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import operators as ops
import solvers
from solvers import MissingLibraryError, NotPositiveDefiniteError
from solvers.sparse import analysis, cholesky, cholmod
from solvers.sparse.cholesky import FallbackWarning, SparseCholesky
from tests.solvers.sparse.matrices import FLOAT64, close, poisson, random_spd, sampled

PROPERTY = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def hidden(monkeypatch) -> None:
    """No CHOLMOD, and nothing said yet; what is said is not the subject of most tests here."""
    monkeypatch.setitem(sys.modules, "sksparse.cholmod", None)
    monkeypatch.setattr(cholesky, "_said", ["said"])


def test_it_is_announced_once(monkeypatch):
    monkeypatch.setattr(cholesky, "_said", [])
    with pytest.warns(FallbackWarning, match=r"SuperLU.*pip install 'hyperlearn\[cholmod\]'"):
        SparseCholesky().prepare(poisson(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factor = SparseCholesky().prepare(poisson(5))
    # But every solution says it.
    info = factor.solve(sampled(5)).info
    assert info.backend == "SuperLU"
    assert "by SuperLU, for CHOLMOD is not installed: apt-get install libsuitesparse" in info.reason
    assert info.converged


@PROPERTY
@given(n=st.integers(1, 12), seed=st.integers(0, 999))
def test_the_same_answers(n, seed):
    A, B = random_spd(n, seed), sampled(n, 6, seed=seed)
    factor = SparseCholesky(strict=True).prepare(A)
    close(factor.solve(B).value, torch.linalg.solve(A.to_dense(), B), 1e-12)
    close(factor.logdet(), torch.logdet(A.to_dense()), 1e-12)
    assert n <= factor.factor_nonzeros - n <= n * n


@PROPERTY
@given(n=st.integers(2, 8), seed=st.integers(0, 9999))
def test_definiteness_is_read_off_the_pivots(n, seed):
    # Small integers, so that zero pivots, and pivots beside the diagonal, do occur.
    rng = np.random.default_rng(seed)
    matrix = np.where(rng.random((n, n)) < 0.4, rng.integers(-2, 3, (n, n)), 0).astype(float)
    matrix = matrix + matrix.T + np.diag(rng.integers(0, 6, n))
    A = ops.Sparse.from_scipy(scipy.sparse.csr_array(matrix), symmetric=True)
    smallest = np.linalg.eigvalsh(matrix)[0]
    if smallest > 1e-9:
        assert SparseCholesky().prepare(A).solve(sampled(n)).info.converged
    elif smallest < -1e-9:
        with pytest.raises(NotPositiveDefiniteError, match="is not positive; add damping"):
            SparseCholesky().prepare(A)


@pytest.mark.parametrize("column", [0, 13, 29])
@pytest.mark.parametrize("ordering", ["amd", "natural"])
def test_the_failing_column_is_named(column, ordering):
    damaged = poisson(6, 5).to_dense()
    damaged[column, column] = -1.0
    A = ops.Sparse(damaged, symmetric=True)
    with pytest.raises(NotPositiveDefiniteError, match=rf"pivot of column {column} \(from 0\) is"):
        SparseCholesky(ordering=ordering).prepare(A)


def test_what_needs_cholmod_says_so():
    A = poisson(4)
    assert not cholmod.available()
    for ordering in ("metis", "nesdis", "best"):
        with pytest.raises(MissingLibraryError, match=f"ordering='{ordering}', but CHOLMOD is not"):
            SparseCholesky(ordering=ordering).prepare(A)
    factor = SparseCholesky().prepare(A)
    for change in (factor.rank_update, factor.rank_downdate):
        with pytest.raises(MissingLibraryError, match=r"rank_.* needs CHOLMOD, but CHOLMOD is not"):
            change(torch.eye(4, 1, dtype=FLOAT64))
    with pytest.raises(MissingLibraryError, match="libopenblas0-pthread"):
        analysis.analyse(A)


def test_gradients_and_float32():
    A, b = random_spd(8, 3), sampled(8)
    values = A.values.clone().requires_grad_()
    operator = ops.Sparse(values, A.pattern, symmetric=True)
    x, info = solvers.solve(operator, b, solver=SparseCholesky(), return_info=True)
    (gradient,) = torch.autograd.grad(x.sum(), values)
    inverse = torch.linalg.inv(A.to_dense())
    expected = -torch.outer(inverse.sum(0), inverse @ b)[A.pattern.rows, A.pattern.columns]
    close(gradient, expected, 1e-12)
    assert info.backend == "SuperLU"
    single = SparseCholesky().prepare(poisson(30, dtype=torch.float32))
    assert single.solve(torch.ones(30)).value.dtype == torch.float32
