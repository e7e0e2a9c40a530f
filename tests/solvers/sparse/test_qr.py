"""`SparseQR` by SuiteSparseQR: by a double of scikit-sparse 0.5, and sparseqr if installed."""

from __future__ import annotations

import gc
import importlib.util
import pickle
import sys
import types
import weakref
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import operators as ops
import solvers
from solvers import MissingLibraryError, StructureError
from solvers.sparse.qr import SparseQR
from tests.solvers.sparse.matrices import FLOAT64, close, sampled

PROPERTY = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class SPQRFactor:
    """``sksparse.spqr.SPQRFactor`` of 0.5.0, by dense algebra; R without pivoting."""

    def __init__(self, A: Any, *, use_singletons: bool = False, order: Any = None) -> None:
        if order not in {None, "default", "colamd", "amd", "metis", "best"}:
            raise ValueError(f"Unknown ordering method: {order}.")
        assert A.format == "csc"
        self.shape, self.matrix = A.shape, None

    def factorize(self, A: Any, *, tol: Any = None) -> SPQRFactor:
        self.matrix = A.toarray()
        self.rank = int(np.linalg.matrix_rank(self.matrix))
        self.Q, self.R = np.linalg.qr(self.matrix)
        return self

    def solve(self, b: Any, *, transpose: bool = False, rhs_batch_size: int = 100) -> Any:
        m, n = self.shape
        if b.shape[0] != (n if transpose else m):
            raise ValueError("Right-hand side b must have compatible shape with A.")
        if transpose:
            return self.Q @ scipy.linalg.solve_triangular(self.R, b, trans="T")
        return scipy.linalg.solve_triangular(self.R, self.Q.T @ b)


LIBRARIES = ["double", *(["sparseqr"] if importlib.util.find_spec("sparseqr") else [])]


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch) -> str:
    if request.param == "double":
        module: Any = types.ModuleType("sksparse.spqr")
        module.SPQRFactor = SPQRFactor
        monkeypatch.setitem(sys.modules, "sksparse.spqr", module)
    else:
        monkeypatch.setitem(sys.modules, "sksparse.spqr", None)
    return request.param


def random_tall(m: int, n: int, seed: int) -> ops.Sparse:
    """Of full rank."""
    matrix = sampled(m, n, seed=seed) * (sampled(m, n, seed=seed + 1) > 0.5)
    return ops.Sparse(matrix + 3 * torch.eye(m, n, dtype=FLOAT64))


@PROPERTY
@given(n=st.integers(1, 8), more=st.integers(0, 5), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_least_squares_both_ways_and_transposed(library, n, more, k, seed):
    tall = random_tall(n + more, n, seed)
    inverse = torch.linalg.pinv(tall.to_dense())
    b, c = sampled(n + more, k, seed=seed), sampled(n, k, seed=seed)
    for A in (tall, tall.T):
        factor = SparseQR(strict=True).prepare(A)
        assert factor.rank == n
        assert factor.backend == "SuiteSparseQR"
        least, shortest = (
            (factor.solve, factor.solve_transpose)
            if A is tall
            else (factor.solve_transpose, factor.solve)
        )
        close(least(b).value, inverse @ b, 1e-9)
        close(shortest(c).value, inverse.T @ c, 1e-9)


@pytest.mark.parametrize("ordering", ["default", "colamd", "amd", "metis", "best"])
def test_every_ordering(library, ordering):
    A, b = random_tall(30, 10, 3), sampled(30)
    x, info = SparseQR(ordering=ordering).prepare(A).solve(b)
    close(x, torch.linalg.lstsq(A.to_dense(), b[:, None]).solution[:, 0], 1e-11)
    assert info.normal_residual < 1e-13
    assert info.residual > 0.1


def test_it_is_as_accurate_as_the_condition_number_allows(library):
    # The Cholesky factor of A^T A, whose condition is 1e14, would leave no digit but two or three.
    scales = torch.logspace(0, -7, 8, dtype=FLOAT64)
    A = ops.Sparse(random_tall(20, 8, 5).to_dense() * scales)
    x = torch.ones(8, dtype=FLOAT64) / scales
    close(SparseQR().prepare(A).solve(A @ x).value, x, 1e-7)


def test_a_rank_that_is_not_full(library):
    matrix = torch.zeros(6, 3, dtype=FLOAT64)
    matrix[:, 0], matrix[:, 1] = 1.0, 2.0
    matrix[2, 2] = 1.0
    for A in (ops.Sparse(matrix), ops.Sparse(matrix.T.contiguous())):
        with pytest.raises(StructureError, match=r"has rank 2: .* full rank 3; use LSMR"):
            SparseQR().prepare(A)
    with pytest.raises(StructureError, match="has rank 0"):
        SparseQR().prepare(ops.Sparse(torch.zeros(2, 1)))


@pytest.mark.parametrize("shape", [(3, 0), (0, 0), (0, 2)])
def test_no_unknowns_or_no_equations(library, shape):
    m, n = shape
    factor = SparseQR().prepare(ops.Sparse(torch.zeros(m, n, dtype=FLOAT64)))
    close(factor.solve(torch.ones(m, 2, dtype=FLOAT64)).value, torch.zeros(n, 2, dtype=FLOAT64))
    close(factor.solve_transpose(torch.ones(n, dtype=FLOAT64)).value, torch.zeros(m).double())


def test_derivatives(library):
    A, b = random_tall(7, 4, 2), sampled(7)

    def solution(values, b):
        return solvers.solve(ops.Sparse(values, A.pattern), b, solver=SparseQR())

    moving = (A.values.clone().requires_grad_(), b.requires_grad_())
    assert torch.autograd.gradcheck(solution, moving)
    got = torch.autograd.grad(solution(*moving).square().sum(), moving)
    dense = torch.linalg.pinv(ops.Sparse(moving[0], A.pattern).to_dense()) @ moving[1]
    for one, other in zip(got, torch.autograd.grad(dense.square().sum(), moving), strict=True):
        close(one, other, 1e-9)


def test_other_dtypes_pickles_and_the_end_of_a_factor(library):
    A, b = random_tall(9, 4, 1), sampled(9)
    factor = SparseQR().prepare(A)
    single = SparseQR().prepare(ops.Sparse(A.values.float(), A.pattern)).solve(b.float()).value
    assert single.dtype == torch.float32
    close(single.double(), factor.solve(b).value, 1e-5)
    close(pickle.loads(pickle.dumps(factor)).solve(b).value, factor.solve(b).value, 1e-14)
    handle = weakref.ref(factor.factor)
    del factor
    gc.collect()
    assert handle() is None


def test_a_library_that_is_missing(monkeypatch):
    for name in ("sksparse.spqr", "sparseqr"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingLibraryError, match=r"install sparseqr .* or use LSMR"):
        SparseQR().prepare(random_tall(4, 2, 0))


def test_what_does_not_suit(library):
    with pytest.raises(StructureError, match="SparseQR needs the nonzeros"):
        SparseQR().prepare(ops.Dense(torch.ones(3, 2)))
    with pytest.raises(ValueError, match=r"SparseQR: Sparse.* holds 1 NaN"):
        SparseQR().prepare(ops.Sparse(torch.tensor([[1.0], [torch.inf]])))
    with pytest.raises(ValueError, match="SparseQR: ordering='rcm'; expected one of default"):
        SparseQR(ordering="rcm")
