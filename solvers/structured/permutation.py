"""`Permutation`: coordinates put back in order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators import LinearOperator
from operators import Permutation as PermutationOperator
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.solution import StructureError


@dataclass(frozen=True, kw_only=True)
class Permutation(LinearSolver):
    """``x = P^T b`` for a permutation: exact, and free of arithmetic.

    Examples
    --------
    >>> import torch, operators as ops
    >>> P = ops.Permutation(torch.tensor([2, 0, 1]))
    >>> Permutation().prepare(P).solve(torch.tensor([1.0, 2.0, 3.0])).value
    tensor([2., 3., 1.])
    """

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Bind to A, and invert the order.

        Raises
        ------
        StructureError
            A is not an `operators.Permutation`.
        """
        return _PreparedPermutation(self, A)


class _PreparedPermutation(PreparedSolver):
    def __init__(self, solver: Permutation, A: LinearOperator) -> None:
        super().__init__(solver, A)
        if not isinstance(A, PermutationOperator):
            raise StructureError(f"Permutation needs an operators.Permutation; got {A!r}")
        self.order, self.inverse = A.order, torch.argsort(A.order)

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return block.index_select(0, self.inverse), Progress()

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return block.index_select(0, self.order), Progress()
