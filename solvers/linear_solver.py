"""The contract of every solver: frozen settings, ``prepare(A)``, then any number of solves."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators import LinearOperator, Stacked
from operators.solve_rule import Given, apply_inverse
from operators.tracing import tracked
from solvers.least_squares_rule import apply_least_squares
from solvers.matrix import as_operator, numbers
from solvers.members import Members
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

    A subclass implements `_prepare`, which returns a `PreparedSolver` of its own.

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

    # A batch goes to `prepare` whole (see `operators.Inverse`).
    stacks: ClassVar[bool] = True
    # Whether it takes rectangular and singular operators: x minimises |b - A x|, then |x|.
    least_squares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{type(self).__name__}: {name}={value}; expected a number >= 0")

    @property
    def truncated(self) -> bool:
        """Whether stopping at the iteration limit is the method, and so not worth a warning."""
        return False

    @property
    def columnwise(self) -> bool:
        """Whether the members of a batch can be the columns of one block (see `Members`).

        A solver for which they cannot solves them one by one.
        """
        return False

    def tolerance(self, dtype: torch.dtype) -> float:
        """Relative tolerance that holds for a dtype."""
        return float(torch.finfo(dtype).eps) ** 0.5 if self.rtol is None else self.rtol

    def prepare(self, A: Any) -> PreparedSolver:
        """Do the work that depends on A alone.

        Parameters
        ----------
        A
            Operator, dense tensor ``(m, n)``, or sparse matrix of torch or scipy. Of a matrix the
            facts are looked up (see `solvers.matrix.as_operator`). A `operators.Stacked` batch is
            solved member by member, each to its own convergence.

        Raises
        ------
        TypeError, ValueError
            A is no such thing.
        StructureError
            A lacks a structure that this solver needs.
        operators.FalseClaimError
            A claim about A is false.
        """
        given = as_operator(A)
        start = time.perf_counter()
        prepared = self._prepared(numbers(given, f"{type(self).__name__}.prepare"))
        prepared.given, prepared.setup_seconds = given, time.perf_counter() - start
        return prepared

    def _prepared(self, A: LinearOperator) -> PreparedSolver:
        if isinstance(A, Stacked):
            A = Members(A)
        if isinstance(A, Members) and not self.columnwise:
            return OneByOne(self, A)
        return self._prepare(A)

    @abstractmethod
    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """`prepare` for an operator; one of `Members` only where the class is `columnwise`."""


@dataclass
class Progress:
    """What a solver's own loop reports: per-column flags are reduced to the worst."""

    iterations: int = 0
    products: int = 0
    status: str = "converged"
    detail: str = ""
    residual: Tensor | None = None  # b - A x, where the solver has just measured it
    refreshed: bool = False


