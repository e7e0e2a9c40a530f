"""What a solve returns, and how it says that it did not converge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Info:
    """How a linear solve went.

    Parameters
    ----------
    converged
        Whether the true residual of every column meets the tolerance; for least squares, whether
        that or the residual of the normal equations does.
    iterations
        Iterations of the slowest column; 0 for a direct solver.
    residual
        True relative residual ``|b - A x| / |b|`` (2-norm), recomputed with one product after the
        solve, worst column; never the recurrence's.
    solver
        The solver and its settings, as text.
    status
        ``"converged"``, ``"maxiter"``, ``"indefinite"``, ``"diverged"``, ``"breakdown"``,
        ``"stagnated"``, ``"truncated"`` (a pseudo-inverse of lower rank) or ``"inaccurate"``.
    reason
        The status in a sentence, with the numbers; for `Auto` also why this solver.
    products
        Products with A that the solve took, that of the residual included; a block of k columns
        counts k.
    backend
        What did the work: ``"torch"``, ``"CHOLMOD"``, ``"SuperLU"``, ...
    normal_residual
        For least squares ``|A^T r| / (|A| |r|)`` with ``r = b - A x``, worst column; else None.
    factor_nonzeros
        Nonzeros of the factors of a sparse direct solver; else None.
    operator_complexity
        Nonzeros on all levels of a multigrid hierarchy over those of A; else None.
    refreshed
        Whether a preconditioner made for an earlier operator was made anew for this solve.
    setup_seconds, solve_seconds
        Seconds of `prepare` (or `update`) and of this solve; two solves are compared without them.
    """

    converged: bool
    iterations: int
    residual: float
    solver: str
    status: str
    reason: str
    products: int
    backend: str = "torch"
    normal_residual: float | None = None
    factor_nonzeros: int | None = None
    operator_complexity: float | None = None
    refreshed: bool = False
    setup_seconds: float = field(default=0.0, compare=False)
    solve_seconds: float = field(default=0.0, compare=False)


class Solution(NamedTuple):
    """A solution and its diagnostics: ``value, info = solution``."""

    value: Any
    info: Info


class ConvergenceWarning(UserWarning):
    """A result did not reach the tolerance that was asked for."""


class NotConvergedError(RuntimeError):
    """A solver with ``strict=True`` did not reach its tolerance; `info` says how far it came."""

    def __init__(self, info: Info) -> None:
        super().__init__(info.reason)
        self.info = info


class StructureError(ValueError):
    """The operator lacks a structure that the solver needs, or a claim about it is false."""


class NotPositiveDefiniteError(StructureError):
    """A matrix that a factorisation needs positive definite is not."""


class SingularError(StructureError):
    """A matrix is singular to working precision."""


class MissingLibraryError(ImportError):
    """A back-end that is not installed; the message says how to get it."""
