"""`QR`: least squares of full rank by orthogonal triangularisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.dense.matrix import finite_dense, first_failure
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.members import batch_of, block_of
from solvers.solution import SingularError


@dataclass(frozen=True, kw_only=True)
class QR(LinearSolver):
    """``x = R^-1 Q^T b`` with ``A = Q R``: the minimiser of ``|b - A x|`` for a tall A.

    For a wide A, with ``A^T = Q R``, the shortest solution ``x = Q R^-T b``. A is formed as a dense
    matrix and must have full rank; its transpose is solved by the same factors. With m rows and n
    columns, ``m >= n``, it costs n products with A, ``4 m n^2`` flops and ``m n + n^2`` numbers
    once; ``2 m n + n^2`` flops a solve. A batch is factorised in one call.

    Parameters
    ----------
    rank_rtol
        A column of A (a row, if A is wide) counts as a combination of those before it where no more
        than this fraction of its norm is orthogonal to them: ``|r_jj| <= rank_rtol |a_j|``. None
        means ``10 max(m, n) eps``: of 3000 random matrices of low rank one passed that.
    rtol, atol, strict
        As for `LinearSolver`.

    Notes
    -----
    torch has no column pivoting, so R does not reveal the rank: an exact dependence shows on its
    diagonal, a near one may hide (Golub and Van Loan, Matrix Computations, 4th ed., section 5.4).
    Where columns are dependent there is no basic solution to fall back on: `SVD` gives the shortest
    minimiser, and cuts singular values off. The comparison with ``|a_j|`` does not change with the
    scale of the columns, to which QR is indifferent too.

    The factorisation is backward stable: x is exact for a matrix within a few eps of A (Higham,
    Accuracy and Stability of Numerical Algorithms, theorem 20.3). A step of refinement gained less
    than a factor of two on the residual in trials up to condition 1e12, so there is none.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]))
    >>> line = QR().prepare(A)
    >>> line.solve(torch.tensor([1.0, 3.0, 5.0])).value.round(decimals=5)  # 1 + 2 t
    tensor([1., 2.])
    >>> line.solve_transpose(torch.tensor([3.0, 3.0])).value.round(decimals=5)
    tensor([1., 1., 1.])
    """

    rank_rtol: float | None = None

    least_squares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_rtol is not None and not 0 <= self.rank_rtol < 1:
            raise ValueError(
                f"QR: rank_rtol={self.rank_rtol}; expected a number in [0, 1), or None"
            )

    @property
    def columnwise(self) -> bool:
        """True."""
        return True

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Factorise.

        Raises
        ------
        SingularError
            A does not have full rank; the first dependent column (or row) is named, and the member
            of a batch.
        """
        return _PreparedQR(self, A)


class _PreparedQR(PreparedSolver):
    solver: QR

    def __init__(self, solver: QR, A: LinearOperator) -> None:
        super().__init__(solver, A)
        matrix = finite_dense(A, "QR")
        self.tall = A.shape[0] >= A.shape[1]
        self.Q, self.R = torch.linalg.qr(matrix if self.tall else matrix.mT)
        self._check_rank()
        self.rank = min(A.shape)

    def _check_rank(self) -> None:
        kept = self.solver.rank_rtol
        if kept is None:
            kept = 10 * max(self.A.shape) * torch.finfo(self.R.dtype).eps
        if not self.R.numel():
            return
        # Columns of R are as long as those that were factorised; their squares may overflow.
        largest = self.R.abs().amax(-2, keepdim=True)
        unit = self.R / torch.where(largest > 0, largest, 1.0)
        heights = unit.diagonal(dim1=-2, dim2=-1).abs()
        dependent = heights <= kept * torch.linalg.vector_norm(unit, dim=-2)
        # Counted from one, so that zero says that there is none.
        first = torch.where(dependent.any(-1), dependent.int().argmax(-1) + 1, 0)
        if failure := first_failure(self.A, first):
            name, index = failure
            raise SingularError(
                f"{name} does not have full rank {min(self.A.shape)}: "
                f"{'column' if self.tall else 'row'} {index - 1} (from 0) is a combination of "
                f"those before it, up to {kept:.3g} of its norm; torch's QR has no column pivoting "
                "to go on with: use SVD"
            )

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._applied(block, shortest=not self.tall)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._applied(block, shortest=self.tall)

    def _applied(self, block: Tensor, shortest: bool) -> tuple[Tensor, Progress]:
        """``R^-1 Q^T b``, or ``Q R^-T b``."""
        batch = batch_of(self.A, block)
        if shortest:
            x = self.Q @ torch.linalg.solve_triangular(self.R.mT, batch, upper=False)
        else:
            x = torch.linalg.solve_triangular(self.R, self.Q.mT @ batch, upper=True)
        return block_of(self.A, x), Progress()