class PreparedSolver(ABC):
    """A solver bound to its operator; holds the factorisation, if there is one.

    `solve` may be called many times, with vectors ``(n,)``, blocks ``(n, k)`` and nested structures
    of the operator's codomain. Columns are scaled to unit norm before the solve and back after it,
    so a right-hand side of 1e-30 is solved as well as one of 1.

    Where b or a tensor of the operator is being differentiated, the solution is too, by solves with
    the same factorisation (see `solvers.solve`).

    A pickle or a copy holds the settings and the operator, not the factorisation: it prepares anew.
    """

    # What does the work, for `Info`.
    backend: str = "torch"
    factor_nonzeros: int | None = None
    operator_complexity: float | None = None
    # Rank that a factorisation found, where it finds one.
    rank: int | None = None
    setup_seconds: float = 0.0

    def __init__(self, solver: LinearSolver, A: LinearOperator) -> None:
        if A.shape[0] != A.shape[1] and not solver.least_squares:
            raise StructureError(
                f"{type(solver).__name__} needs a square operator; got {A!r}: least squares are "
                "for QR, SVD or LSMR"
            )
        A.check_claims()
        self.solver, self.A = solver, A
        # The operator as the user gave it: with tensors that may be differentiated.
        self.given: LinearOperator = A.stack if isinstance(A, Members) else A

    def __reduce__(self) -> tuple[Any, ...]:
        return self.solver.prepare, (self.given,)

    @abstractmethod
    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        """Solve ``A X = B`` for a block ``(n, k)`` of unit columns (or zeros).

        `targets`, ``(k,)``, are the residual norms at which an iteration may stop.
        """

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        """Solve ``A^T X = B``; a symmetric operator needs nothing new."""
        if self.A.symmetric:
            return self._solve(block, targets)
        return self._transposed._solve(block, targets)

    @cached_property
    def _transposed(self) -> PreparedSolver:
        return self.solver._prepared(self.A.T)

    def update(self, A: Any) -> PreparedSolver:
        """The solver prepared for another operator of the same kind.

        What depends on the structure of A alone (the symbolic analysis, an ordering) is kept. An
        iterative solver keeps its preconditioner too, stale as it then is, and makes it anew when a
        solve takes more than twice the iterations that it took when fresh.

        Parameters
        ----------
        A
            As for `LinearSolver.prepare`, of the same shape, dtype and device.

        Raises
        ------
        ValueError
            Another shape, dtype or device.

        Notes
        -----
        This object stays as it is, and good for its own operator.
        """
        A, old = as_operator(A), self.given
        if (A.shape, A.dtype, A.device) != (old.shape, old.dtype, old.device):
            raise ValueError(
                f"update with {A!r} ({A.dtype} on {A.device}) of a solver prepared for {old!r} "
                f"({old.dtype} on {old.device}); expected the same shape, dtype and device: "
                "prepare anew"
            )
        start = time.perf_counter()
        plain = numbers(A, "update")
        updated = self._update(Members(plain) if isinstance(plain, Stacked) else plain)
        updated.given, updated.setup_seconds = A, time.perf_counter() - start
        return updated

    def _update(self, A: LinearOperator) -> PreparedSolver:
        return self.solver._prepared(A)

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
        leaves = pytree.tree_leaves((b, self.given))
        if any(isinstance(leaf, Tensor) and tracked(leaf) for leaf in leaves):
            return self._differentiable(b, transpose)
        solution = self._attempt(b, transpose=transpose)
        info = solution.info
        if not info.converged:
            if self.solver.strict:
                raise NotConvergedError(info)
            if not (self.solver.truncated and info.status == "maxiter"):
                warnings.warn(info.reason, ConvergenceWarning, stacklevel=3)
        return solution

    def _differentiable(self, b: Any, transpose: bool) -> Solution:
        space = self.given.domain if transpose else self.given.codomain
        nested = not isinstance(b, Tensor) or (not space.is_flat and space.holds(b))
        log: list[Info] = []
        rule = apply_least_squares if self.solver.least_squares else apply_inverse
        flat = space.ravel(b, "b") if nested else b
        value = rule(self.given, flat, Given(self, self.solver, log), transpose=transpose)
        image = self.given.codomain if transpose else self.given.domain
        return Solution(image.unravel(value) if nested else value, log[0])

    @torch.no_grad()
    def _attempt(self, b: Any, *, transpose: bool) -> Solution:
        """Solve and measure; nothing is said about what was not reached."""
        start = time.perf_counter()
        operator = self.A.T if transpose else self.A
        whole = operator.stack if isinstance(operator, Members) else operator
        space = whole.codomain
        nested = not isinstance(b, Tensor) or (not space.is_flat and space.holds(b))
        flat = space.ravel(b, "b") if nested else b
        _check_right_hand_side(flat, whole)
        block = flat[:, None] if flat.ndim == 1 else flat
        if isinstance(operator, Members):
            block = operator.block(operator.stack.scattered(block, transpose=True))

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
        normal = None
        if self.solver.least_squares:
            normal = self._normal_residual(operator, progress)
        value = (x * norm) * scale
        # The unit column was solved, but a solution beyond the range of the dtype is none.
        residuals = torch.where(torch.isfinite(value).all(dim=0), residuals, torch.inf)
        if isinstance(operator, Members):
            value = operator.stack.gathered(operator.batch(value), transpose=True)
        value = value[:, 0] if flat.ndim == 1 else value
        info = self._judge(residuals, normal, targets, progress, time.perf_counter() - start)
        return Solution(whole.domain.unravel(value) if nested else value, info)

    def _normal_residual(self, operator: LinearOperator, progress: Progress) -> Tensor:
        """``|A^T r| / (|A| |r|)`` of each column: zero at a minimum of ``|b - A x|``."""
        residual = progress.residual
        assert residual is not None
        progress.products += residual.shape[1]
        size = self._norm * torch.linalg.vector_norm(residual, dim=0)
        gradient = torch.linalg.vector_norm(operator.T._matmat(residual), dim=0)
        return torch.where(size > 0, gradient / torch.where(size > 0, size, 1.0), 0.0)

    @cached_property
    def _norm(self) -> float:
        """Lower estimate of ``|A|`` (2-norm) by ten steps of the power method for ``A^T A``."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.A.shape[1], generator=generator, dtype=torch.float64)
        v = v.to(self.A.dtype).to(self.A.device)
        largest = 0.0
        for _ in range(10 if v.numel() else 0):
            v = v / torch.linalg.vector_norm(v)
            image = self.A._matvec(v)
            largest = max(largest, float(torch.linalg.vector_norm(image)))
            v = self.A.T._matvec(image)
            if not bool(torch.linalg.vector_norm(v) > 0):
                break
        return largest

    def _judge(
        self,
        residuals: Tensor,
        normal: Tensor | None,
        targets: Tensor,
        progress: Progress,
        seconds: float,
    ) -> Info:
        """Compare the true residual with the tolerance."""
        residual = float(residuals.max()) if residuals.numel() else 0.0
        asked = float(targets.max()) if targets.numel() else 0.0
        met = residuals <= targets  # false for NaN
        measured = f"with true relative residual {residual:.3g}"
        worst_normal = None
        if normal is not None:
            met = met | (normal <= targets) & torch.isfinite(residuals)
            worst_normal = float(normal.max()) if normal.numel() else 0.0
            measured += f" and |A^T r| / (|A| |r|) {worst_normal:.3g}"
        converged = bool(met.all())
        status = progress.status
        if converged:
            status = "converged"
        elif status == "converged":
            status = "inaccurate"
        name = type(self.solver).__name__
        reason = (
            f"{name} on {self.A!r}: {status} after {progress.iterations} iterations {measured}; "
            f"asked for {asked:.3g}"
        )
        if progress.detail:
            reason += f" ({progress.detail})"
        return Info(
            converged,
            progress.iterations,
            residual,
            repr(self.solver),
            status,
            reason,
            progress.products,
            backend=self.backend,
            normal_residual=worst_normal,
            factor_nonzeros=self.factor_nonzeros,
            operator_complexity=self.operator_complexity,
            refreshed=progress.refreshed,
            setup_seconds=self.setup_seconds,
            solve_seconds=seconds,
        )


class OneByOne(PreparedSolver):
    """The members of a batch, each prepared by itself."""

    def __init__(
        self, solver: LinearSolver, A: Members, prepared: list[PreparedSolver] | None = None
    ) -> None:
        super().__init__(solver, A)
        self.members = prepared or [solver._prepare(A.member(i)) for i in range(len(A))]
        nonzeros = [one.factor_nonzeros for one in self.members if one.factor_nonzeros is not None]
        self.factor_nonzeros = sum(nonzeros) if nonzeros else None
        self.backend = self.members[0].backend

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._each(block, targets, lambda one: one._solve)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._each(block, targets, lambda one: one._solve_transpose)

    def _each(self, block: Tensor, targets: Tensor, solve: Any) -> tuple[Tensor, Progress]:
        members = self.A
        assert isinstance(members, Members)
        total, parts = Progress(), []
        allowed = targets.reshape(len(members), -1)
        for one, columns, target in zip(self.members, members.batch(block), allowed, strict=True):
            x, progress = solve(one)(columns, target)
            parts.append(x)
            total.iterations = max(total.iterations, progress.iterations)
            total.products += progress.products
            total.refreshed |= progress.refreshed
            if progress.status != "converged" and total.status == "converged":
                total.status, total.detail = progress.status, progress.detail
        return members.block(torch.stack(parts)), total

    def _update(self, A: LinearOperator) -> PreparedSolver:
        if not isinstance(A, Members) or len(A) != len(self.members):
            return super()._update(A)
        updated = [one._update(A.member(i)) for i, one in enumerate(self.members)]
        return OneByOne(self.solver, A, updated)


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
