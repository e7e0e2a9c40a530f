"""`SparseLU` by SuperLU, and by UMFPACK and KLU where they are installed or played by doubles."""

from __future__ import annotations

import gc
import importlib.util
import pickle
import sys
import types
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

import operators as ops
import solvers
from solvers import MissingLibraryError, SingularError, StructureError
from solvers.sparse import superlu
from solvers.sparse.lu import SparseLU
from tests.solvers.sparse.matrices import FLOAT64, close, poisson, random_square, sampled

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
SUPERLU = SparseLU(backend="superlu")


# --- doubles of UMFPACK and KLU ------------------------------------------------------------------


class SingularWarning(Warning):
    """What scikit-sparse 0.5 warns with where a pivot is zero."""


class SingularLibraryError(Exception):
    """What it raises for structural singularity."""


def dense_of(A: Any) -> Any:
    assert A.format == "csc"
    assert A.data.dtype == np.float64
    assert A.indices.dtype == A.indptr.dtype == np.int32
    matrix = A.toarray()
    if np.linalg.matrix_rank(matrix) < len(matrix):
        warnings.warn("The matrix is singular. (code 1)", SingularWarning, stacklevel=2)
    return matrix


class UMFFactor:
    """``sksparse.umfpack.UMFFactor``."""

    def __init__(self, A: Any, control: Any = None) -> None:
        self.nnz = 2 * A.nnz

    def factorize(self, A: Any = None) -> UMFFactor:
        self.matrix = dense_of(A)
        return self

    def solve(self, b: Any, *, trans: str = "N", rhs_batch_size: int = 100) -> Any:
        matrix = {"N": self.matrix, "T": self.matrix.T}[trans]
        return np.asfortranarray(np.linalg.solve(matrix, b))

    def slogdet(self) -> Any:
        return np.linalg.slogdet(self.matrix)


class KLUFactor:
    """``sksparse.klu.KLUFactor``; transposed, right-hand sides are rows."""

    def __init__(self, A: Any, control: Any = None) -> None:
        self.nnz = 2 * A.nnz

    def factorize(self, A: Any) -> KLUFactor:
        self.matrix = dense_of(A)
        return self

    def solve(self, b: Any, *, transpose: bool = False, rhs_batch_size: int = 100) -> Any:
        length = b.shape[1] if transpose else b.shape[0]
        if length != len(self.matrix):
            raise ValueError("Right-hand side b must have compatible shape with A.")
        return (
            np.linalg.solve(self.matrix.T, b.T).T if transpose else np.linalg.solve(self.matrix, b)
        )


def module(name: str, **names: Any) -> Any:
    made: Any = types.ModuleType(name)
    made.__dict__.update(names)
    return made


@pytest.fixture
def doubles(monkeypatch) -> None:
    umfpack = module(
        "sksparse.umfpack", UMFFactor=UMFFactor, UMFPACKSingularMatrixWarning=SingularWarning,
        UMFPACKSingularMatrixError=SingularLibraryError,
    )  # fmt: skip
    klu = module("sksparse.klu", KLUFactor=KLUFactor, KLUSingularMatrixWarning=SingularWarning)
    monkeypatch.setitem(sys.modules, "scikits.umfpack", None)
    monkeypatch.setitem(sys.modules, "sksparse.umfpack", umfpack)
    monkeypatch.setitem(sys.modules, "sksparse.klu", klu)


@pytest.fixture
def nothing(monkeypatch) -> None:
    for name in ("scikits.umfpack", "sksparse.umfpack", "sksparse.klu"):
        monkeypatch.setitem(sys.modules, name, None)


def found(name: str) -> bool:
    return importlib.util.find_spec(name.split(".")[0]) is not None and (
        importlib.util.find_spec(name) is not None
    )


INSTALLED = ["superlu", *(["umfpack"] if found("scikits.umfpack") else [])]


# --- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", INSTALLED)
@PROPERTY
@given(n=st.integers(1, 12), k=st.integers(1, 9), seed=st.integers(0, 999))
def test_solutions_transposed_and_determinant(backend, n, k, seed):
    A, B = random_square(n, seed), sampled(n, k, seed=seed + 1)
    factor = SparseLU(backend=backend, strict=True).prepare(A)
    matrix = A.to_dense()
    close(factor.solve(B).value, torch.linalg.solve(matrix, B), 1e-10)
    close(factor.solve_transpose(B).value, torch.linalg.solve(matrix.T, B), 1e-10)
    close(factor.logdet(), torch.linalg.slogdet(matrix).logabsdet, 1e-8)
    info = factor.solve(B).info
    assert info.backend == {"superlu": "SuperLU", "umfpack": "UMFPACK"}[backend]
    # L, with its diagonal of ones, and U.
    assert 2 * n <= info.factor_nonzeros <= n * n + n


