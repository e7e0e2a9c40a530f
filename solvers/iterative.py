"""What the iterative solvers share: an iteration limit, and whether reaching it is the method."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.linear_solver import LinearSolver


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
