"""`SparseQR`: sparse least squares by SuiteSparseQR."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from operators import LinearOperator
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.solution import MissingLibraryError, StructureError
from solvers.sparse.matrix import Array, csc_of, solved, sparse_of
from solvers.sparse.suitesparse_lu import installed

Ordering = Literal["default", "colamd", "amd", "metis", "best"]

# Systems that SuiteSparseQR solves: E R^-1 B, and R^-T E^T B.
BACK, FORWARD = 1, 3
# Products: Q^T B, and Q B.
ADJOINT, DIRECT = 0, 1


@dataclass(frozen=True, kw_only=True)
class SparseQR(LinearSolver):
    """``A E = Q R`` of an operator of full rank that holds its nonzeros, by SuiteSparseQR.

    x minimises ``|b - A x|``; where A is wide it is the shortest solution of ``A x = b``. Both, and
    their transposes, come from one factorisation: that of whichever of A and A^T is tall.

    Parameters
    ----------
    ordering
        Of the columns: ``"colamd"``, ``"amd"`` or ``"metis"`` of ``A^T A``, ``"best"`` of these, or
        SuiteSparseQR's ``"default"``.
    rtol, atol, strict
        As for `LinearSolver`.

    Notes
    -----
    R is the Cholesky factor of ``A^T A``, but computed to an accuracy that its condition number,
    not the square of it, limits; Q is held as Householder vectors. In float64 on the CPU. Needs the
    package ``sparseqr``, or scikit-sparse 0.5. Columns are found dependent where what is left of
    them is below ``20 (m + n) eps max_j |A_:j|``: where one is, the shortest solution is one for
    `LSMR`.

    Davis, 2011, doi:10.1145/2049662.2049670.
    """

    least_squares: ClassVar[bool] = True

    ordering: Ordering = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ordering not in get_args(Ordering):
            raise ValueError(
                f"SparseQR: ordering={self.ordering!r}; expected one of "
                f"{', '.join(get_args(Ordering))}"
            )

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Factorise.

        Raises
        ------
        StructureError
            A does not hold its nonzeros, or does not have full rank.
        ValueError
            A holds NaN or infinite values.
        MissingLibraryError
            SuiteSparseQR is not installed.
        """
        return _PreparedQR(self, A)


class _PreparedQR(PreparedSolver):
    backend = "SuiteSparseQR"

    def __init__(self, solver: SparseQR, A: LinearOperator) -> None:
        super().__init__(solver, A)
        self.tall = A.shape[0] >= A.shape[1]
        sparse = sparse_of(A if self.tall else A.T, "SparseQR")
        n = sparse.shape[1]
        matrix = csc_of(sparse, "SparseQR", torch.float64)
        self.factor: QRFactor | None = None
        self.rank = 0
        if n and matrix.nnz:
            self.factor = _factorised(matrix, solver.ordering)
            self.rank = self.factor.rank
        if self.rank < n:
            raise StructureError(
                f"{A!r} has rank {self.rank}: SparseQR solves least squares of full rank {n}; use "
                "LSMR for the shortest solution, or add damping, as rows sqrt(l) I"
            )

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._through(block, forward=not self.tall)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._through(block, forward=self.tall)

    def _through(self, block: Tensor, *, forward: bool) -> tuple[Tensor, Progress]:
        """The minimiser by the tall matrix, or, `forward`, the shortest solution by its adjoint."""
        rows = max(self.A.shape) if forward else min(self.A.shape)
        factor = self.factor
        if factor is None:
            return block.new_zeros(rows, block.shape[1]), Progress()
        solve = factor.shortest if forward else factor.least
        return solved(solve, block, torch.float64, rows), Progress()


class QRFactor(Protocol):
    """``T E = Q R`` of a tall matrix T."""

    rank: int

    def least(self, block: Array) -> Array:
        """``T^+ B = E R^-1 Q^T B``."""

    def shortest(self, block: Array) -> Array:
        """``(T^T)^+ B = Q R^-T E^T B``."""


