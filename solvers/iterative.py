"""What the iterative solvers share: a limit, a preconditioner, and when that is renewed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from operators import LinearOperator
from solvers.linear_solver import LinearSolver, PreparedSolver
from solvers.preconditioner import PreconditionerLike, as_preconditioner
from solvers.solution import Solution


@dataclass(frozen=True, kw_only=True)
class IterativeSolver(LinearSolver):
    """Settings of a solver that improves x step by step.

    Parameters
    ----------
    maxiter
        Limit on the iterations, each one product with A a column. None means ``10 n``.
    stop_at_maxiter
        The truncation is the method ("CG with 10 iterations"): reaching `maxiter` is not warned
        about. ``info.converged`` is False and ``info.residual`` tells the truth all the same.
    rtol, atol, strict
        As for `LinearSolver`.
    """

    maxiter: int | None = None
    stop_at_maxiter: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.maxiter is not None and self.maxiter < 1:
            raise ValueError(f"{name}: maxiter={self.maxiter}; expected at least 1, or None")
        if self.stop_at_maxiter and (self.maxiter is None or self.strict):
            raise ValueError(f"{name}: stop_at_maxiter needs a maxiter and excludes strict=True")

    @property
    def truncated(self) -> bool:
        """As `stop_at_maxiter`."""
        return self.stop_at_maxiter

    def limit(self, n: int) -> int:
        """Iteration limit for a system of size n."""
        return 10 * n if self.maxiter is None else self.maxiter


@dataclass(frozen=True, kw_only=True)
class PreconditionedSolver(IterativeSolver):
    """Settings of an iterative solver that takes a preconditioner.

    Parameters
    ----------
    preconditioner
        ``P``, which stands for ``A^-1``: settings (`Jacobi`, `AMG`, ...), an operator, a solver, a
        prepared solver, or a function ``v -> P v``. None for none.
    maxiter, stop_at_maxiter, rtol, atol, strict
        As for `IterativeSolver`.
    """

    preconditioner: PreconditionerLike | None = None

    @property
    def columnwise(self) -> bool:
        """Where there is no preconditioner."""
        return self.preconditioner is None


class PreparedIteration(PreparedSolver):
    """An iterative solver bound to its operator and its preconditioner."""

    solver: PreconditionedSolver

    def __init__(
        self,
        solver: PreconditionedSolver,
        A: LinearOperator,
        preconditioner: LinearOperator | None = None,
    ) -> None:
        super().__init__(solver, A)
        self.preconditioner = preconditioner
        if preconditioner is None:
            self.preconditioner = as_preconditioner(solver.preconditioner, A)
        # Iterations that the first solve took with a preconditioner made for its operator, and
        # whether this one was made for another.
        self._fresh_iterations: int | None = None
        self._stale = False
        self.operator_complexity = getattr(self.preconditioner, "operator_complexity", None)
        self.backend = getattr(self.preconditioner, "backend", "torch")

    def _precondition(self, block: Tensor) -> Tensor:
        """``P V``."""
        return block if self.preconditioner is None else self.preconditioner._matmat(block)

    @cached_property
    def _transposed(self) -> PreparedSolver:
        P = None if self.preconditioner is None else self.preconditioner.T
        return type(self)(self.solver, self.A.T, P)

    def _update(self, A: LinearOperator) -> PreparedSolver:
        if self.preconditioner is None or type(self).__init__ is not PreparedIteration.__init__:
            return super()._update(A)
        updated = type(self)(self.solver, A, self.preconditioner)
        updated._fresh_iterations, updated._stale = self._fresh_iterations, True
        return updated

    def _attempt(self, b: Any, *, transpose: bool) -> Solution:
        solution = super()._attempt(b, transpose=transpose)
        info = solution.info
        if not self._stale:
            if self._fresh_iterations is None and info.converged:
                self._fresh_iterations = info.iterations
            return solution
        fresh = self._fresh_iterations
        if info.converged and (fresh is None or info.iterations <= max(2 * fresh, 1)):
            return solution
        # Out of date: made anew for the operator at hand, for this solve where it failed, and for
        # the next ones.
        self._renew()
        return solution if info.converged else self._attempt_anew(b, transpose=transpose)

    def _renew(self) -> None:
        self.preconditioner = as_preconditioner(self.solver.preconditioner, self.A)
        self._stale, self._fresh_iterations = False, None
        self.__dict__.pop("_transposed", None)

    def _attempt_anew(self, b: Any, *, transpose: bool) -> Solution:
        value, info = self._attempt(b, transpose=transpose)
        return Solution(value, replace(info, refreshed=True))
