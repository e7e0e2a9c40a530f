"""`DenseCholesky`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.dense.matrix import cholesky_solved, finite_dense, first_failure, lower_half
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.members import batch_of, block_of
from solvers.solution import NotPositiveDefiniteError, StructureError


@dataclass(frozen=True, kw_only=True)
class DenseCholesky(LinearSolver):
    """``A = L L^T`` of a symmetric positive definite operator, formed as a dense matrix.

    Costs n products with A, ``n^3 / 3`` flops and ``n^2`` numbers once; ``2 n^2`` flops a solve.
    A batch is factorised in one call.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), positive_definite=True)
    >>> DenseCholesky().prepare(A).solve(torch.tensor([5.0, 4.0])).value.round(decimals=5)
    tensor([1., 1.])
    """

    @property
    def columnwise(self) -> bool:
        """True."""
        return True

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Factorise.

        Raises
        ------
        StructureError
            A is not known to be symmetric.
        NotPositiveDefiniteError
            A leading minor is not positive; its order is named, and the member of a batch.
        """
        return _PreparedCholesky(self, A)


class _PreparedCholesky(PreparedSolver):
    def __init__(self, solver: DenseCholesky, A: LinearOperator) -> None:
        super().__init__(solver, A)
        if not A.symmetric:
            raise StructureError(
                f"DenseCholesky needs a symmetric operator; {A!r} does not claim to be: claim it, "
                "or use DenseLU"
            )
        matrix = finite_dense(A, "DenseCholesky")
        self.factor, codes = torch.linalg.cholesky_ex(lower_half(matrix))
        if failure := first_failure(A, codes):
            name, order = failure
            raise NotPositiveDefiniteError(
                f"{name} is not positive definite: the leading minor of order {order} is not "
                "positive; add damping, or use DenseLU"
            )

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        x = cholesky_solved(self.factor, batch_of(self.A, block))
        return block_of(self.A, x), Progress()
