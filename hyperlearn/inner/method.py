"""The contract of every inner method: frozen settings, and a step from block to block."""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hyperlearn.conditions import Conditions
from hyperlearn.inner.equation import Equation
from operators.tracing import tracked
from solvers import ConvergenceWarning, Info, NotConvergedError
from solvers.one_by_one import one_by_one

# What a method carries from step to step: "y" and "F", both (B, n), perhaps "A" at y, (B, n, n),
# and "stuck", (B,), true where no step helps; what else it likes, with a leading axis B.
State = dict[str, Tensor]


@dataclass(frozen=True)
class InnerInfo:
    """What an inner solve says of itself; of a batch, of its worst member.

    Parameters
    ----------
    converged
        Whether the residual meets the tolerance, in every member.
    iterations
        Steps until the last member was there.
    residual
        ``|F(y, x)|``, relative to the scale that the tolerance is relative to.
    method
        Settings.
    status
        ``"converged"``, ``"maxiter"``, ``"stagnated"`` (no step helps: as a rule the limit of the
        dtype, or a minimum of ``|F|`` that is no root), ``"diverged"``, or ``"saddle"`` (of a loss:
        stationary, but no minimum).
    reason
        The same in a sentence, with the numbers.
    history
        Relative residual at each iteration, from the first point on; of a batch the worst.
    evaluations
        Of F; a batch counts as one.
    seconds
        Wall time.
    member_iterations, member_residuals
        Of each member of a batch, ``(B,)``; of a single problem ``(1,)``.
    adjoint
        What the linear solves of derivatives said, filled in as they run.
    """

    converged: bool
    iterations: int
    residual: float
    method: str
    status: str
    reason: str
    history: tuple[float, ...] = ()
    evaluations: int = 0
    seconds: float = 0.0
    member_iterations: Tensor | None = None
    member_residuals: Tensor | None = None
    adjoint: list[Info] = field(default_factory=list)


class Tolerance:
    """``|F| <= max(rtol scale, atol)`` for each member, with ``scale = |A y - F|``.

    Near a solution ``F(y) = A y - b`` up to second order, and ``|b|`` is what a linear system's
    residual is measured by; so the test does not change when F is multiplied by a number, nor is it
    harder to pass from a good start. Where b vanishes, as for y = 0, it is ``sqrt(eps) |F(y_0)|``.

    Where A is formed, ``|F|`` at the level of its own rounding, ``8 eps | |A| |y| |``, passes too:
    for an ill-conditioned A that may be above what is asked for, and no y of this dtype does
    better. There, too, the step that Newton's method would take must be a small one.
    """

    def __init__(self, method: InnerMethod, equation: Equation, state: State) -> None:
        self.equation = equation
        eps = torch.finfo(state["y"].dtype).eps
        self.rtol = method.tolerance(state["y"].dtype)
        self.atol = method.atol
        self.floor = eps**0.5 * row_norm(state["F"])
        self.scale = torch.full_like(self.floor, math.inf)
        self.rounding = torch.zeros_like(self.floor)

    def met(self, state: State) -> Tensor:
        """Which members are there, ``(B,)``; the scale is measured where one seems to be."""
        norms = row_norm(state["F"])
        if "A" in state:
            terms = (state["A"].abs() @ state["y"].abs()[..., None])[..., 0]
            self.rounding = 8 * torch.finfo(terms.dtype).eps * row_norm(terms)
        passed = self._passed(norms)
        if bool(passed.any()):
            self.measure(state, passed)
            passed = self._passed(norms)
            if "A" in state and bool(passed.any()):
                passed = passed & ~self._far(state)
        return passed

    def _far(self, state: State) -> Tensor:
        """Members whose Newton step, ``|A^-1 F| > eps^(1/3) |y|``, is no small one, nor rounding.

        Where equations differ in scale, the norm of F says nothing of the smallest of them.
        """
        A, y, F = wide(state["A"]), wide(state["y"]), wide(state["F"])
        eps = torch.finfo(A.dtype).eps
        step = solved(A, F[..., None])[..., 0]
        terms = (A.abs() @ y.abs()[..., None])[..., 0]
        rounding = (F.abs() <= 8 * eps * terms).all(1)
        large = row_norm(step) > eps ** (1 / 3) * row_norm(y)
        return large & ~rounding & (row_norm(F) > 0)

    def measure(self, state: State, members: Tensor) -> None:
        """Take the scale of these members at this point."""
        if "A" in state:
            image = (state["A"] @ state["y"][..., None])[..., 0]
        else:
            image = self.equation.product(state["y"], state["y"])
        scale = torch.maximum(row_norm(image - state["F"]), self.floor)
        self.scale = torch.where(members, scale, self.scale)

    def _passed(self, norms: Tensor) -> Tensor:
        allowed = torch.maximum(self.rtol * self.scale, self.rounding)
        return norms <= allowed.clamp_min(self.atol)

    def relative(self, norms: Tensor) -> Tensor:
        """Norms in units of the scale."""
        return torch.where(norms == 0, 0.0, norms / self.scale)


