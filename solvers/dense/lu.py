"""`DenseLU`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.dense.matrix import equilibrated_condition, finite_dense, first_failure
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.members import batch_of, block_of
from solvers.one_by_one import one_by_one
from solvers.solution import SingularError


@dataclass(frozen=True, kw_only=True)
class DenseLU(LinearSolver):
    """``P A = L U`` with partial pivoting of any square operator, formed as a dense matrix.

    Parameters
    ----------
    rcond
        Refuse a matrix whose reciprocal condition number is not above this, whatever the units of
        its rows and columns (`solvers.dense.matrix.equilibrated_condition`). At ``n eps`` no digit
        of a solution can be trusted, though a consistent right-hand side leaves no residual to tell
        by. 0 refuses only where a pivot is exactly zero, and costs nothing.
    rtol, atol, strict
        As for `LinearSolver`.

    Notes
    -----
    Costs n products with A, ``2 n^3 / 3`` flops and ``n^2`` numbers once, with rcond an inverse of
    ``2 n^3`` flops more; ``2 n^2`` flops a solve, transposed or not. A batch is factorised in one
    call.

    Examples
    --------
    >>> import torch, operators as ops
    >>> factor = DenseLU().prepare(ops.Dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]])))
    >>> factor.solve(torch.tensor([2.0, 3.0])).value
    tensor([3., 1.])
    >>> factor.solve_transpose(torch.tensor([2.0, 3.0])).value
    tensor([1.5000, 2.0000])
    """

    rcond: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rcond < 1:
            raise ValueError(f"DenseLU: rcond={self.rcond}; expected a number in [0, 1)")

    @property
    def columnwise(self) -> bool:
        """True."""
        return True

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Factorise.

        Raises
        ------
        SingularError
            A pivot is exactly zero; it is named, and the member of a batch. Or the condition
            number is too large for `rcond`.
        """
        return _PreparedLU(self, A)


class _PreparedLU(PreparedSolver):
    def __init__(self, solver: DenseLU, A: LinearOperator) -> None:
        super().__init__(solver, A)
        matrix = finite_dense(A, "DenseLU")
        self.factor, self.pivots, codes = one_by_one(torch.linalg.lu_factor_ex, matrix)
        if failure := first_failure(A, codes):
            name, pivot = failure
            raise SingularError(f"{name} is singular: pivot {pivot} of its LU is exactly zero")
        if solver.rcond:
            condition = equilibrated_condition(matrix)
            if failure := first_failure(A, ~(condition * solver.rcond < 1)):
                worst = float(condition.reshape(-1).nan_to_num(math.inf).max())
                raise SingularError(
                    f"{failure[0]} is singular to rounding: its condition number is {worst:.2g}, "
                    f"above 1 / rcond = {1 / solver.rcond:.2g}"
                )

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._substitute(block, adjoint=False)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._substitute(block, adjoint=True)

    def _substitute(self, block: Tensor, adjoint: bool) -> tuple[Tensor, Progress]:
        batch = batch_of(self.A, block)
        x = torch.linalg.lu_solve(self.factor, self.pivots, batch, adjoint=adjoint)
        return block_of(self.A, x), Progress()