@pytest.mark.parametrize("backend", ["umfpack", "klu"])
def test_the_interfaces_of_scikit_sparse(doubles, backend):
    A, B = random_square(7, 3), sampled(7, 3)
    factor = SparseLU(backend=backend, strict=True).prepare(A)
    for b in (B, B[:, 0]):
        close(factor.solve(b).value, torch.linalg.solve(A.to_dense(), b), 1e-12)
        close(factor.solve_transpose(b).value, torch.linalg.solve(A.to_dense().T, b), 1e-12)
    assert factor.solve(B).info.backend == backend.upper()
    assert factor.solve(B).info.factor_nonzeros == 2 * A.nnz
    if backend == "klu":
        with pytest.raises(NotImplementedError, match="KLU does not give determinants"):
            factor.logdet()
    else:
        close(factor.logdet(), torch.linalg.slogdet(A.to_dense()).logabsdet, 1e-12)
    single = ops.Sparse(A.values.float(), A.pattern)
    assert SparseLU(backend=backend).prepare(single).solve(B.float()).value.dtype == torch.float32
    with pytest.raises(SingularError, match=rf"singular \({backend.upper()}: .* add damping"):
        SparseLU(backend=backend).prepare(ops.Sparse(torch.ones(3, 3, dtype=FLOAT64)))


def test_auto_is_umfpack_where_it_is_installed(doubles):
    assert SparseLU().prepare(random_square(3, 0)).backend == "UMFPACK"


def test_auto_is_superlu_where_it_is_not(nothing):
    assert SparseLU().prepare(random_square(3, 0)).backend == "SuperLU"


@pytest.mark.parametrize("ordering", ["colamd", "mmd_at_plus_a", "mmd_ata", "natural"])
@pytest.mark.parametrize("pivot_threshold", [1.0, 0.1, 0.0])
def test_every_ordering_and_threshold(ordering, pivot_threshold):
    A, b = random_square(20, 1), sampled(20)
    solver = SparseLU(ordering=ordering, pivot_threshold=pivot_threshold, backend="superlu")
    close(solver.prepare(A).solve(b).value, torch.linalg.solve(A.to_dense(), b), 1e-8)


def test_single_precision_stays_so():
    A = random_square(15, 2)
    b = sampled(15).float()
    factor = SUPERLU.prepare(ops.Sparse(A.values.float(), A.pattern))
    assert factor.factor._handle.L.dtype == np.float32
    x = factor.solve(b)
    assert x.value.dtype == torch.float32
    close(x.value.double(), torch.linalg.solve(A.to_dense(), b.double()), 1e-4)
    half = ops.Sparse(A.values.bfloat16(), A.pattern)
    assert SUPERLU.prepare(half).solve(b.bfloat16()).value.dtype == torch.bfloat16


def test_saddle_points_and_other_blocks():
    G = ops.Sparse(torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, 1]], dtype=FLOAT64))
    A, b = ops.Saddle(poisson(4), G), sampled(6)
    close(SUPERLU.prepare(A).solve(b).value, torch.linalg.solve(A.to_dense(), b), 1e-12)
    turned = ops.Permutation(torch.tensor([2, 0, 1]), dtype=FLOAT64)
    close(SUPERLU.prepare(turned).solve(b[:3]).value, b[:3][[1, 2, 0]], 1e-15)


@pytest.mark.parametrize("n", [0, 1])
def test_small_systems(n):
    factor = SUPERLU.prepare(ops.Sparse(-4.0 * torch.eye(n, dtype=FLOAT64)))
    close(factor.solve(torch.ones(n, 2, dtype=FLOAT64)).value, torch.full((n, 2), -0.25).double())
    assert float(factor.logdet().exp()) == pytest.approx(4.0**n)


