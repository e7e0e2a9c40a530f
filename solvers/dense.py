"""Dense factorisations: `DenseCholesky` and `DenseLU`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.solution import NotPositiveDefiniteError, SingularError, StructureError


def _finite_dense(A: LinearOperator, solver: str) -> Tensor:
    matrix = A.to_dense()
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{solver}: the matrix of {A!r} holds NaN or infinite entries")
    return matrix


@dataclass(frozen=True, kw_only=True)
class DenseCholesky(LinearSolver):
    """``A = L L^T`` of a symmetric positive definite operator, formed as a dense matrix.

    Costs n products with A, ``n^3 / 3`` flops and ``n^2`` numbers once; ``2 n^2`` flops a solve.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), positive_definite=True)
    >>> DenseCholesky().prepare(A).solve(torch.tensor([5.0, 4.0])).value.round(decimals=5)
    tensor([1., 1.])
    """

    def prepare(self, A: LinearOperator) -> PreparedSolver:
        """Factorise.

        Raises
        ------
        StructureError
            A is not known to be symmetric.
        NotPositiveDefiniteError
            A leading minor is not positive; its order is named.
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
        matrix = _finite_dense(A, "DenseCholesky")
        # Only one triangle enters the factorisation, so average the two halves of rounding error.
        self.factor, failed = torch.linalg.cholesky_ex((matrix + matrix.T) / 2)
        if int(failed):
            raise NotPositiveDefiniteError(
                f"{A!r} is not positive definite: the leading minor of order {int(failed)} is not "
                "positive; add damping, or use DenseLU"
            )

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return torch.cholesky_solve(block, self.factor), Progress()


@dataclass(frozen=True, kw_only=True)
class DenseLU(LinearSolver):
    """``P A = L U`` with partial pivoting of any square operator, formed as a dense matrix.

    Costs n products with A, ``2 n^3 / 3`` flops and ``n^2`` numbers once; ``2 n^2`` flops a solve,
    transposed or not.

    Examples
    --------
    >>> import torch, operators as ops
    >>> factor = DenseLU().prepare(ops.Dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]])))
    >>> factor.solve(torch.tensor([2.0, 3.0])).value
    tensor([3., 1.])
    >>> factor.solve_transpose(torch.tensor([2.0, 3.0])).value
    tensor([1.5000, 2.0000])
    """

    def prepare(self, A: LinearOperator) -> PreparedSolver:
        """Factorise.

        Raises
        ------
        SingularError
            A pivot is exactly zero.
        """
        return _PreparedLU(self, A)


class _PreparedLU(PreparedSolver):
    def __init__(self, solver: DenseLU, A: LinearOperator) -> None:
        super().__init__(solver, A)
        matrix = _finite_dense(A, "DenseLU")
        self.factor, self.pivots, failed = torch.linalg.lu_factor_ex(matrix)
        if int(failed):
            raise SingularError(f"{A!r} is singular: pivot {int(failed)} of its LU is exactly zero")

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return torch.linalg.lu_solve(self.factor, self.pivots, block), Progress()

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return torch.linalg.lu_solve(self.factor, self.pivots, block, adjoint=True), Progress()
