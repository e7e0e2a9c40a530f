"""The contract of every solver: frozen settings, ``prepare(A)``, then any number of solves."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.solution import (
    ConvergenceWarning,
    Info,
    NotConvergedError,
    Solution,
    StructureError,
)


@dataclass(frozen=True, kw_only=True)
class LinearSolver(ABC):
    """Settings of a solver of ``A x = b``; immutable, comparable, cheap to copy.

    Parameters
    ----------
    rtol
        Converged when ``|b - A x| <= max(rtol |b|, atol)``. None means the square root of the
        dtype's machine epsilon: 1.5e-8 in float64, 3.5e-4 in float32.
    atol
        Absolute tolerance.
    strict
        Raise `NotConvergedError` where the default warns with `ConvergenceWarning`.
    """

    rtol: float | None = None
    atol: float = 0.0
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{type(self).__name__}: {name}={value}; expected a number >= 0")

    @property
    def truncated(self) -> bool:
        """Whether stopping at the iteration limit is the method, and so not worth a warning."""
        return False

    def tolerance(self, dtype: torch.dtype) -> float:
        """Relative tolerance that holds for a dtype."""
        return float(torch.finfo(dtype).eps) ** 0.5 if self.rtol is None else self.rtol

    @abstractmethod
    def prepare(self, A: LinearOperator) -> PreparedSolver:
        """Do the work that depends on A alone.

        Raises
        ------
        StructureError
            A lacks a structure that this solver needs.
        """


@dataclass
class Progress:
    """What a solver's own loop reports: per-column flags are reduced to the worst."""

    iterations: int = 0
    products: int = 0
    status: str = "converged"
    detail: str = ""
    residual: Tensor | None = None  # b - A x, where the solver has just measured it


class PreparedSolver(ABC):
    """A solver bound to its operator; holds the factorisation, if there is one.

    `solve` may be called many times, with vectors ``(n,)``, blocks ``(n, k)`` and nested structures
    of the operator's codomain. Columns are scaled to unit norm before the solve and back after it,
    so a right-hand side of 1e-30 is solved as well as one of 1.
    """

    def __init__(self, solver: LinearSolver, A: LinearOperator) -> None:
        if A.shape[0] != A.shape[1]:
            raise StructureError(f"{type(solver).__name__} needs a square operator; got {A!r}")
        A.check_claims()
        self.solver, self.A = solver, A

    @abstractmethod
    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        """Solve ``A X = B`` for a block ``(n, k)`` of unit columns.

        `targets`, ``(k,)``, are the residual norms at which an iteration may stop.
        """

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        """Solve ``A^T X = B``; a symmetric operator needs nothing new."""
        if self.A.symmetric:
            return self._solve(block, targets)
        return self._transposed._solve(block, targets)

    @cached_property
    def _transposed(self) -> PreparedSolver:
        return self.solver.prepare(self.A.T)

    def solve(self, b: Any) -> Solution:
        """``x`` with ``A x = b``.

        Parameters
        ----------
        b
            ``(n,)``, ``(n, k)``, or a nested structure of ``A.codomain``.

        Returns
        -------
        Solution
            ``value`` of the shape of b, and ``info``.

        Raises
        ------
        ValueError
            b has a wrong shape or holds NaN or infinity.
        TypeError
            b has a wrong dtype or device.
        NotConvergedError
            With ``strict=True``.
        """
        return self._run(b, transpose=False)

    def solve_transpose(self, b: Any) -> Solution:
        """``x`` with ``A^T x = b``; arguments and errors as `solve`."""
        return self._run(b, transpose=True)

    def _run(self, b: Any, *, transpose: bool) -> Solution:
        operator = self.A.T if transpose else self.A
        space = operator.codomain
        nested = not isinstance(b, Tensor) or (not space.is_flat and space.holds(b))
        flat = space.ravel(b, "b") if nested else b
        _check_right_hand_side(flat, operator)
        block = flat[:, None] if flat.ndim == 1 else flat

        # Scaling by the largest entry first keeps the norm of a tiny column from underflowing.
        largest = block.abs().amax(dim=0) if block.shape[0] else block.new_zeros(block.shape[1])
        nonzero = largest > 0
        scale = torch.where(nonzero, largest, 1.0)
        unit = block / scale
        norm = torch.where(nonzero, torch.linalg.vector_norm(unit, dim=0), 1.0)
        unit = unit / norm

        # |b - A x| <= max(rtol |b|, atol), in units of the scaled column.
        rtol = self.solver.tolerance(unit.dtype)
        targets = torch.clamp_min(self.solver.atol / (scale * norm), rtol)
        x, progress = (self._solve_transpose if transpose else self._solve)(unit, targets)
        if progress.residual is None:
            progress.residual = unit - operator._matmat(x)
            progress.products += block.shape[1]
        residuals = torch.linalg.vector_norm(progress.residual, dim=0)
        value = (x * norm) * scale
        # The unit column was solved, but a solution beyond the range of the dtype is none.
        residuals = torch.where(torch.isfinite(value).all(dim=0), residuals, torch.inf)
        info = self._judge(residuals, targets, progress)
        value = value[:, 0] if flat.ndim == 1 else value
        return Solution(operator.domain.unravel(value) if nested else value, info)

    def _judge(self, residuals: Tensor, targets: Tensor, progress: Progress) -> Info:
        """Compare the true residual with the tolerance, and warn or raise where it is missed."""
        residual = float(residuals.max()) if residuals.numel() else 0.0
        asked = float(targets.max()) if targets.numel() else 0.0
        converged = bool((residuals <= targets).all())  # false for NaN
        status = progress.status
        if converged:
            status = "converged"
        elif status == "converged":
            status = "inaccurate"
        name = type(self.solver).__name__
        reason = (
            f"{name} on {self.A!r}: {status} after {progress.iterations} iterations with true "
            f"relative residual {residual:.3g}; asked for {asked:.3g}"
        )
        if progress.detail:
            reason += f" ({progress.detail})"
        info = Info(
            converged, progress.iterations, residual, repr(self.solver), status, reason,
            progress.products,
        )  # fmt: skip
        if not converged:
            if self.solver.strict:
                raise NotConvergedError(info)
            if not (self.solver.truncated and status == "maxiter"):
                warnings.warn(reason, ConvergenceWarning, stacklevel=4)
        return info


def _check_right_hand_side(b: Tensor, operator: LinearOperator) -> None:
    n = operator.shape[0]
    if b.ndim not in (1, 2) or b.shape[0] != n:
        raise ValueError(
            f"b has shape {tuple(b.shape)}; expected ({n},), ({n}, k), or the nested structure "
            f"{operator.codomain}"
        )
    if b.dtype != operator.dtype or b.device != operator.device:
        raise TypeError(
            f"b is {b.dtype} on {b.device}; expected {operator.dtype} on {operator.device}"
        )
    if not bool(torch.isfinite(b).all()):
        count = int((~torch.isfinite(b)).sum())
        raise ValueError(f"b holds {count} NaN or infinite entries; expected finite numbers")
