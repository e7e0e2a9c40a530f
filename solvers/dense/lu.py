"""`DenseLU`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.dense.matrix import finite_dense, first_failure
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.members import batch_of, block_of
from solvers.solution import SingularError


@dataclass(frozen=True, kw_only=True)
class DenseLU(LinearSolver):
    """``P A = L U`` with partial pivoting of any square operator, formed as a dense matrix.

    Costs n products with A, ``2 n^3 / 3`` flops and ``n^2`` numbers once; ``2 n^2`` flops a solve,
    transposed or not. A batch is factorised in one call.

    Examples
    --------
    >>> import torch, operators as ops
    >>> factor = DenseLU().prepare(ops.Dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]])))
    >>> factor.solve(torch.tensor([2.0, 3.0])).value
    tensor([3., 1.])
    >>> factor.solve_transpose(torch.tensor([2.0, 3.0])).value
    tensor([1.5000, 2.0000])
    """

    @property
    def columnwise(self) -> bool:
        """True."""
        return True

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Factorise.

        Raises
        ------
        SingularError
            A pivot is exactly zero; it is named, and the member of a batch.
        """
        return _PreparedLU(self, A)


class _PreparedLU(PreparedSolver):
    def __init__(self, solver: DenseLU, A: LinearOperator) -> None:
        super().__init__(solver, A)
        matrix = finite_dense(A, "DenseLU")
        self.factor, self.pivots, codes = torch.linalg.lu_factor_ex(matrix)
        if failure := first_failure(A, codes):
            name, pivot = failure
            raise SingularError(f"{name} is singular: pivot {pivot} of its LU is exactly zero")

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._substitute(block, adjoint=False)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._substitute(block, adjoint=True)

    def _substitute(self, block: Tensor, adjoint: bool) -> tuple[Tensor, Progress]:
        batch = batch_of(self.A, block)
        x = torch.linalg.lu_solve(self.factor, self.pivots, batch, adjoint=adjoint)
        return block_of(self.A, x), Progress()