def _factorised(matrix: Any, ordering: Ordering) -> QRFactor:
    library = installed("sksparse.spqr", "sparseqr")
    if library is None:
        raise MissingLibraryError(
            "SuiteSparseQR is not installed: apt-get install libsuitesparse-dev, then pip install "
            "sparseqr (or scikit-sparse>=0.5, for SuiteSparse 7.4 and later); or use LSMR, or "
            "SparseCholesky on A.T @ A where the condition number of A is moderate"
        )
    kind = _BySksparse if hasattr(library, "SPQRFactor") else _BySparseqr
    return kind(library, matrix, ordering)


class _BySksparse:
    """SuiteSparseQR by scikit-sparse 0.5."""

    def __init__(self, library: Any, matrix: Any, ordering: Ordering) -> None:
        self._handle = library.SPQRFactor(matrix, order=ordering).factorize(matrix)
        self.rank = int(self._handle.rank)

    def least(self, block: Array) -> Array:
        x: Array = self._handle.solve(np.asfortranarray(block))
        return x

    def shortest(self, block: Array) -> Array:
        x: Array = self._handle.solve(np.asfortranarray(block), transpose=True)
        return x


class _BySparseqr:
    """SuiteSparseQR by the package sparseqr, through the C functions that it binds."""

    def __init__(self, library: Any, matrix: Any, ordering: Ordering) -> None:
        self._binding = binding = installed("sparseqr.sparseqr")
        self._shape = matrix.shape
        C = binding.lib
        code = getattr(C, f"SPQR_ORDERING_{ordering.upper()}")
        held = binding.scipy2cholmodsparse(matrix)
        self._factor = C.SuiteSparseQR_C_factorize(code, C.SPQR_DEFAULT_TOL, held, binding.cc)
        binding.cholmod_free_sparse(held)
        if self._factor == binding.ffi.NULL:
            raise MemoryError(f"SuiteSparseQR could not factorise a matrix of shape {self._shape}")
        address = binding.ffi.new("SuiteSparseQR_C_factorization **", self._factor)
        weakref.finalize(self, C.SuiteSparseQR_C_free, address, binding.cc)
        # Of a column that it found dependent the entry of a solution is exactly zero.
        probe = np.random.default_rng(0).standard_normal((self._shape[0], 1))
        self.rank = int(np.count_nonzero(self.least(probe)))

    def least(self, block: Array) -> Array:
        return self._solved(BACK, self._times(ADJOINT, block))

    def shortest(self, block: Array) -> Array:
        return self._times(DIRECT, self._solved(FORWARD, block))

    def _times(self, method: int, block: Array) -> Array:
        return self._called(self._binding.lib.SuiteSparseQR_C_qmult, method, block)

    def _solved(self, system: int, block: Array) -> Array:
        return self._called(self._binding.lib.SuiteSparseQR_C_solve, system, block)

    def _called(self, function: Any, code: int, block: Array) -> Array:
        """A C function of a code, the factor and a dense matrix."""
        binding, (rows, columns) = self._binding, block.shape
        C, ffi = binding.lib, binding.ffi
        given = C.cholmod_l_allocate_dense(rows, columns, rows, C.CHOLMOD_REAL, binding.cc)
        _array(ffi, given, rows, columns)[:] = block
        result = function(code, self._factor, given, binding.cc)
        binding.cholmod_free_dense(given)
        if result == ffi.NULL:
            raise MemoryError(f"SuiteSparseQR failed on a block of shape {block.shape}")
        x = _array(ffi, result, int(result.nrow), columns).copy()
        binding.cholmod_free_dense(result)
        return x


def _array(ffi: Any, dense: Any, rows: int, columns: int) -> Array:
    """A view of a ``cholmod_dense``, whose columns lie one after the other."""
    numbers = np.frombuffer(ffi.buffer(dense.x, 8 * rows * columns), dtype=np.float64)
    return numbers.reshape(rows, columns, order="F")
