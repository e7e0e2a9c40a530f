"""The contract of every solver: frozen settings, ``prepare(A)``, then any number of solves."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators import LinearOperator, Space, Stacked
from operators.closures import hidden
from operators.solve_rule import Given, apply_inverse
from operators.tracing import differentiating, full_precision, tracked
from solvers.columns import divisors, largest, lengths, units
from solvers.least_squares_rule import apply_least_squares
from solvers.matrix import as_operator, numbers, values
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
    # Whether its iteration starts somewhere, and so may start from a guess.
    takes_guess: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is None and name == "rtol":
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{type(self).__name__}: {name}={value!r}; expected a number >= 0")
            if not 0 <= value < float("inf"):
                raise ValueError(f"{type(self).__name__}: {name}={value}; expected a number >= 0")

    @property
    def truncated(self) -> bool:
        """Whether stopping early, or at a rank, is the method, and so not worth a warning."""
        return False

    @property
    def columnwise(self) -> bool:
        """Whether the members of a batch can be the columns of one block (see `Members`).

        A solver for which they cannot solves them one by one.
        """
        return False

    def minimises(self, A: LinearOperator) -> bool:
        """Whether x for this A minimises ``|b - A x|``, and is judged by that."""
        return self.least_squares

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
    limit: int = 0  # on the iterations
    products: int = 0
    status: str = "converged"
    detail: str = ""
    residual: Tensor | None = None  # b - A x, where the solver has just measured it
    refreshed: bool = False

    def stopped(self, status: str, detail: str = "") -> None:
        """Note why a column stopped; of several columns the first counts."""
        if self.status == "converged" and status != "converged":
            self.status, self.detail = status, detail

    def include(self, other: Progress) -> None:
        """Take in what other columns took; they iterated side by side."""
        self.iterations = max(self.iterations, other.iterations)
        self.products += other.products
        self.refreshed |= other.refreshed
        self.stopped(other.status, other.detail)


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
    # Rank that a factorisation found, where it finds one; of a batch the least.
    rank: int | None = None
    setup_seconds: float = 0.0

    def __init__(self, solver: LinearSolver, A: LinearOperator) -> None:
        if A.shape[0] != A.shape[1] and not solver.minimises(A):
            raise StructureError(
                f"{type(solver).__name__} needs a square operator; got {A!r}: least squares are "
                "for QR, SVD or LSMR"
            )
        self._check_claims(A)
        self.solver, self.A = solver, A
        # The operator as the user gave it: with tensors that may be differentiated.
        self.given: LinearOperator = A.stack if isinstance(A, Members) else A

    def _check_claims(self, A: LinearOperator) -> None:
        """Try what is claimed of A; where `_prepare` refutes a false claim itself, less will do."""
        A.check_claims()

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

    def _answer(
        self, block: Tensor, targets: Tensor, *, transpose: bool
    ) -> tuple[Tensor, Progress]:
        """`_solve` or `_solve_transpose`, and what follows from how it went."""
        return (self._solve_transpose if transpose else self._solve)(block, targets)

    def update(self, A: Any) -> PreparedSolver:
        """The solver prepared for another operator of the same kind.

        What depends on the structure of A alone (the symbolic analysis, an ordering) is kept; the
        colouring of a `operators.SparseJacobian` is, where the new one is made with ``plan=``. An
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

    def solve(self, b: Any, *, guess: Any = None) -> Solution:
        """``x`` with ``A x = b``.

        Parameters
        ----------
        b
            ``(n,)``, ``(n, k)``, or a nested structure of ``A.codomain``.
        guess
            Where an iteration starts, of the shape of x; one vector ``(n,)`` does for all columns
            of a block. It costs two products, and a column for which it is worse than zero starts
            from zero. The tolerance stays relative to b, and no derivative is taken with respect
            to it. Of use to iterative solvers; others do not look at it, nor does least squares,
            where the shortest x is asked for. Not used where ``torch.func.vmap`` maps over it.

        Returns
        -------
        Solution
            ``value`` of the shape of b, and ``info``.

        Raises
        ------
        ValueError
            b or guess has a wrong shape or holds NaN or infinity.
        TypeError
            b or guess has a wrong dtype or device.
        NotConvergedError
            With ``strict=True``.
        """
        return self._run(b, guess, transpose=False)

    def solve_transpose(self, b: Any, *, guess: Any = None) -> Solution:
        """``x`` with ``A^T x = b``; arguments and errors as `solve`."""
        return self._run(b, guess, transpose=True)

    @property
    def relative(self) -> PreparedSolver:
        """The same without `atol`: the right-hand sides of derivatives have units of their own."""
        if not self.solver.atol:
            return self
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, solver=replace(self.solver, atol=0.0))
        return twin

    def condition(self) -> float:
        """Estimate of ``|A|_1 |A^-1|_1``, from below; see `solvers.condition`."""
        from solvers.condition import condition_estimate

        return condition_estimate(self)

    def _run(self, b: Any, guess: Any, *, transpose: bool) -> Solution:
        if guess is not None:
            used = self.solver.takes_guess and not self.solver.minimises(self.A)
            guess = values(guess) if used else None
        leaves = pytree.tree_leaves((b, self.given))
        if differentiating():
            leaves += hidden(self.given)  # which are refused, with the remedy
        if any(isinstance(leaf, Tensor) and tracked(leaf) for leaf in leaves):
            return self._differentiable(b, guess, transpose)
        return self._measured(b, guess, transpose)

    def _measured(self, b: Any, guess: Any, transpose: bool) -> Solution:
        """Solve for numbers, whatever is differentiated; say what was not reached."""
        solution = self._attempt(b, transpose=transpose, guess=guess)
        info = solution.info
        if not info.converged:
            if self.solver.strict:
                raise NotConvergedError(info)
            if not (self.solver.truncated and info.status in ("maxiter", "truncated")):
                warnings.warn(info.reason, ConvergenceWarning, stacklevel=4)
        return solution

    def _differentiable(self, b: Any, guess: Any, transpose: bool) -> Solution:
        space = self.given.domain if transpose else self.given.codomain
        nested = space.nests(b)
        log: list[Info] = []
        least_squares = self.solver.minimises(self.A)
        rule = apply_least_squares if least_squares else apply_inverse
        flat = space.ravel(b, "b") if nested else b
        plain = _Plain(self, guess, transpose)
        value = rule(self.given, flat, Given(plain, self.solver, log), transpose=transpose)
        image = self.given.codomain if transpose else self.given.domain
        return Solution(image.unravel(value) if nested else value, log[0])

    @torch.no_grad()
    def _attempt(self, b: Any, *, transpose: bool, guess: Any = None) -> Solution:
        """Solve and measure; nothing is said about what was not reached."""
        with full_precision(self.A.device):
            return self._attempted(b, transpose, guess)

    def _attempted(self, b: Any, transpose: bool, guess: Any) -> Solution:
        start = time.perf_counter()
        operator = self.A.T if transpose else self.A
        whole = operator.stack if isinstance(operator, Members) else operator
        space = whole.codomain
        nested = space.nests(b)
        flat = space.ravel(b, "b") if nested else b
        _check_vectors("b", flat, whole.codomain)
        block = flat[:, None] if flat.ndim == 1 else flat
        b_columns = block.shape[1]
        if isinstance(operator, Members):
            block = operator.block(operator.stack.scattered(block, transpose=True))

        unit, scale, norm = units(block)
        # |b - A x| <= max(rtol |b|, atol), in units of the scaled column.
        rtol = self.solver.tolerance(unit.dtype)
        targets = torch.full_like(norm, rtol)
        if self.solver.atol:
            targets = torch.clamp_min(self.solver.atol / (scale * norm), rtol)
        solve = partial(self._answer, transpose=transpose)
        if guess is None:
            x, progress = solve(unit, targets)
        else:
            near = _columns("guess", guess, operator, b_columns) / scale / norm
            x, progress = _corrected(solve, operator, unit, targets, near)
        if progress.residual is None:
            progress.residual = unit - operator._matmat(x)
            progress.products += block.shape[1]
        residuals = torch.linalg.vector_norm(progress.residual, dim=0)
        normal = None
        if self.solver.minimises(self.A):
            normal = self._normal_residual(operator, progress)
        value = (x * norm).mul_(scale)
        # The unit column was solved, but a solution beyond the range of the dtype is none.
        residuals = torch.where(torch.isfinite(largest(value)), residuals, torch.inf)
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
        norms = self._norms
        norms = norms.repeat_interleave(residual.shape[1] // len(norms), dim=0)
        # Of a unit residual: neither a tiny one nor a tiny A may pass for a gradient of zero.
        gradient = lengths(operator.T._matmat(residual / divisors(lengths(residual))))
        return torch.where(gradient == 0, 0.0, gradient / norms)

    @cached_property
    def _norms(self) -> Tensor:
        """Lower estimates of ``|A|`` (2-norm), ``(1,)``, or ``(B,)`` of the members of a batch.

        By ten steps of the power method for ``A^T A``, whose estimates can only rise.
        """
        A, T, count = self.A, self.A.T, len(self.A) if isinstance(self.A, Members) else 1
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(A.shape[1], 1, generator=generator, dtype=torch.float64)
        v = v.to(A.dtype).to(A.device).expand(-1, count)
        if not v.numel():
            return v.new_zeros(count)
        for _ in range(9):
            v = A._matmat(v / divisors(largest(v)))
            v = T._matmat(v / divisors(largest(v)))
        return lengths(A._matmat(v / divisors(lengths(v))))

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

    @property
    def rank(self) -> int | None:  # type: ignore[override]
        """The least that a member has found."""
        ranks = [one.rank for one in self.members if one.rank is not None]
        return min(ranks) if ranks else None

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._each(block, targets, transpose=False)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._each(block, targets, transpose=True)

    def _each(self, block: Tensor, targets: Tensor, *, transpose: bool) -> tuple[Tensor, Progress]:
        members = self.A
        assert isinstance(members, Members)
        total, parts, residuals = Progress(), [], []
        allowed = targets.reshape(len(members), -1)
        for one, columns, target in zip(self.members, members.batch(block), allowed, strict=True):
            x, progress = one._answer(columns, target, transpose=transpose)
            parts.append(x)
            residuals.append(progress.residual)
            total.include(progress)
        measured = [residual for residual in residuals if residual is not None]
        if len(measured) == len(members):
            total.residual = members.block(torch.stack(measured))
        return members.block(torch.stack(parts)), total

    def _normal_residual(self, operator: LinearOperator, progress: Progress) -> Tensor:
        """As each member judges itself."""
        assert isinstance(operator, Members)
        assert progress.residual is not None
        parts = []
        for i, (one, residual) in enumerate(
            zip(self.members, operator.batch(progress.residual), strict=True)
        ):
            own = Progress(residual=residual)
            A = one.A if operator is self.A else operator.member(i)
            parts.append(one._normal_residual(A, own))
            progress.products += own.products
        return torch.cat(parts)

    def _update(self, A: LinearOperator) -> PreparedSolver:
        if not isinstance(A, Members) or len(A) != len(self.members):
            return super()._update(A)
        updated = [one._update(A.member(i)) for i, one in enumerate(self.members)]
        return OneByOne(self.solver, A, updated)


class _Plain:
    """A prepared solver inside the derivative rule: plain numbers, whatever it was prepared of.

    The first solve starts from a guess where there is one; those of derivatives do not.
    """

    def __init__(self, prepared: PreparedSolver, guess: Any, transpose: bool) -> None:
        self.prepared, self.guess, self.transpose = prepared, guess, transpose
        self.solver, self.A = prepared.solver, prepared.A

    @property
    def rank(self) -> int | None:
        return self.prepared.rank

    @property
    def relative(self) -> _Plain:
        return _Plain(self.prepared.relative, None, self.transpose)

    def solve(self, b: Tensor) -> Solution:
        return self.prepared._measured(b, self._taken(False), transpose=False)

    def solve_transpose(self, b: Tensor) -> Solution:
        return self.prepared._measured(b, self._taken(True), transpose=True)

    def _taken(self, transpose: bool) -> Any:
        if transpose != self.transpose:
            return None
        guess, self.guess = self.guess, None
        return guess


def _corrected(
    solve: Callable[[Tensor, Tensor], tuple[Tensor, Progress]],
    A: LinearOperator,
    unit: Tensor,
    targets: Tensor,
    guess: Tensor,
) -> tuple[Tensor, Progress]:
    """The guess and a solution for what it leaves of b; zero where it leaves more than all of b."""
    rest = unit - A._matmat(guess)
    left = torch.linalg.vector_norm(rest, dim=0)
    better = left < torch.linalg.vector_norm(unit, dim=0)  # false for NaN
    guess, rest = torch.where(better, guess, 0.0), torch.where(better, rest, unit)
    size = torch.where(better & (left > 0), left, 1.0)
    correction, progress = solve(rest / size, targets / size)
    # What the solver measured knows nothing of the rounding of the sum.
    progress.residual = None
    progress.products += unit.shape[1]
    return guess + correction * size, progress


def _columns(name: str, value: Any, A: LinearOperator, count: int) -> Tensor:
    """A vector, a block or a nested structure of the domain of A as so many columns."""
    whole = A.stack if isinstance(A, Members) else A
    space = whole.domain
    nested = space.nests(value)
    flat = space.ravel(value, name) if nested else value
    _check_vectors(name, flat, space)
    block = flat[:, None] if flat.ndim == 1 else flat
    if block.shape[1] not in (1, count):
        raise ValueError(f"{name} has {block.shape[1]} columns for {count} of b")
    block = block.expand(-1, count)
    return A.block(A.stack.scattered(block)) if isinstance(A, Members) else block


def _check_vectors(name: str, value: Tensor, space: Space) -> None:
    n = space.size
    if value.ndim not in (1, 2) or value.shape[0] != n:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; expected ({n},), ({n}, k), or the nested "
            f"structure {space}"
        )
    if value.dtype != space.dtype or value.device != space.device:
        raise TypeError(
            f"{name} is {value.dtype} on {value.device}; expected {space.dtype} on {space.device}"
        )
    if not bool(torch.isfinite(largest(value)).all()):
        count = int((~torch.isfinite(value)).sum())
        raise ValueError(f"{name} holds {count} NaN or infinite entries; expected finite numbers")
