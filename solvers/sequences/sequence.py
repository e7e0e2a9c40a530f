"""Many related systems ``A_t x_t = b_t``, each solved with what the last ones taught."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from operators import LinearOperator
from solvers.iterative import IterativeSolver, PreparedIteration
from solvers.linear_solver import LinearSolver, PreparedSolver
from solvers.matrix import as_operator, numbers
from solvers.sequences.bandit import Bandit, TsallisINF
from solvers.sequences.knob import candidates
from solvers.sequences.warm_start import WarmStart
from solvers.solution import Info, NotConvergedError, Solution

Cost = Literal["iterations", "products", "seconds"]


@dataclass(frozen=True)
class Step:
    """How one solve of a `LinearSystemSequence` went.

    Parameters
    ----------
    info
        What the solver reported.
    transpose
        Whether the transposed system was solved.
    start
        Relative residual that the solve began with; 1 for a start from zero.
    fresh
        Whether the solver was prepared for this system, and not updated or used again.
    value
        Value of the knob; None where there is none.
    cost
        What the bandit was told; None where there is none.
    """

    info: Info
    transpose: bool
    start: float
    fresh: bool
    value: float | None = None
    cost: float | None = None


class LinearSystemSequence:
    """Solves systems that resemble each other: warm starts, kept preconditioners, a tuned knob.

    Parameters
    ----------
    solver
        Settings of the solver; or a function ``value -> settings``, whose `values` are tuned.
    knob
        Setting to tune, as ``"step_size"`` or ``"preconditioner.omega"``.
    values
        Its candidates, some 5 to 20 of them.
    bandit
        Chooses among the values; a `TsallisINF` if not given. A learner with contexts needs the
        `context` of each solve.
    cost
        What is to be small: ``"iterations"``, ``"products"`` with A, ``"seconds"`` of preparing and
        solving, or a function of the `Info`. A tolerance is for such a function: of the counts, the
        loosest tolerance has the least.
    warm_start
        Guess that an iteration starts from: ``"previous"``, the last solution; ``"linear"``,
        ``2 x_{t-1} - x_{t-2}``; None, zero. Either is scaled to the least residual, and used where
        it leaves less than nine tenths of b (see `WarmStart`).
    recycle
        Keep the preconditioner, as `PreparedSolver.update` does. None does so where no knob is
        tuned: a stale preconditioner would be blamed on the value that made it. Where there are
        both, each value keeps its own.
    refresh
        A kept preconditioner is made anew after a solve that took more than this many times the
        iterations a digit that it took when new.
    seed
        Of the bandit, where none is given.

    Raises
    ------
    TypeError, ValueError
        A setting is no such thing, does not exist, or does not fit the others.

    Notes
    -----
    A solve that did not converge costs as much as if it had gone on at its pace to the limit of
    iterations, so that a value for which the iteration breaks off at once is not taken for a quick
    one. It is not repeated with another value: ``info.converged`` tells. Give a generous `maxiter`.

    A guess costs three products with A, of which ``info.products`` counts two. Where shape, dtype
    or device change, all but the bandit starts anew. Forward and transposed solutions are
    remembered apart, and the solver prepared for the one serves the other where A is the same
    operator. Derivatives go through each solve as through `PreparedSolver.solve`, not through its
    guess; the solves that they take are not part of the sequence.

    Source for the knob, tuned by the count of iterations alone: Khodak, Chow, Balcan and Talwalkar
    (2024), arXiv:2310.02246.

    Examples
    --------
    >>> import torch, solvers
    >>> systems = LinearSystemSequence(
    ...     solvers.Neumann(rtol=1e-6, maxiter=1000),
    ...     knob="step_size",
    ...     values=[0.1, 0.5, 1.0],
    ...     warm_start=None,
    ... )
    >>> b = torch.ones(3, dtype=torch.float64)
    >>> for shift in torch.linspace(0.0, 0.3, 200, dtype=torch.float64):
    ...     A = torch.diag(torch.tensor([0.5, 0.8, 1.0], dtype=torch.float64) + shift)
    ...     x, info = systems.solve(A, b)
    >>> torch.allclose(A @ x, b, rtol=1e-5)
    True
    >>> chosen = [step.value for step in systems.history[-100:]]
    >>> max(systems.values, key=chosen.count)
    1.0
    """

    def __init__(
        self,
        solver: LinearSolver | Callable[[float], LinearSolver],
        *,
        knob: str | None = None,
        values: Sequence[float] | None = None,
        bandit: Bandit | None = None,
        cost: Cost | Callable[[Info], float] = "iterations",
        warm_start: Literal["previous", "linear"] | None = "previous",
        recycle: bool | None = None,
        refresh: float = 2.0,
        seed: int = 0,
    ) -> None:
        if not callable(cost) and cost not in get_args(Cost):
            raise ValueError(f"cost={cost!r}; expected one of {get_args(Cost)}, or a function")
        if not refresh >= 1:
            raise ValueError(f"refresh={refresh}; expected at least 1")
        self.solvers = candidates(solver, knob, values)
        self.values = None if values is None else tuple(values)
        self.cost, self.refresh = cost, refresh
        self.recycle = values is None if recycle is None else recycle
        self.bandit = self._checked(bandit, seed)
        self.history: list[Step] = []
        self._kept: dict[int, _Kept] = {}
        self._starts = {transpose: WarmStart(warm_start) for transpose in (False, True)}

    def _checked(self, bandit: Bandit | None, seed: int) -> Bandit | None:
        if self.values is None:
            if bandit is not None:
                raise ValueError("a bandit without values to choose from: give knob= and values=")
            return None
        if bandit is None:
            least = 1.0 if self.cost == "iterations" else 0.0
            return TsallisINF(len(self.values), least=least, seed=seed)
        if bandit.arms != len(self.values):
            raise ValueError(f"the bandit has {bandit.arms} arms for {len(self.values)} values")
        if self.cost == "seconds" and bandit.least > 0:
            raise ValueError(
                f"the bandit has least={bandit.least:g}, but seconds may be fewer; make it with "
                "least=0.0"
            )
        return bandit

    def solve(self, A: Any, b: Any, *, context: float | None = None) -> Solution:
        """``x`` with ``A x = b``, the next system.

        Parameters
        ----------
        A
            As for `LinearSolver.prepare`.
        b
            As for `PreparedSolver.solve`.
        context
            A number known beforehand that the cost depends on, for the bandit: a shift, a time
            step, a damping.

        Raises
        ------
        TypeError, ValueError, StructureError, NotConvergedError
            As for `LinearSolver.prepare` and `PreparedSolver.solve`; or the bandit needs a context.
        """
        return self._next(A, b, context, transpose=False)

    def solve_transpose(self, A: Any, b: Any, *, context: float | None = None) -> Solution:
        """``x`` with ``A^T x = b``; arguments and errors as `solve`."""
        return self._next(A, b, context, transpose=True)

    def _next(self, A: Any, b: Any, context: float | None, *, transpose: bool) -> Solution:
        A = as_operator(A)
        arm = 0 if self.bandit is None else self.bandit.choose(context)
        work = self._prepared(A, arm)
        kept, prepared = self._kept[arm], self._kept[arm].prepared
        guess, start = None, 1.0
        if prepared.solver.takes_guess and not prepared.solver.minimises(prepared.A):
            plain = numbers(A, "LinearSystemSequence")
            guess, start = self._starts[transpose].guess(plain.T if transpose else plain, b)
        try:
            run = prepared.solve_transpose if transpose else prepared.solve
            value, info = run(b, guess=guess)
        except NotConvergedError as error:
            self._take_in(arm, error.info, transpose, start, work)
            raise
        self._take_in(arm, info, transpose, start, work)
        self._starts[transpose].remember(value, A.codomain if transpose else A.domain)
        kept.judge(info, start, self.refresh)
        return Solution(value, info)

    def _prepared(self, A: LinearOperator, arm: int) -> Literal["prepared", "updated", "none"]:
        """Have the solver of a value ready for A; returns what that took."""
        kept = self._kept.get(arm)
        if kept is not None and kept.prepared.given is A:
            return "none"
        if kept is not None and self.recycle and not kept.worn and kept.fits(A):
            kept.prepared = kept.prepared.update(A)
            return "updated"
        if not self.recycle:
            self._kept.clear()
        self._kept[arm] = _Kept(self.solvers[arm].prepare(A))
        return "prepared"

    def _take_in(self, arm: int, info: Info, transpose: bool, start: float, work: str) -> None:
        value = cost = None
        if self.bandit is not None and self.values is not None:
            value, cost = self.values[arm], self._price(arm, info, work != "none")
            self.bandit.learn(cost)
        self.history.append(Step(info, transpose, start, work == "prepared", value, cost))

    def _price(self, arm: int, info: Info, prepared_now: bool) -> float:
        assert self.bandit is not None
        if callable(self.cost):
            return float(self.cost(info))
        if self.cost == "iterations":
            # A warm start may take none.
            price = max(float(info.iterations), self.bandit.least)
        elif self.cost == "products":
            price = float(info.products)
        else:
            price = info.solve_seconds + (info.setup_seconds if prepared_now else 0.0)
        solver = self.solvers[arm]
        if info.converged or not isinstance(solver, IterativeSolver):
            return price
        limit = solver.limit(self._kept[arm].prepared.given.shape[0])
        return price * max(1.0, limit / max(info.iterations, 1))

    def state_dict(self) -> dict[str, Tensor]:
        """What the bandit learned, and the solutions that guesses are made of.

        A sequence that goes on from it does as this one would, bit for bit, but where
        preconditioners are kept: it makes them anew.
        """
        starts = {"solution": self._starts[False], "transposed": self._starts[True]}
        state = {
            f"{name}.{i}": x.clone()
            for name, start in starts.items()
            for i, x in enumerate(start.solutions)
        }
        learned = {} if self.bandit is None else self.bandit.state_dict()
        return state | {f"bandit.{name}": value for name, value in learned.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict` of a sequence with the same settings.

        Raises
        ------
        ValueError
            The state is not of such a sequence.
        """
        parts: dict[str, dict[str, Tensor]] = {"solution": {}, "transposed": {}, "bandit": {}}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            if part not in parts or (part == "bandit" and self.bandit is None):
                raise ValueError(f"state has {name!r}, for which this sequence has no place")
            parts[part][rest] = value
        if self.bandit is not None:
            self.bandit.load_state_dict(parts["bandit"])
        for transpose, part in ((False, "solution"), (True, "transposed")):
            solutions = self._starts[transpose].solutions
            solutions.clear()
            solutions.extend(parts[part][key].clone() for key in sorted(parts[part]))
        self._kept.clear()


class _Kept:
    """A prepared solver, and how quick it was when its preconditioner was new."""

    def __init__(self, prepared: PreparedSolver) -> None:
        self.prepared = prepared
        self.pace: float | None = None
        self.worn = False

    def fits(self, A: LinearOperator) -> bool:
        given = self.prepared.given
        return (given.shape, given.dtype, given.device) == (A.shape, A.dtype, A.device)

    def judge(self, info: Info, start: float, refresh: float) -> None:
        """Find it worn out by iterations a digit: a good guess must not hide that it is."""
        digits = math.log10(start / info.residual) if 0 < info.residual < start else 0.0
        pace = info.iterations / max(digits, 1.0)
        if self.pace is None or info.refreshed:
            self.pace = pace if info.converged else None
            return
        # It may be new, or have made itself anew after this solve.
        new = isinstance(self.prepared, PreparedIteration) and not self.prepared.stale
        self.worn = not new and (not info.converged or pace > refresh * max(self.pace, 1.0))
