"""The Woodbury identity: the inverse of low rank plus diagonal through one T x T system."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators import Diagonal as DiagonalOperator
from operators import LinearOperator, LowRankPlusDiagonal
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.solution import SingularError, StructureError


def low_rank_parts(solver: str, A: LinearOperator) -> tuple[Tensor, Tensor, Tensor]:
    """``(U, w, d)`` of ``A = diag(d) + U^T diag(w) U``, with d invertible."""
    if isinstance(A, LowRankPlusDiagonal):
        rows, weights, d = A.rows, A.weights, A.diagonal_values
    elif isinstance(A, DiagonalOperator):
        rows, weights, d = A.values.new_zeros(0, A.shape[0]), A.values.new_zeros(0), A.values
    else:
        raise StructureError(
            f"{solver} needs a LowRankPlusDiagonal operator (as EmpiricalFisher is); got {A!r}"
        )
    if bool((d == 0).any()):
        raise SingularError(
            f"{solver}: the diagonal part of {A!r} has zeros; add damping, e.g. A + 1e-3 * Identity"
        )
    return rows, weights, d.expand(A.shape[0])


@dataclass(frozen=True, kw_only=True)
class Woodbury(LinearSolver):
    """Inverse of ``D + U^T W U`` through a T x T system.

    For ``w >= 0`` and ``V = W^(1/2) U``,

        A^-1 b = D^-1 b - D^-1 V^T (I + V D^-1 V^T)^-1 V D^-1 b ,

    whose T x T matrix is symmetric positive definite for ``d > 0`` (Cholesky); otherwise
    ``(I + W U D^-1 U^T)^-1 W`` stands in the middle (LU). One step of iterative refinement follows
    each solve. Costs ``2 T^2 n + T^3 / 3`` flops once and ``12 T n`` a solve; holds ``T n``
    numbers.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.LowRankPlusDiagonal(torch.tensor([[1.0, 1.0]]), 2.0)
    >>> Woodbury().prepare(A).solve(torch.tensor([4.0, 4.0])).value.round(decimals=5)
    tensor([1., 1.])
    """

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Factorise the T x T system.

        Raises
        ------
        StructureError
            A is not low rank plus diagonal.
        SingularError
            The diagonal part has zeros, or the T x T system is singular.
        """
        return _PreparedWoodbury(self, A)


class _PreparedWoodbury(PreparedSolver):
    def __init__(self, solver: Woodbury, A: LinearOperator) -> None:
        super().__init__(solver, A)
        rows, weights, d = low_rank_parts("Woodbury", A)
        self.inverse_diagonal = (1.0 / d)[:, None]
        eye = torch.eye(len(weights), dtype=A.dtype, device=A.device)
        self.definite = bool((weights >= 0).all() & (d > 0).all())
        if self.definite:
            self.left = weights.sqrt()[:, None] * rows
            self.right = self.left
        else:
            self.left, self.right = rows, weights[:, None] * rows
        small = eye + self.right @ (self.inverse_diagonal * self.left.T)
        if self.definite:
            self.factor, failed = torch.linalg.cholesky_ex(small)
        else:
            self.factor, self.pivots, failed = torch.linalg.lu_factor_ex(small)
        if int(failed):
            raise SingularError(
                f"Woodbury: the {len(weights)} x {len(weights)} system of {A!r} broke down at "
                f"pivot {int(failed)}; its damping is too small for {A.dtype}"
            )

    def _apply(self, block: Tensor) -> Tensor:
        scaled = self.inverse_diagonal * block
        middle = self.right @ scaled
        if self.definite:
            middle = torch.cholesky_solve(middle, self.factor)
        else:
            middle = torch.linalg.lu_solve(self.factor, self.pivots, middle)
        return scaled - self.inverse_diagonal * (self.left.T @ middle)

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        x = self._apply(block)
        # The subtraction above cancels when the low-rank part dominates; refinement repairs that.
        x = x + self._apply(block - self.A._matmat(x))
        return x, Progress(products=block.shape[1])
