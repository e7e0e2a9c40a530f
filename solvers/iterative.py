"""What the iterative solvers share: a limit, a preconditioner, and when that is renewed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.members import Members
from solvers.preconditioner import (
    CallableOperator,
    Preconditioner,
    PreconditionerLike,
    SolveOperator,
    as_preconditioner,
)
from solvers.solution import StructureError

# A stale preconditioner is not made anew for a solve of so few iterations: that costs more.
FEW = 5


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

    takes_guess: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.maxiter is not None and not isinstance(self.maxiter, int):
            raise TypeError(f"{name}: maxiter={self.maxiter!r}; expected an integer, or None")
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

    @property
    def symmetric_preconditioner(self) -> bool:
        """Whether the method is right for a symmetric P alone, and so refuses others."""
        return False


class Patience(Protocol):
    """How long an iteration may go on, other than its settings say."""

    @property
    def first(self) -> int:
        """Iterations before the first look."""

    def more(self, iterations: int, distance: float) -> int:
        """Iterations to make beyond those made.

        They left the worst residual at `distance`, a multiple of its target.
        """


class PreparedIteration(PreparedSolver):
    """An iterative solver bound to its operator and its preconditioner.

    After `update` the preconditioner is one of an earlier operator. It is made anew, from the
    settings that it was made from, before the next solve where a solve took more than twice the
    iterations that it took when fresh, and at once where a solve failed, which is then repeated.
    """

    solver: PreconditionedSolver
    # While `Auto` tries it out, what says how far to go.
    trial: Patience | None = None

    def __init__(
        self,
        solver: PreconditionedSolver,
        A: LinearOperator,
        preconditioner: LinearOperator | None = None,
    ) -> None:
        super().__init__(solver, A)
        self._adopt(self._made() if preconditioner is None else preconditioner)
        # Whether the preconditioner was made for another operator, whether it is to be made anew,
        # and the iterations for one digit of the residual that it took when it was not.
        self.stale = self._due = False
        self._pace: float | None = None

    def _made(self) -> LinearOperator | None:
        """The preconditioner for the operator at hand."""
        return as_preconditioner(self.solver.preconditioner, self.A)

    def _adopt(self, preconditioner: LinearOperator | None) -> None:
        wanted = self.solver.symmetric_preconditioner
        if wanted and preconditioner is not None and not preconditioner.symmetric:
            raise StructureError(
                f"{type(self.solver).__name__} needs a symmetric preconditioner; "
                f"{preconditioner!r} does not claim to be: claim it, take IncompleteCholesky or "
                "AMG (cycle V or W), or use GMRES"
            )
        self.preconditioner = preconditioner
        self.operator_complexity = getattr(preconditioner, "operator_complexity", None)
        self.factor_nonzeros = getattr(preconditioner, "factor_nonzeros", None)
        self.backend = getattr(preconditioner, "backend", "torch")

    def _product(self, block: Tensor) -> Tensor:
        """``A V``."""
        return applied(self.A, block)

    def _precondition(self, block: Tensor) -> Tensor:
        """``P V``."""
        return block if self.preconditioner is None else applied(self.preconditioner, block)

    @cached_property
    def _transposed(self) -> PreparedSolver:
        P = None if self.preconditioner is None else self.preconditioner.T
        return type(self)(self.solver, self.A.T, P)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        if not self.A.symmetric:
            twin = self._transposed
            assert isinstance(twin, PreparedIteration)
            twin.trial = self.trial
        return super()._solve_transpose(block, targets)

    def _begun(self, n: int) -> Progress:
        """Nothing done yet, and the iterations allowed for a system of size n."""
        return Progress(limit=self.solver.limit(n) if self.trial is None else self.trial.first)

    def _update(self, A: LinearOperator) -> PreparedSolver:
        # What was given as an operator or as a function stays as it is, and cannot be made anew.
        made = isinstance(self.solver.preconditioner, (Preconditioner, LinearSolver))
        if not made:
            return super()._update(A)
        updated = type(self)(self.solver, A, self.preconditioner)
        updated.stale, updated._due, updated._pace = True, self._due, self._pace
        return updated

    def _renew(self) -> None:
        self._adopt(self._made())
        self.stale, self._due, self._pace = False, False, None
        self.__dict__.pop("_transposed", None)

    def _answer(
        self, block: Tensor, targets: Tensor, *, transpose: bool
    ) -> tuple[Tensor, Progress]:
        if self.preconditioner is None:
            return super()._answer(block, targets, transpose=transpose)
        refreshed = self._due
        if refreshed:
            self._renew()
        x, progress = super()._answer(block, targets, transpose=transpose)
        progress.refreshed |= refreshed
        left = self._left(block, x, progress, transpose)
        # For least squares the solver's own word has to do.
        met = bool((left <= targets).all()) or (
            self.solver.minimises(self.A) and progress.status == "converged"
        )
        pace = _pace(progress.iterations, targets if met else left, targets)
        if not self.stale:
            if progress.iterations and math.isfinite(pace):
                self._pace = max(self._pace or 0.0, pace)
            return x, progress
        if met or self.solver.truncated:
            fresh = math.inf if self._pace is None else self._pace
            self._due = progress.iterations > FEW and pace > 2 * fresh
            return x, progress
        self._renew()
        x, again = super()._answer(block, targets, transpose=transpose)
        again.products += progress.products
        again.refreshed = True
        return x, again

    def _spent(self, progress: Progress, distance: float) -> bool:
        """Whether the iterations are used up, which is the status then."""
        if self.trial is not None:
            progress.limit += self.trial.more(progress.iterations, distance)
        if progress.iterations < progress.limit:
            return False
        progress.status = "maxiter"
        return True

    def _left(self, block: Tensor, x: Tensor, progress: Progress, transpose: bool) -> Tensor:
        """Norms of the columns of the true residual."""
        if progress.residual is None:
            operator = self.A.T if transpose else self.A
            progress.residual = block - operator._matmat(x)
            progress.products += block.shape[1]
        return torch.linalg.vector_norm(progress.residual, dim=0)


def varies(P: LinearOperator | None) -> bool:
    """Whether P may be another map at each product: a function, or an iteration of its own."""
    if isinstance(P, SolveOperator):
        return isinstance(P.prepared.solver, IterativeSolver)
    return isinstance(P, CallableOperator) or (P is not None and any(map(varies, P.operands)))


def applied(A: LinearOperator, block: Tensor) -> Tensor:
    """``A V``; a single column as the vector that it is, which suits most products best."""
    if block.shape[1] == 1 and not isinstance(A, Members):
        return A._matvec(block[:, 0])[:, None]
    return A._matmat(block)


def _pace(iterations: int, left: Tensor, targets: Tensor) -> float:
    """Iterations for a digit by which the residuals of unit columns fell, as far as asked for."""
    smallest = float(torch.maximum(left, targets).min()) if left.numel() else 1.0
    digits = -math.log10(max(smallest, torch.finfo(left.dtype).tiny))
    return iterations / digits if digits > 0 else math.inf