@dataclass(frozen=True, kw_only=True)
class InnerMethod(ABC):
    """Settings of a method for ``F(y, x) = 0``; immutable, comparable, cheap to copy.

    Parameters
    ----------
    rtol
        Converged when ``|F| <= max(rtol |A y - F|, atol)``, A the linearisation of F: for a linear
        F the right-hand side is that of a linear solver. None means ``eps^(2/3)`` of the dtype:
        3.7e-11 in float64, 2.4e-5 in float32.
    atol
        Absolute tolerance of ``|F|``.
    maxiter
        Steps at most.
    strict
        Raise `solvers.NotConvergedError` where the default warns with `solvers.ConvergenceWarning`.
    """

    rtol: float | None = None
    atol: float = 0.0
    maxiter: int = 1000
    strict: bool = False

    # rtol=None means this power of the dtype's eps.
    power: ClassVar[float] = 2 / 3
    # Whether it works on blocks; one that does not is given the members of a batch one by one.
    blocks: ClassVar[bool] = True
    # What it can be asked to solve.
    solves: ClassVar[tuple[type[Conditions], ...]] = (Conditions,)

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (value is None and name == "rtol"):
                self._require(name, number and 0 <= value < math.inf, "a number >= 0")
        whole = isinstance(self.maxiter, int) and not isinstance(self.maxiter, bool)
        self._require("maxiter", whole and self.maxiter >= 0, "a whole number >= 0")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"{type(self).__name__}: {name}={getattr(self, name)!r}; expected {expected}"
            )

    def tolerance(self, dtype: torch.dtype) -> float:
        """Relative tolerance that holds for a dtype."""
        return float(torch.finfo(dtype).eps) ** self.power if self.rtol is None else self.rtol

    @property
    def unrollable(self) -> str:
        """Empty where a step is one differentiable map; otherwise why it is not, and a remedy."""
        return ""

    def check(self, conditions: Conditions) -> None:
        """Raise TypeError unless this method is for such conditions."""
        if not isinstance(conditions, self.solves):
            kinds = ", ".join(kind.__name__ for kind in self.solves)
            raise TypeError(
                f"{type(self).__name__} is for {kinds}; got {type(conditions).__name__}: choose "
                "another method (hyperlearn.inner lists them)"
            )

    @abstractmethod
    def begin(self, equation: Equation, Y: Tensor) -> State:
        """The state at the first points."""

    @abstractmethod
    def advance(self, equation: Equation, state: State) -> State:
        """One step of every member."""

    def run(self, equation: Equation, Y: Tensor) -> tuple[State, InnerInfo]:
        """Iterate until every member has converged or can go no further.

        Parameters
        ----------
        equation, Y
            What to solve, and where to start, ``(B, n)``; plain numbers.
        """
        start = time.perf_counter()
        state = self.begin(equation, Y)
        tolerance = Tolerance(self, equation, state)
        met = tolerance.met(state)
        over = met | ~finite(state["F"])
        steps = torch.zeros(Y.shape[0], dtype=torch.long, device=Y.device)
        history = [row_norm(state["F"])]
        for _ in range(self.maxiter):
            if bool(over.all()):
                break
            state = select(over, state, self.advance(equation, state))
            steps += ~over
            history.append(row_norm(state["F"]))
            met = tolerance.met(state)
            over = over | met | ~finite(state["F"])
            if "stuck" in state:
                over = over | state["stuck"]
        unmeasured = torch.isinf(tolerance.scale)
        if bool(unmeasured.any()):
            tolerance.measure(state, unmeasured)
            met = met & tolerance.met(state)
        return state, self._judge(tolerance, state, met, steps, history, equation, start)

    def _judge(
        self,
        tolerance: Tolerance,
        state: State,
        met: Tensor,
        steps: Tensor,
        history: list[Tensor],
        equation: Equation,
        start: float,
    ) -> InnerInfo:
        norms = row_norm(state["F"])
        relative = tolerance.relative(norms)
        converged = bool(met.all())
        iterations = int(steps.max()) if steps.numel() else 0
        if converged:
            status = "converged"
        elif not bool(finite(state["F"]).all()):
            status = "diverged"
        elif "stuck" in state and bool((state["stuck"] & ~met).any()):
            status = "stagnated"
        else:
            status = "maxiter"
        worst = float(relative.nan_to_num(math.inf).max()) if relative.numel() else 0.0
        reason = (
            f"{type(self).__name__} on {equation.conditions.noun}(y, x), y of "
            f"{state['y'].shape[1]} entries: {status} after {iterations} iterations with |F| = "
            f"{float(norms.max()):.3g}, {worst:.3g} of its scale; asked for {tolerance.rtol:.3g}"
            + (f" or |F| <= {self.atol:.3g}" if self.atol else "")
        )
        if not converged and len(met) > 1:
            reason += f" ({int((~met).sum())} of {len(met)} members)"
        worsts = torch.stack([tolerance.relative(row).max() for row in history])
        return InnerInfo(
            converged,
            iterations,
            worst,
            repr(self),
            status,
            reason,
            tuple(worsts.tolist()),
            equation.evaluations,
            time.perf_counter() - start,
            steps,
            relative,
        )

    def report(self, info: InnerInfo, *, frames: int) -> None:
        """Warn, or raise, where it has not converged; the user's call is so many frames up."""
        if info.converged:
            return
        if self.strict:
            raise NotConvergedError(_as_linear(info))
        warnings.warn(info.reason, ConvergenceWarning, stacklevel=frames + 1)


