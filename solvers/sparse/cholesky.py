"""`SparseCholesky`: direct solution of sparse symmetric positive definite systems by CHOLMOD."""

from __future__ import annotations

import math
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from operators import LinearOperator, Sparse
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.matrix import numbers
from solvers.members import Members
from solvers.solution import (
    MissingLibraryError,
    NotPositiveDefiniteError,
    SingularError,
    StructureError,
)
from solvers.sparse import cholmod
from solvers.sparse.analysis import symbolic_of
from solvers.sparse.cholmod import Factor, Mode, NotDefinite, Ordering, Symbolic
from solvers.sparse.low_rank_change import columns_of, csc_of_columns, with_gram
from solvers.sparse.matrix import csc_of, not_tracked, solved, sparse_of
from solvers.sparse.superlu import SuperLU
from solvers.threads import one_blas_thread

# Claims that a factorisation, and one look at the entries, prove or refute.
PROVED = ("symmetric", "positive_semidefinite", "positive_definite")
# Flops up to which one thread of BLAS is as fast as several, which, moreover, spin for 30 ms when
# they are done, and take the processors from what comes next.
FEW = 5e7


class FallbackWarning(UserWarning):
    """A back-end is not installed, and a slower one does its work."""


@dataclass(frozen=True, kw_only=True)
class SparseCholesky(LinearSolver):
    """``P A P^T = L L^T`` of a sparse symmetric positive definite operator, by CHOLMOD.

    For an operator that holds its nonzeros: `operators.Sparse`, and what is made of such (sums,
    multiples, block diagonals, Kronecker sums). The ordering and the elimination tree depend on the
    pattern alone: they are kept as long as the `operators.Pattern` lives, for every later `prepare`
    and `update` and for the members of a batch.

    Parameters
    ----------
    ordering
        Fill-reducing ordering: ``"amd"`` (approximate minimum degree), ``"metis"`` or ``"nesdis"``
        (nested dissection), ``"natural"`` (none), ``"best"`` (which of nine leaves least fill).
        ``"default"`` is CHOLMOD's rule: AMD, and METIS too where AMD leaves at least five nonzeros
        in L for one of A and 500 flops for one of L, as on grids in space.
    mode
        ``"supernodal"`` (dense blocks, by BLAS), ``"simplicial"`` (column by column), or
        ``"auto"``: supernodal from 40 flops for a nonzero of L on.
    rtol, atol, strict
        As for `LinearSolver`.

    Notes
    -----
    On a grid of n points in the plane L has ``O(n log n)`` nonzeros and costs ``O(n^1.5)`` flops;
    in space ``O(n^(4/3))`` and ``O(n^2)``. A solve takes 4 flops for a nonzero of L, and is bound
    by memory for one right-hand side: solve blocks. CHOLMOD calculates in float64 on the CPU:
    operators of other dtypes, and on other devices, are copied there, and solutions back.

    Where CHOLMOD is not installed SuperLU factorises instead, in its symmetric mode: the same
    answers, several times slower (`FallbackWarning`, once, and ``info.backend``).

    Chen, Davis, Hager and Rajamanickam, 2008, doi:10.1145/1391989.1391995.

    Examples
    --------
    >>> import scipy.sparse, torch
    >>> line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(3, 3))
    >>> factor = SparseCholesky().prepare(line)
    >>> x = factor.solve(torch.ones(3, dtype=torch.float64)).value
    >>> torch.allclose(x, torch.tensor([1.5, 2.0, 1.5], dtype=torch.float64))
    True
    >>> round(float(factor.logdet().exp()), 10)
    4.0
    """

    ordering: Ordering = "default"
    mode: Mode = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("ordering", get_args(Ordering)), ("mode", get_args(Mode))):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"SparseCholesky: {name}={value!r}; expected one of {', '.join(allowed)}"
                )

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Analyse and factorise.

        Raises
        ------
        StructureError
            A is not known to be symmetric, or does not hold its nonzeros.
        ValueError
            A holds NaN or infinite values.
        NotPositiveDefiniteError
            A pivot is not positive; its column is named.
        MissingLibraryError
            CHOLMOD was built without the ordering.
        """
        return PreparedCholesky(self, A)


class PreparedCholesky(PreparedSolver):
    """A sparse Cholesky factorisation; besides `solve`, determinants and low-rank changes of A."""

    solver: SparseCholesky

    def __init__(
        self, solver: SparseCholesky, A: LinearOperator, like: PreparedCholesky | None = None
    ) -> None:
        super().__init__(solver, A)
        if not A.symmetric:
            raise StructureError(
                f"SparseCholesky needs a symmetric operator; {A!r} does not claim to be: claim it, "
                "or use SparseLU"
            )
        sparse = sparse_of(A, "SparseCholesky")
        self.pattern = sparse.pattern
        self.symbolic: Symbolic | None = None
        # What `rank_update` and `rank_downdate` have changed since, and of what, for a pickle.
        self._changes: tuple[tuple[Tensor | Sparse, bool], ...] = ()
        self._original: LinearOperator | None = None
        self._detail = ""
        matrix = csc_of(sparse, "SparseCholesky", torch.float64, symmetric=True)
        self._hold(self._factorised(matrix, like))

    def _check_claims(self, A: LinearOperator) -> None:
        # The factorisation finds out about definiteness, and to compare the mirror entries costs
        # less than products.
        if type(A) is Sparse and {*A._claims} <= {*PROVED}:
            if A._claims:
                A._compare_mirrors()
        else:
            super()._check_claims(A)

    def _hold(self, factor: Factor | SuperLU | None) -> None:
        self.factor = factor
        self.factor_nonzeros = 0 if factor is None else factor.nonzeros
        self.backend = SuperLU.name if isinstance(factor, SuperLU) else "CHOLMOD"

    def _factorised(self, matrix: Any, like: PreparedCholesky | None) -> Factor | SuperLU | None:
        """The factor; None for no unknowns."""
        if not matrix.shape[0]:
            return None
        if not cholmod.available():
            self._detail = _announced()
            return self._by_superlu(matrix)
        try:
            if like is not None and like.symbolic is not None and like.pattern == self.pattern:
                self.symbolic = like.symbolic
            else:
                settings = self.solver.ordering, self.solver.mode
                self.symbolic = symbolic_of(self.pattern, matrix, *settings)
            with _threads(self.symbolic.flops or math.inf):
                return self.symbolic.factorize(matrix)
        except NotDefinite as error:
            raise self._indefinite(error.position) from None

    def _by_superlu(self, matrix: Any) -> SuperLU:
        ordering = self.solver.ordering
        if ordering in ("metis", "nesdis", "best"):
            raise MissingLibraryError(
                f"SparseCholesky: ordering={ordering!r}, but {cholmod.INSTALL}"
            )
        try:
            factor = SuperLU(
                matrix,
                "natural" if ordering == "natural" else "mmd_at_plus_a",
                0.0,
                symmetric=True,
            )
        except SingularError:
            raise self._indefinite(None) from None
        column = factor.first_wrong_pivot()
        if column is not None:
            raise self._indefinite(None, column)
        return factor

    def _indefinite(
        self, position: int | None, column: int | None = None
    ) -> NotPositiveDefiniteError:
        """The error that names the column, or the one that is eliminated at a position."""
        if position is not None and self.symbolic is not None:
            column = int(self.symbolic.permutation[position])
        where = "a pivot" if column is None else f"the pivot of column {column} (from 0)"
        if position is not None:
            where += f", which is eliminated as number {position},"
        return NotPositiveDefiniteError(
            f"{self.A!r} is not positive definite: {where} is not positive; add damping, as "
            "A + 1e-3 * Identity, or use SparseLU"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        original = self.given if self._original is None else self._original
        return _replayed, (self.solver, original, self._changes)

    def _update(self, A: LinearOperator) -> PreparedSolver:
        if isinstance(A, Members):
            return self.solver._prepared(A)
        return PreparedCholesky(self.solver, A, self)

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        factor, n = self.factor, block.shape[0]
        if factor is None:
            return block, Progress(detail=self._detail)
        with _threads(4.0 * (factor.nonzeros or 0) * (block.shape[1] - 1)):
            x = solved(factor.solve, block, torch.float64, n)
        return x, Progress(detail=self._detail)

    def logdet(self) -> Tensor:
        """``log det A``, a scalar of the dtype and on the device of A.

        Raises
        ------
        NotImplementedError
            A tensor of A is being differentiated: the derivative, ``A^-1`` at the nonzeros of A, is
            not computed here.
        """
        not_tracked(self.given, "logdet")
        value = 0.0 if self.factor is None else self.factor.logdet()
        return torch.tensor(value, dtype=self.A.dtype, device=self.A.device)

    def rank_update(self, C: Tensor | Sparse) -> PreparedCholesky:
        """The solver prepared for ``A + C C^T``, without factorising anew.

        Parameters
        ----------
        C
            ``(n, k)``, dense or sparse; its zeros are not used.

        Returns
        -------
        PreparedCholesky
            Another object: this one stays as it is.

        Raises
        ------
        ValueError
            C has another number of rows, or holds NaN or infinite values.
        TypeError
            C is neither, or of another dtype or device than A.
        MissingLibraryError
            CHOLMOD is not installed.

        Notes
        -----
        A copy of L, and then ``O(sum_j |L_:j|)`` over the columns j that are reached in the
        elimination tree from the nonzeros of C, for each column of C (Davis and Hager, 1999,
        doi:10.1137/S0895479897321076). The first change of a supernodal factor makes it simplicial,
        ``L D L^T``. Places that A did not have fill in: for a C that is full, factorise anew.
        Solutions are differentiable with respect to C too.
        """
        return self._changed(C, "rank_update", subtract=False)

    def rank_downdate(self, C: Tensor | Sparse) -> PreparedCholesky:
        """The solver prepared for ``A - C C^T``; see `rank_update`.

        Raises
        ------
        NotPositiveDefiniteError
            ``A - C C^T`` is not positive definite.
        """
        return self._changed(C, "rank_downdate", subtract=True)

    def _changed(self, C: Tensor | Sparse, where: str, *, subtract: bool) -> PreparedCholesky:
        start, factor = time.perf_counter(), self.factor
        change = columns_of(C, where, self.A)
        if isinstance(factor, SuperLU):
            raise MissingLibraryError(f"{where} needs CHOLMOD, but {cholmod.INSTALL}")
        changed = object.__new__(PreparedCholesky)
        plain = numbers(change, where)
        PreparedSolver.__init__(changed, self.solver, with_gram(self.A, plain, subtract))
        changed.given = with_gram(self.given, change, subtract)
        changed.pattern, changed.symbolic = self.pattern, self.symbolic
        changed._changes = (*self._changes, (C, subtract))
        changed._original = self.given if self._original is None else self._original
        changed._detail = self._detail
        if factor is not None:
            try:
                factor = factor.updated(csc_of_columns(plain, where), subtract=subtract)
            except NotDefinite as error:
                raise changed._indefinite(error.position) from None
        changed._hold(factor)
        changed.setup_seconds = time.perf_counter() - start
        return changed


def _replayed(
    solver: SparseCholesky,
    A: LinearOperator,
    changes: tuple[tuple[Tensor | Sparse, bool], ...],
) -> PreparedSolver:
    """Prepared anew, and changed as it had been."""
    prepared = solver.prepare(A)
    for C, subtract in changes:
        assert isinstance(prepared, PreparedCholesky)
        prepared = prepared.rank_downdate(C) if subtract else prepared.rank_update(C)
    return prepared


_said: list[str] = []


def _threads(flops: float) -> AbstractContextManager[object]:
    return one_blas_thread() if flops <= FEW else nullcontext()


def _announced() -> str:
    """Say once in a process who does the work, and return it for every solution."""
    if not _said:
        _said.append(cholmod.INSTALL)
        warnings.warn(
            f"SparseCholesky factorises by SuperLU, several times slower, for {cholmod.INSTALL}",
            FallbackWarning,
            stacklevel=2,
        )
    return f"by SuperLU, for {cholmod.INSTALL}"