def test_blocks_avoid_the_threads_of_blas():
    """A block goes to SuperLU under a limit of one thread; a few columns need none."""
    A, B = random_square(30, 4), sampled(30, 11)
    factor = SUPERLU.prepare(A)
    seen: list[tuple[int, bool]] = []

    def threads() -> int:
        return max(p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas")

    class Handle:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def solve(self, block: Any, trans: str) -> Any:
            seen.append((block.shape[1], threads() == usual))
            return self.handle.solve(block, trans)

    with threadpool_limits(2, user_api="blas"):
        usual = threads()
        factor.factor._handle = Handle(factor.factor._handle)
        close(factor.solve(B).value, torch.linalg.solve(A.to_dense(), B), 1e-11)
        factor.solve_transpose(B[:, :4])
        assert threads() == usual == 2
    assert seen == [(11, False), (4, True)]


# --- refusals ------------------------------------------------------------------------------------


def test_singular_matrices():
    for matrix in (torch.ones(3, 3), torch.diag(torch.tensor([1.0, 0.0, 2.0])), torch.zeros(2, 2)):
        with pytest.raises(SingularError, match=r"Sparse\(., .\) is singular.*add damping"):
            SUPERLU.prepare(ops.Sparse(matrix.double()))


def test_operators_that_do_not_suit():
    with pytest.raises(StructureError, match=r"SparseLU needs the nonzeros.*give ops\.Sparse"):
        SUPERLU.prepare(ops.Dense(torch.eye(2)))
    with pytest.raises(StructureError, match="square"):
        SUPERLU.prepare(ops.Sparse(torch.ones(2, 3)))
    with pytest.raises(ValueError, match=r"SparseLU: Sparse.* holds 1 NaN"):
        SUPERLU.prepare(ops.Sparse(torch.tensor([[1.0, torch.nan], [0.0, 1.0]])))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"ordering": "amd"}, "ordering='amd'; expected one of colamd"),
        ({"backend": "cusolver"}, "backend='cusolver'; expected one of auto"),
        ({"pivot_threshold": 1.5}, "pivot_threshold=1.5; expected a number from 0 to 1"),
        ({"pivot_threshold": float("nan")}, "pivot_threshold=nan; expected"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=f"SparseLU: {message}"):
        SparseLU(**setting)


@pytest.mark.parametrize("backend", ["umfpack", "klu"])
def test_a_library_that_is_missing(nothing, backend):
    with pytest.raises(MissingLibraryError, match=f"{backend.upper()} is not installed.*superlu"):
        SparseLU(backend=backend).prepare(random_square(3, 0))


# --- what is kept, and derivatives ---------------------------------------------------------------


def test_factors_are_freed_and_never_pickled():
    A, b = random_square(9, 5), sampled(9)
    factor = SUPERLU.prepare(A)
    other = pickle.loads(pickle.dumps(factor))
    assert other.factor is not factor.factor
    close(other.solve(b).value, factor.solve(b).value, 1e-14)
    handle = weakref.ref(factor.factor)
    del factor
    gc.collect()
    assert handle() is None


def test_an_update_is_another_factorisation():
    A, b = random_square(9, 5), sampled(9)
    factor = SUPERLU.prepare(A)
    doubled = factor.update(ops.Sparse(2 * A.values, A.pattern))
    close(doubled.solve(b).value, factor.solve(b).value / 2, 1e-13)


def test_one_factorisation_serves_value_and_gradient(monkeypatch):
    made = []
    splu = superlu.splu
    monkeypatch.setattr(superlu, "splu", lambda *a, **k: made.append(1) or splu(*a, **k))
    A, b, g = random_square(8, 6), sampled(8), sampled(8, seed=1)
    values = A.values.clone().requires_grad_()
    x = solvers.solve(ops.Sparse(values, A.pattern), b, solver=SUPERLU)
    (gradient,) = torch.autograd.grad(x @ g, values, create_graph=True)
    inverse = torch.linalg.inv(A.to_dense())
    expected = -torch.outer(inverse.T @ g, inverse @ b)[A.pattern.rows, A.pattern.columns]
    close(gradient.detach(), expected, 1e-11)
    torch.autograd.grad(gradient.sum(), values)
    assert len(made) == 1
    assert torch.autograd.gradcheck(
        lambda v: solvers.solve(ops.Sparse(v, A.pattern), b, solver=SUPERLU), values
    )


def test_the_value_of_a_determinant_has_no_silent_gradient():
    A = random_square(4, 0)
    values = A.values.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="silent zero"):
        SUPERLU.prepare(ops.Sparse(values, A.pattern)).logdet()


def test_scipy_matrices_with_indices_of_64_bits():
    rows = np.array([0, 1, 1], dtype=np.int64)
    matrix = scipy.sparse.coo_array((np.array([2.0, 1, 3]), (rows, np.array([0, 0, 1]))), (2, 2))
    x = SUPERLU.prepare(matrix.tocsc()).solve(torch.tensor([2.0, 7.0], dtype=FLOAT64)).value
    close(x, torch.tensor([1.0, 2.0], dtype=FLOAT64), 1e-15)
