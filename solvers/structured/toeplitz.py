"""`Toeplitz`: direct solves from two columns of the inverse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from operators import LinearOperator
from operators import Toeplitz as ToeplitzOperator
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.solution import SingularError, StructureError
from solvers.structured.parts import refined


@dataclass(frozen=True, kw_only=True)
class Toeplitz(LinearSolver):
    """Inverse of a Toeplitz operator: Levinson's recursion, then Gohberg and Semencul's formula.

    With the first and the last column of the inverse, x and y,

        x_0 A^-1 = L(x) U(y) - L'(y) U'(x) ,

    where L and U are triangular Toeplitz matrices: L has the first column x, U the first row
    ``(y_(n-1), ..., y_0)``, L' the first column ``(0, y_0, ..., y_(n-2))`` and U' the first row
    ``(0, x_(n-1), ..., x_1)``.

    Notes
    -----
    The two columns cost ``4 n^2`` flops each (one is enough where A is symmetric), on the CPU and
    in double precision; a solve is four products by fast Fourier transforms, ``O(n log n)``, for
    each of as many right-hand sides as are given, and ``2 n`` numbers are held (Levinson, 1947;
    Gohberg and Semencul, 1972; Golub and Van Loan, Matrix Computations, 4th ed., section 4.7).

    The recursion goes through the leading minors: it is stable for a well-conditioned positive
    definite A, may lose all digits where one of them is near zero, though A itself is well
    conditioned, and breaks down where one is zero. The residual is measured, and corrected at most
    five times; what it then still misses is reported. Such an A is for DenseLU or GMRES; a large
    one, if definite, for CG with a `CirculantPreconditioner`, at ``O(n log n)`` an iteration.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Toeplitz(torch.tensor([4.0, 1.0, 0.0]), torch.tensor([4.0, 2.0, 1.0]))
    >>> Toeplitz().prepare(A).solve(torch.tensor([7.0, 7.0, 5.0])).value.round(decimals=5)
    tensor([1., 1., 1.])
    """

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Compute the first and the last column of the inverse.

        Raises
        ------
        StructureError
            A is not an `operators.Toeplitz`.
        SingularError
            A leading minor is zero.
        ValueError
            A holds NaN or infinity.
        """
        return _PreparedToeplitz(self, A)


class _PreparedToeplitz(PreparedSolver):
    backend = "SciPy"

    def __init__(self, solver: Toeplitz, A: LinearOperator) -> None:
        super().__init__(solver, A)
        if not isinstance(A, ToeplitzOperator):
            raise StructureError(f"Toeplitz needs an operators.Toeplitz; got {A!r}")
        self.inverse = _gohberg_semencul(*_outer_columns(A))

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._applied(self.A, self.inverse, block, targets)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._applied(self.A.T, self.inverse.T, block, targets)

    def _applied(
        self, operator: LinearOperator, inverse: LinearOperator, block: Tensor, targets: Tensor
    ) -> tuple[Tensor, Progress]:
        progress = Progress()
        x = refined(operator, inverse._matmat, block, targets, progress)
        assert progress.residual is not None
        if not bool((torch.linalg.vector_norm(progress.residual, dim=0) <= targets).all()):
            progress.detail = "a leading minor may be near zero; use DenseLU or GMRES"
        return x, progress


def _outer_columns(A: ToeplitzOperator) -> tuple[Tensor, Tensor]:
    """First and last column of ``A^-1``."""
    lines = [line.detach().cpu().double().numpy() for line in (A.column, A.first_row)]
    if not all(np.isfinite(line).all() for line in lines):
        raise ValueError(f"Toeplitz: {A!r} holds NaN or infinite entries")
    ends = np.eye(A.shape[0])[:, [0, -1]] if not A.symmetric else np.eye(A.shape[0], 1)
    try:
        columns = scipy.linalg.solve_toeplitz((lines[0], lines[1]), ends)
    except np.linalg.LinAlgError as error:
        raise SingularError(
            f"Toeplitz: a leading minor of {A!r} is zero ({error}); A itself need not be singular: "
            "use DenseLU"
        ) from error
    first = torch.from_numpy(columns[:, 0].copy()).to(A.column)
    # A symmetric A is its own mirror image.
    last = first.flip(0) if A.symmetric else torch.from_numpy(columns[:, 1].copy()).to(A.column)
    if not bool(first[0] != 0):  # the quotient of two leading minors
        raise SingularError(
            f"Toeplitz: the leading minor of order {A.shape[0] - 1} of {A!r} is zero; A itself "
            "need not be singular: use DenseLU"
        )
    return first, last


def _gohberg_semencul(x: Tensor, y: Tensor) -> LinearOperator:
    zero = torch.zeros_like(x)

    def lower(column: Tensor) -> LinearOperator:
        return ToeplitzOperator(column, zero)

    def upper(row: Tensor) -> LinearOperator:
        return ToeplitzOperator(torch.cat([row[:1], zero[1:]]), row)

    ahead = lower(x) @ upper(y.flip(0))
    behind = lower(_pushed(y)) @ upper(_pushed(x.flip(0)))
    return (1 / x[0]) * (ahead - behind)


def _pushed(line: Tensor) -> Tensor:
    """``(0, l_0, ..., l_(n-2))``."""
    return torch.cat([torch.zeros_like(line[:1]), line[:-1]])