def _as_linear(info: InnerInfo) -> Info:
    """The same, as `solvers.NotConvergedError` carries it."""
    return Info(
        False,
        info.iterations,
        info.residual,
        info.method,
        status=info.status,
        reason=info.reason,
        products=info.evaluations,
    )


def row_norm(block: Tensor) -> Tensor:
    """2-norm of each row, ``(B,)``; half precision is summed in single."""
    return torch.linalg.vector_norm(wide(block), dim=1)


def finite(block: Tensor) -> Tensor:
    """Which rows are finite, ``(B,)``."""
    return torch.isfinite(block).all(dim=1)


def select(frozen: Tensor, old: State, new: State) -> State:
    """The old state of the members that are frozen, the new one of the others."""
    return {
        name: torch.where(spread(frozen, new[name]), old[name], new[name]) if name in old else value
        for name, value in new.items()
    }


def spread(mask: Tensor, like: Tensor) -> Tensor:
    """``(B,)`` with as many trailing axes as `like` has."""
    return mask.reshape(-1, *(1,) * (like.ndim - 1))


def wide(block: Tensor) -> Tensor:
    """In a dtype that LAPACK has."""
    return block.float() if block.dtype in (torch.float16, torch.bfloat16) else block


def solved(A: Tensor, right: Tensor) -> Tensor:
    """``A^-1 right`` of small matrices; without finite numbers where A is singular.

    In forward mode under vmap or under reverse mode, and there alone, `torch.linalg.solve` gives
    wrong numbers (torch 2.13); the derivatives of the inverse are right. With a step of iterative
    refinement it is as accurate.
    """
    if not (tracked(A) or tracked(right)):
        return one_by_one(torch.linalg.solve_ex, A, right)[0]
    inverse = one_by_one(torch.linalg.inv_ex, A)[0]
    first = inverse @ right
    return first + inverse @ (right - A @ first)
