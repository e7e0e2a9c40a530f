"""`SparseLU`: direct solution of sparse square systems by SuperLU, UMFPACK or KLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.solution import SingularError
from solvers.sparse.matrix import csc_of, not_tracked, solved, sparse_of
from solvers.sparse.suitesparse_lu import KLU, LUFactor, installed, umfpack
from solvers.sparse.superlu import Ordering, SuperLU

Backend = Literal["auto", "superlu", "umfpack", "klu"]


@dataclass(frozen=True, kw_only=True)
class SparseLU(LinearSolver):
    """``P_r A P_c = L U`` with pivoting, of any square operator that holds its nonzeros.

    For `operators.Sparse`, and what is made of such (sums, blocks and saddle points, Kronecker
    sums). One factorisation solves with A and with its transpose.

    Parameters
    ----------
    ordering
        SuperLU's ordering of the columns: ``"colamd"``, ``"mmd_at_plus_a"`` (minimum degree, for
        patterns that are nearly symmetric), ``"mmd_ata"`` or ``"natural"``. UMFPACK and KLU choose
        themselves.
    pivot_threshold
        SuperLU takes a diagonal entry as the pivot where it is at least this fraction of the
        largest of its column: 1 is partial pivoting; smaller values keep a good ordering, at the
        price of larger factors in size.
    backend
        ``"superlu"``, which comes with scipy; ``"umfpack"``; ``"klu"``; or ``"auto"``: UMFPACK
        where it is installed, else SuperLU.
    rtol, atol, strict
        As for `LinearSolver`.

    Notes
    -----
    SuperLU takes 12 to 20 times as long as CHOLMOD on grids in space: where A is positive definite
    use `SparseCholesky`. It calculates in the operator's dtype, float32 or float64; UMFPACK and KLU
    in float64. All of them on the CPU: operators elsewhere are copied there, and solutions back.
    An analysis of the pattern is not kept, for scipy offers none apart.

    SuperLU: Demmel, Eisenstat, Gilbert, Li and Liu, 1999, doi:10.1137/S0895479895291765. UMFPACK:
    Davis, 2004, doi:10.1145/992200.992206. KLU: Davis and Palamadai Natarajan, 2010,
    doi:10.1145/1824801.1824814.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Sparse(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    >>> factor = SparseLU().prepare(A)
    >>> factor.solve(torch.tensor([2.0, 3.0])).value
    tensor([3., 1.])
    >>> factor.solve_transpose(torch.tensor([2.0, 3.0])).value
    tensor([1.5000, 2.0000])
    """

    ordering: Ordering = "colamd"
    pivot_threshold: float = 1.0
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("ordering", get_args(Ordering)), ("backend", get_args(Backend))):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"SparseLU: {name}={value!r}; expected one of {', '.join(allowed)}"
                )
        if not 0 <= self.pivot_threshold <= 1:
            raise ValueError(
                f"SparseLU: pivot_threshold={self.pivot_threshold}; expected a number from 0 to 1"
            )

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Factorise.

        Raises
        ------
        StructureError
            A does not hold its nonzeros.
        ValueError
            A holds NaN or infinite values.
        SingularError
            A pivot is exactly zero.
        MissingLibraryError
            The back-end is not installed.
        """
        return PreparedLU(self, A)


class PreparedLU(PreparedSolver):
    """A sparse LU factorisation; besides `solve`, the determinant."""

    solver: SparseLU
    factor: LUFactor | None = None

    def __init__(self, solver: SparseLU, A: LinearOperator) -> None:
        super().__init__(solver, A)
        backend = solver.backend
        if backend == "auto":
            found = installed("scikits.umfpack", "sksparse.umfpack")
            backend = "superlu" if found is None else "umfpack"
        native = A.dtype == torch.float64 or backend != "superlu"
        self.dtype = torch.float64 if native else torch.float32
        matrix = csc_of(sparse_of(A, "SparseLU"), "SparseLU", self.dtype)
        self.factor_nonzeros, self.backend = (
            0,
            {"superlu": "SuperLU", "klu": "KLU"}.get(backend, "UMFPACK"),
        )
        if not A.shape[0]:
            return
        if not matrix.nnz:
            raise SingularError(f"{A!r} is singular: it has no nonzeros; add damping")
        try:
            if backend == "superlu":
                self.factor = SuperLU(matrix, solver.ordering, solver.pivot_threshold)
            else:
                self.factor = KLU(matrix) if backend == "klu" else umfpack(matrix)
        except SingularError as error:
            raise SingularError(
                f"{A!r} is singular ({error}); add damping, as A + 1e-3 * Identity, or solve for "
                "the shortest least-squares solution by LSMR"
            ) from None
        self.factor_nonzeros = self.factor.nonzeros

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._substitute(block, transpose=False)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._substitute(block, transpose=True)

    def _substitute(self, block: Tensor, *, transpose: bool) -> tuple[Tensor, Progress]:
        factor = self.factor
        if factor is None:
            return block, Progress()
        x = solved(
            lambda array: factor.solve(array, transpose=transpose), block, self.dtype, len(block)
        )
        return x, Progress()

    def logdet(self) -> Tensor:
        """``log |det A|``, a scalar of the dtype and on the device of A.

        Raises
        ------
        NotImplementedError
            A tensor of A is being differentiated; or the back-end is KLU.
        """
        not_tracked(self.given, "logdet")
        value = 0.0 if self.factor is None else self.factor.logdet()
        return torch.tensor(value, dtype=self.A.dtype, device=self.A.device)
