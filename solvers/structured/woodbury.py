"""The Woodbury identity: the inverse of an update of low rank through one T x T system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from operators import Diagonal as DiagonalOperator
from operators import LinearOperator, LowRankPlusDiagonal, LowRankUpdate, Sum
from solvers.dense.matrix import cholesky_solved
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.solution import SingularError, StructureError
from solvers.structured.parts import Part


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
    _inverted(solver, d, A)
    return rows, weights, d.expand(A.shape[0])


def _inverted(solver: str, d: Tensor, A: LinearOperator) -> Tensor:
    """``1 / d``."""
    if bool((d == 0).any()):
        raise SingularError(
            f"{solver}: the diagonal part of {A!r} has zeros; add damping, e.g. A + 1e-3 * Identity"
        )
    return 1.0 / d


@dataclass(frozen=True, kw_only=True)
class Woodbury(LinearSolver):
    """Inverse of ``B + L^T R``, with T rows in L and R, through a T x T system.

        A^-1 b = B^-1 (b - L^T y) ,     (I + R B^-1 L^T) y = R B^-1 b .

    A is a `LowRankPlusDiagonal` (B its diagonal part, ``L^T R = U^T W U``), a `LowRankUpdate` (B a
    multiple of I), or the sum of one of these and any other operator, which then belongs to B.

    Parameters
    ----------
    base_solver
        Solver of a B that is not diagonal; by default `Auto`.
    rtol, atol, strict
        As for `LinearSolver`.

    Notes
    -----
    For weights ``w >= 0`` and a definite B the system is symmetric positive definite (Cholesky),
    with ``L = R = W^(1/2) U``; otherwise it is factorised by LU. One step of iterative refinement
    follows each solve. For a diagonal B it costs ``2 T^2 n + T^3 / 3`` flops once and ``12 T n`` a
    solve; holds ``2 T n`` numbers. Another B is solved T times once and four times a solve.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.LowRankPlusDiagonal(torch.tensor([[1.0, 1.0]]), 2.0)
    >>> Woodbury().prepare(A).solve(torch.tensor([4.0, 4.0])).value.round(decimals=5)
    tensor([1., 1.])
    >>> B = ops.Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), positive_definite=True)
    >>> Woodbury().prepare(A + B).solve(torch.tensor([7.0, 7.0])).value.round(decimals=5)
    tensor([1., 1.])
    """

    base_solver: LinearSolver | None = None

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Factorise the T x T system.

        Raises
        ------
        StructureError
            A holds no part of low rank.
        SingularError
            A diagonal B has zeros, or the T x T system is singular.
        """
        return _PreparedWoodbury(self, A)


class Update(NamedTuple):
    """``B + L^T R``; `definite` where L is R and B is definite."""

    base: LinearOperator
    left: Tensor
    right: Tensor
    definite: bool


def update_of(A: LinearOperator) -> Update | None:
    """What A is as an update of low rank; None where it holds none."""
    if isinstance(A, LowRankPlusDiagonal):
        base = DiagonalOperator(A.diagonal_values, A.domain)
        if bool((A.weights >= 0).all()):
            root = A.weights.sqrt()[:, None] * A.rows
            return Update(base, root, root, base.positive_definite)
        return Update(base, A.rows, A.weights[:, None] * A.rows, False)
    if isinstance(A, LowRankUpdate):
        return Update(DiagonalOperator(A.scale, A.domain), A.left, A.right, False)
    if isinstance(A, Sum):
        for term, other in ((A.left, A.right), (A.right, A.left)):
            found = update_of(term)
            if found is not None:
                # Zeros would only hide what the other term is.
                values = getattr(found.base, "values", None)
                zero = values is not None and not bool(values.any())
                whole = other if zero else found.base + other
                definite = found.left is found.right and whole.positive_definite
                return found._replace(base=whole, definite=definite)
    return None


class _PreparedWoodbury(PreparedSolver):
    def __init__(self, solver: Woodbury, A: LinearOperator) -> None:
        super().__init__(solver, A)
        found = update_of(A)
        if found is None and isinstance(A, DiagonalOperator):
            none = A.values.new_zeros(0, A.shape[0])
            found = Update(A, none, none, A.positive_definite)
        if found is None:
            raise StructureError(
                f"Woodbury needs a LowRankPlusDiagonal operator (as EmpiricalFisher is), a "
                f"LowRankUpdate, or a sum with one; got {A!r}"
            )
        base, self.left, self.right, self.definite = found
        self.part: Part | None = None
        if isinstance(base, DiagonalOperator):
            self.inverse_diagonal = _inverted("Woodbury", base.values, A).expand(A.shape[0])[
                :, None
            ]
        else:
            self.part = Part.of(base, solver.base_solver, solver, max(2, len(self.left)))
            self.backend = self.part.prepared.backend
            self.factor_nonzeros = self.part.prepared.factor_nonzeros
        count = len(self.left)
        tolerance = self.left.new_full((count,), solver.tolerance(A.dtype))
        small = torch.eye(count, dtype=A.dtype, device=A.device)
        small = small + self.right @ self._of_base(self.left.T, tolerance, Progress())
        if self.definite:
            self.factor, failed = torch.linalg.cholesky_ex(small)
        else:
            self.factor, self.pivots, failed = torch.linalg.lu_factor_ex(small)
        if int(failed):
            raise SingularError(
                f"Woodbury: the {count} x {count} system of {A!r} broke down at "
                f"pivot {int(failed)}; its damping is too small for {A.dtype}"
            )

    def _of_base(
        self, block: Tensor, targets: Tensor, progress: Progress, *, transpose: bool = False
    ) -> Tensor:
        """``B^-1 V``."""
        if self.part is None:
            return self.inverse_diagonal * block
        return self.part.solve(block, targets, progress, transpose=transpose)

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._refined(block, targets, transpose=False)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._refined(block, targets, transpose=not self.A.symmetric)

    def _refined(
        self, block: Tensor, targets: Tensor, *, transpose: bool
    ) -> tuple[Tensor, Progress]:
        progress = Progress(products=block.shape[1])
        left, right = (self.right, self.left) if transpose else (self.left, self.right)
        operator = self.A.T if transpose else self.A

        def inverse(block: Tensor) -> Tensor:
            middle = right @ self._of_base(block, targets, progress, transpose=transpose)
            if self.definite:
                middle = cholesky_solved(self.factor, middle)
            else:
                middle = torch.linalg.lu_solve(self.factor, self.pivots, middle, adjoint=transpose)
            return self._of_base(block - left.T @ middle, targets, progress, transpose=transpose)

        x = inverse(block)
        # The subtraction above cancels when the low-rank part dominates; refinement repairs that.
        return x + inverse(block - operator._matmat(x)), progress
