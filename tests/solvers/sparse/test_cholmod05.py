"""`SparseCholesky` by the interface of scikit-sparse 0.5, which is played by a double.

The double does dense linear algebra behind the names, keywords and errors of
``sksparse.cholmod.CholeskyFactor`` 0.5.0, and has its two traps: an update with indices of another
type is wrong without a word, and the second factorisation of one object is a slow one.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

import operators as ops
from solvers import MissingLibraryError, NotPositiveDefiniteError
from solvers.sparse import analysis, cholmod
from solvers.sparse.cholesky import SparseCholesky
from tests.solvers.sparse.matrices import FLOAT64, close, poisson, random_spd, sampled


class CholmodError(Exception):
    pass


class CholmodNotPositiveDefiniteError(CholmodError):
    pass


class CholmodNotInstalledError(CholmodError):
    pass


class CholeskyFactor:
    """The double; eliminates the columns of A from the last to the first."""

    slow = 0  # factorisations of an object that had been factorised
    made = 0

    def __init__(
        self, A: Any, *, lower: bool = True, order: Any = "default", sym_kind: Any = None,
        supernodal_mode: Any = None,
    ) -> None:  # fmt: skip
        if order not in {"default", "best", "natural", "metis", "nesdis", "amd", None}:
            raise ValueError(f"Unknown ordering method: {order}.")
        if supernodal_mode not in {"auto", "simplicial", "supernodal", None}:
            raise ValueError(f"Unknown factorization mode: {supernodal_mode}.")
        if order == "metis":
            raise CholmodNotInstalledError("CHOLMOD library is not installed or not found.")
        if A.shape[0] > 0 and A.nnz == 0:
            raise CholmodNotPositiveDefiniteError("Input matrix not positive definite.")
        assert lower
        assert A.format == "csc"
        type(self).made += 1
        self.itype = A.indices.dtype
        self.perm = np.arange(A.shape[0], dtype=self.itype)[::-1].copy()
        self.pattern = A.toarray() != 0
        self.L: Any = None
        self.pivots: Any = None
        self.is_ll = True

    @property
    def is_numeric(self) -> bool:
        return self.L is not None

    @property
    def colcount(self) -> Any:
        graph = self.pattern[np.ix_(self.perm, self.perm)]
        counts = []
        for k in range(len(graph)):
            below = np.flatnonzero(graph[k + 1 :, k]) + k + 1
            graph[np.ix_(below, below)] = True
            counts.append(1 + len(below))
        return np.array(counts, dtype=self.itype)

    @property
    def nnz(self) -> Any:
        return np.sum(self.colcount)

    def get_perm(self) -> Any:
        return self.perm.copy()

    def copy(self) -> CholeskyFactor:
        other = object.__new__(CholeskyFactor)
        other.__dict__.update(self.__dict__)
        return other

    def factorize(self, A: Any, ldl: Any = None, beta: float = 0.0) -> CholeskyFactor:
        assert A.indices.dtype == self.itype, "a misleading not-positive-definite error"
        type(self).slow += self.is_numeric
        lower = np.tril(A.toarray())
        symmetric = lower + np.tril(lower, -1).T
        self._set(symmetric[np.ix_(self.perm, self.perm)])
        wrong = np.flatnonzero(self.pivots <= 0)
        if len(wrong):
            raise CholmodNotPositiveDefiniteError(
                f"Input matrix is not positive definite. (code 1) Failed at column {wrong[0]}."
            )
        self.is_ll = not ldl
        return self

    def _set(self, matrix: Any) -> None:
        n = len(matrix)
        L, d, rest = np.eye(n), np.zeros(n), matrix.copy()
        for k in range(n):
            d[k] = rest[k, k]
            if d[k] != 0:
                L[k + 1 :, k] = rest[k + 1 :, k] / d[k]
                rest[k + 1 :, k + 1 :] -= d[k] * np.outer(L[k + 1 :, k], L[k + 1 :, k])
        self.L, self.pivots = L, d

    @property
    def D(self) -> Any:
        diagonal = np.ones(len(self.L)) if self.is_ll else self.pivots
        return scipy.sparse.dia_array((diagonal[None], [0]), shape=self.L.shape)

    def solve(self, b: Any, system: str = "A") -> Any:
        if not isinstance(b, np.ndarray):
            raise ValueError("b must be an ndarray or sparse matrix.")
        if not np.can_cast(b.dtype, np.float64):
            raise TypeError("Cannot safely cast")
        assert system == "A"
        inside = np.linalg.solve(self.L, b[self.perm])
        inside = np.linalg.solve(self.L.T, inside / self.pivots[:, None])
        x = np.empty_like(b, order="F")
        x[self.perm] = inside
        return x

    def logdet(self) -> Any:
        return np.sum(np.log(self.pivots))

    def update(self, C: Any) -> CholeskyFactor:
        return self._change(C, 1.0)

    def downdate(self, C: Any) -> CholeskyFactor:
        return self._change(C, -1.0)

    def _change(self, C: Any, sign: float) -> CholeskyFactor:
        if not scipy.sparse.issparse(C):
            raise ValueError("Update matrix C is type ndarray. Expected a 1D or 2D sparse array.")
        if not self.is_numeric:
            raise CholmodError("Factor is symbolic. Call `factorize` before updating.")
        dense = C.toarray()[self.perm]
        if C.indices.dtype != self.itype:
            dense = np.roll(dense, 1, axis=0)  # indices read by halves
        self._set(self.L @ np.diag(self.pivots) @ self.L.T + sign * dense @ dense.T)
        self.is_ll = False
        return self


@pytest.fixture(autouse=True)
def double(monkeypatch) -> type[CholeskyFactor]:
    module: Any = types.ModuleType("sksparse.cholmod")
    for kind in (
        CholeskyFactor, CholmodError, CholmodNotPositiveDefiniteError, CholmodNotInstalledError
    ):  # fmt: skip
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "sksparse.cholmod", module)
    analysis.analyses.clear()
    CholeskyFactor.slow = CholeskyFactor.made = 0
    return CholeskyFactor


@pytest.mark.parametrize("mode", ["auto", "supernodal", "simplicial"])
@pytest.mark.parametrize("ordering", ["default", "amd", "natural"])
def test_answers(ordering, mode):
    for seed in range(5):
        A, B = random_spd(9, seed), sampled(9, 3, seed=seed)
        factor = SparseCholesky(ordering=ordering, mode=mode, strict=True).prepare(A)
        x, info = factor.solve(B)
        close(x, torch.linalg.solve(A.to_dense(), B), 1e-12)
        close(factor.logdet(), torch.logdet(A.to_dense()), 1e-12)
        assert info.backend == "CHOLMOD"
        assert info.factor_nonzeros == analysis.analyse(A, ordering, mode).factor_nonzeros


def test_the_template_is_never_factorised_itself(double):
    A = poisson(4, 3)
    factor = SparseCholesky().prepare(A)
    for scale in (2.0, 3.0):
        other = ops.Sparse(scale * A.values, A.pattern, symmetric=True)
        factor = factor.update(other)
        close(factor.solve(other @ torch.ones(12).double()).value, torch.ones(12).double(), 1e-12)
        SparseCholesky().prepare(other)
    assert double.slow == 0
    assert double.made == 1


def test_changes_have_the_type_of_indices_of_the_factor():
    A, b = poisson(4, 3), sampled(12)
    indices = (np.array([3, 7, 2], dtype=np.int64), np.array([0, 0, 1], dtype=np.int64))
    C = scipy.sparse.csc_array((np.array([1.0, 0.5, -2.0]), indices), shape=(12, 2))
    dense = torch.from_numpy(C.toarray())
    factor = SparseCholesky().prepare(A)
    for change in (ops.Sparse.from_scipy(C), dense):
        updated = factor.rank_update(change)
        close(updated.solve(b).value, torch.linalg.solve(A.to_dense() + dense @ dense.T, b), 1e-12)
        back = updated.rank_downdate(change)
        close(back.solve(b).value, torch.linalg.solve(A.to_dense(), b), 1e-12)
        close(back.logdet(), torch.logdet(A.to_dense()), 1e-12)
    close(factor.solve(b).value, torch.linalg.solve(A.to_dense(), b), 1e-12)


def test_large_factors_get_indices_of_64_bits(monkeypatch):
    monkeypatch.setattr(cholmod, "WIDE", 10)
    A, b, C = poisson(4, 3), sampled(12), torch.eye(12, 2, dtype=FLOAT64)
    factor = SparseCholesky().prepare(A)
    assert factor.symbolic.index == np.int64
    updated = factor.rank_update(C)
    close(updated.solve(b).value, torch.linalg.solve(A.to_dense() + C @ C.T, b), 1e-12)


def test_errors():
    damaged = poisson(4, 3).to_dense()
    damaged[7, 7] = -1.0
    with pytest.raises(NotPositiveDefiniteError, match=r"column 7 \(from 0\), .* as number 4,"):
        SparseCholesky().prepare(ops.Sparse(damaged, symmetric=True))
    with pytest.raises(NotPositiveDefiniteError, match="a pivot is not positive"):
        SparseCholesky().prepare(scipy.sparse.csr_array((3, 3), dtype=float))
    with pytest.raises(NotPositiveDefiniteError, match="pivot of column 0"):
        SparseCholesky().prepare(poisson(4)).rank_downdate(2 * torch.eye(4, 1, dtype=FLOAT64))
    with pytest.raises(MissingLibraryError, match=r"built without ordering='metis'.*use"):
        SparseCholesky(ordering="metis").prepare(poisson(4))
