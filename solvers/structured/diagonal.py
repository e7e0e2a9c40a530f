"""The trivial solver: an elementwise division."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from operators import Diagonal as DiagonalOperator
from operators import LinearOperator
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.solution import SingularError, StructureError


@dataclass(frozen=True, kw_only=True)
class Diagonal(LinearSolver):
    """``x = b / d`` for a diagonal operator; with `operators.Identity`, ``x = b``.

    Examples
    --------
    >>> import torch, operators as ops
    >>> Diagonal().prepare(2.0 * ops.Identity(2)).solve(torch.tensor([2.0, 4.0])).value
    tensor([1., 2.])
    """

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Bind to A.

        Raises
        ------
        StructureError
            A is not an `operators.Diagonal`.
        SingularError
            A has a zero on its diagonal.
        """
        return _PreparedDiagonal(self, A)


class _PreparedDiagonal(PreparedSolver):
    def __init__(self, solver: Diagonal, A: LinearOperator) -> None:
        super().__init__(solver, A)
        if not isinstance(A, DiagonalOperator):
            raise StructureError(f"Diagonal needs an operators.Diagonal; got {A!r}")
        if bool((A.values == 0).any()):
            raise SingularError(f"{A!r} has a zero on its diagonal")
        self.values = A.values.expand(A.shape[0])[:, None]

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return block / self.values, Progress()
