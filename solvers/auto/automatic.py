"""`Auto`: the solver that suits an operator, and `explain`, which says why."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.auto.choice import plan_for
from solvers.auto.plan import Plan, Request
from solvers.auto.trial import Trial
from solvers.iterative import PreparedIteration
from solvers.linear_solver import LinearSolver, OneByOne, PreparedSolver, Progress
from solvers.matrix import as_operator, looked_up
from solvers.members import Members
from solvers.solution import Info, MissingLibraryError, StructureError


@dataclass(frozen=True, kw_only=True)
class Auto(LinearSolver):
    """Choose a solver by structure, size, predicted fill and memory; go on to the next if it fails.

    `explain` prints the chain that it follows, and ``info.reason`` says which member solved and
    why. A member fails where it misses the tolerance, by the true residual, or finds that the
    operator lacks what it needs. Where all fail the best answer is returned, as not converged.

    Parameters
    ----------
    solves
        Right-hand sides to expect of a prepared operator: a factorisation pays for many, an
        iteration for few. By default two, a solve and its adjoint.
    memory
        Bytes that a solver may take beyond the operator; by default half of what is free.
    rtol, atol, strict
        As for `LinearSolver`.

    Notes
    -----
    A structure that has a solver of its own goes first (diagonal, permutation, triangular,
    circulant, Kronecker, block diagonal, low rank plus diagonal). A sparse matrix is factorised
    where the fill that CHOLMOD's analysis predicts is cheap, and goes to multigrid and CG where it
    is not; dense matrices are factorised; operators of functions go to CG, MINRES or GMRES.
    An iteration that may be short, and cannot be known to be, is tried for a share of the cost of
    the next solver, and goes on only where its rate promises to be cheaper. The constants are in
    `solvers.auto.costs`, with the benchmark that measured them.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.LowRankPlusDiagonal(torch.ones(1, 1000, dtype=torch.float64), 2.0)
    >>> x, info = Auto().prepare(A).solve(torch.ones(1000, dtype=torch.float64))
    >>> info.solver.split("(")[0]
    'Auto: Woodbury'
    """

    solves: int = 2
    memory: float | None = None

    takes_guess: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.solves, int):
            raise TypeError(f"Auto: solves={self.solves!r}; expected an integer")
        if self.memory is not None and not isinstance(self.memory, (int, float)):
            raise TypeError(f"Auto: memory={self.memory!r}; expected a number of bytes, or None")
        if self.solves < 1:
            raise ValueError(f"Auto: solves={self.solves}; expected at least 1")
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"Auto: memory={self.memory}; expected a positive number of bytes")

    @property
    def columnwise(self) -> bool:
        """True: it looks at a batch as a whole."""
        return True

    def minimises(self, A: LinearOperator) -> bool:
        """Where A is rectangular."""
        return A.shape[0] != A.shape[1]

    def request(self, A: LinearOperator) -> Request:
        """What the plan for A is made for."""
        memory = free_memory(A.device) / 2 if self.memory is None else self.memory
        tolerances = {"rtol": self.rtol, "atol": self.atol}
        return Request(tolerances, self.tolerance(A.dtype), self.solves, memory)

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        if isinstance(A, Members) and not len(A):
            return OneByOne(self, A)
        model = A.member(0) if isinstance(A, Members) else A
        plan = plan_for(model, self.request(A))
        if not plan.candidates:
            refused = "; ".join(plan.refused)
            raise StructureError(f"no solver for {A!r} within the memory allowed: {refused}")
        first = plan.candidates[0]
        if isinstance(A, Members) and (first.trial is not None or not first.solver.columnwise):
            return OneByOne(self, A)
        return PreparedAuto(self, A, plan)


class PreparedAuto(PreparedSolver):
    """A chain of solvers for one operator; one that is not needed is never prepared."""

    solver: Auto

    def __init__(self, solver: Auto, A: LinearOperator, plan: Plan) -> None:
        self._prepared: dict[int, PreparedSolver | str] = {}
        self._failures: dict[int, str] = {}
        # The first that has not failed, and the one that made the last solution.
        self._current = self._used = 0
        super().__init__(solver, A if isinstance(A, Members) else looked_up(A))
        self.plan = plan
        self._served = 0
        self._advance()

    @property
    def rank(self) -> int | None:  # type: ignore[override]
        """That which the member found that solved last."""
        member = self._prepared.get(self._used)
        return member.rank if isinstance(member, PreparedSolver) else None

    def _advance(self) -> None:
        while self._current < len(self.plan.candidates) and self._member(self._current) is None:
            self._current += 1

    def _member(self, index: int) -> PreparedSolver | None:
        """A prepared member of the chain; None where it cannot be prepared."""
        if index not in self._prepared:
            candidate = self.plan.candidates[index]
            try:
                self._prepared[index] = candidate.solver._prepared(self.A)
            except (StructureError, MissingLibraryError) as error:
                self._prepared[index] = self._failures[index] = str(error)
        member = self._prepared[index]
        return None if isinstance(member, str) else member

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._through(block, targets, transpose=False)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._through(block, targets, transpose=True)

    def _through(
        self, block: Tensor, targets: Tensor, *, transpose: bool
    ) -> tuple[Tensor, Progress]:
        """The first solution along the chain that meets the targets, else the nearest."""
        operator = self.A.T if transpose else self.A
        best: tuple[float, int, Tensor, Progress] | None = None
        products = 0
        for index in range(self._current, len(self.plan.candidates)):
            member, trial = self._member(index), self._trial(index, targets)
            if member is None or (trial is not None and not trial.iterations):
                continue
            with contextlib.ExitStack() as stack:
                if trial is not None:
                    assert isinstance(member, PreparedIteration)
                    stack.enter_context(trial.of(member))
                x, progress = member._answer(block, targets, transpose=transpose)
            if progress.residual is None:
                progress.residual = block - operator._matmat(x)
                progress.products += block.shape[1]
            distance = self._distance(operator, progress, targets)
            products += progress.products
            if best is None or not best[0] <= distance:
                best = (distance, index, x, progress)
            if distance <= 1:
                # What failed once is not tried again.
                self._current = index
                break
            name = self.plan.candidates[index].name
            status = "inaccurate" if progress.status == "converged" else progress.status
            self._failures[index] = f"{name}: {status} at {distance:.3g} times the tolerance" + (
                f" ({progress.detail})" if progress.detail else ""
            )
        if best is None:
            raise StructureError(f"no solver for {self.A!r}: " + "; ".join(self._failures.values()))
        _, self._used, x, progress = best
        self._served += 1
        progress.products = products
        return x, progress

    def _distance(self, operator: LinearOperator, progress: Progress, targets: Tensor) -> float:
        """Worst residual as a multiple of what is allowed; infinite where it is no number."""
        assert progress.residual is not None
        if not targets.numel():
            return 0.0
        share = torch.linalg.vector_norm(progress.residual, dim=0) / targets
        if self.solver.minimises(self.A):
            share = torch.minimum(share, self._normal_residual(operator, progress) / targets)
        worst = float(share.max())
        return worst if worst == worst else float("inf")

    def _trial(self, index: int, targets: Tensor) -> Trial | None:
        """How a member is tried for these columns; None where it is not on trial."""
        candidate, columns = self.plan.candidates[index], max(len(targets), 1)
        if candidate.trial is None:
            return None
        following = self.plan.candidates[index + 1]
        solves = max(self.plan.solves - self._served, columns)
        start = float((1 / targets).max()) if len(targets) else 1.0
        return Trial(candidate, following, solves, columns, start)

    def _judge(self, *args: Any) -> Info:
        info = super()._judge(*args)
        candidate = self.plan.candidates[self._used]
        member = self._member(self._used)
        assert member is not None
        reason = info.reason.replace("Auto on", f"{candidate.name} on", 1)
        reason = f"{reason}; chosen by Auto: {candidate.reason}"
        if self._failures:
            reason += "; before it failed: " + "; ".join(
                message for index, message in self._failures.items() if index != self._used
            )
        return replace(
            info,
            solver=f"Auto: {candidate.solver!r}",
            reason=reason.removesuffix("; before it failed: "),
            backend=member.backend,
            factor_nonzeros=member.factor_nonzeros,
            operator_complexity=member.operator_complexity,
        )

    def _update(self, A: LinearOperator) -> PreparedSolver:
        member = self._member(self._current) if self._current < len(self.plan.candidates) else None
        if member is None or isinstance(A, Members) != isinstance(self.A, Members):
            return self.solver._prepared(A)
        updated = object.__new__(PreparedAuto)
        PreparedSolver.__init__(updated, self.solver, A)
        updated.plan, updated._failures = self.plan, {}
        updated._current = updated._used = self._current
        updated._served = 0
        try:
            updated._prepared = {self._current: member._update(A)}
        except StructureError:
            return self.solver._prepared(A)
        return updated


def explain(A: Any, solver: Auto = Auto()) -> Plan:
    """The chain of solvers that `Auto` follows for A: each with its reason and predicted cost.

    Parameters
    ----------
    A
        As for `LinearSolver.prepare`.
    solver
        Settings of `Auto`.

    Returns
    -------
    Plan
        Prints as a list; `candidates` holds the settings of each solver.

    Examples
    --------
    >>> import torch
    >>> print(explain(torch.eye(3) + 1.0))  # doctest: +ELLIPSIS
    Dense(3, 3) float32; symmetric
    1. DenseCholesky (about ...): ...
    """
    operator = as_operator(A)
    operator.check_claims()
    return plan_for(operator, solver.request(operator))


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
