"""`solve_pde`: the minimum-norm solution of nonlinear equations, by Gauss-Newton."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hyperlearn.gp.backend import Backend
from hyperlearn.gp.pde import PDE, State
from hyperlearn.gp.posterior import Posterior
from operators import Kernel
from operators.kernels.jets import jets
from solvers import ConvergenceWarning, Info, NotConvergedError

Start = Mapping[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True, kw_only=True)
class GaussNewton:
    """``u_{k+1} = argmin |u| subject to R(u_k) + R'(u_k) (u - u_k) = 0``, with its globalisation.

    Parameters
    ----------
    maxiter
        Most linear solves.
    rtol
        Converged when the state would change by at most this, relative to its size (values and
        derivatives of each field by themselves, in the maximum norm); or by at most 1e-4 with
        nothing gained by it: then rounding moves it.
    line_search
        Halve the step ``u_k + s (u - u_k)`` until ``|u|^2 + R(u)^2 / D`` decreases, with the
        nugget's variances D: that is what the equations with a nugget minimise.
    min_step
        Where halving gives up, and a Levenberg-Marquardt step follows: ``(K + mu I) a = -R(u_k)``
        in the scaled rows, ``u_k + k(., L) a``, which shortens the step and turns it towards the
        steepest descent. Its mu is multiplied by 10 until the same decreases, and divided by 10
        after.
    damping
        First mu; 0 for no such steps: then a failing line search takes its last step.
    continuation
        ``name of a parameter -> values`` on the way to its own: solved one after the other, each
        from the solution before.
    strict
        Raise where the default warns.
    """

    maxiter: int = 30
    rtol: float = 1e-6
    line_search: bool = True
    min_step: float = 1 / 64
    damping: float = 1e-6
    continuation: Mapping[str, Sequence[float]] = field(default_factory=dict)
    strict: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.maxiter, int) or self.maxiter < 1:
            raise ValueError(f"GaussNewton: maxiter={self.maxiter}; expected at least 1")
        if not 0 < self.min_step <= 1:
            raise ValueError(f"GaussNewton: min_step={self.min_step}; expected in (0, 1]")
        for name in ("rtol", "damping"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"GaussNewton: {name}={getattr(self, name)}; expected 0 or more")


@dataclass(frozen=True)
class Iteration:
    """What one linear solve did.

    Parameters
    ----------
    residual
        Root mean square of the residuals before it, in units of their rows' standard deviations.
    change
        Largest relative change of the state.
    step
        Length s of the step; 0 for a Levenberg-Marquardt step.
    norm
        ``|u|`` of the linear problem's solution.
    """

    residual: float
    change: float
    step: float
    norm: float


@dataclass(frozen=True, eq=False)
class PDESolution:
    """A solution, and how it was reached.

    Parameters
    ----------
    posterior
        Of the last linearisation; evaluate the solution by it.
    states
        Values and derivatives that the residuals ask for, at the points of each equation.
    converged
        Whether the state stopped changing.
    reason
        In a sentence.
    iterations
        One for each linear solve.
    """

    posterior: Posterior
    states: list[State]
    converged: bool
    reason: str
    iterations: tuple[Iteration, ...]

    def __getattr__(self, name: str) -> Any:
        # value, gradient, laplacian, hessian, evaluate, variance, sample: of the posterior.
        if name.startswith("__") or "posterior" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.posterior, name)


def solve_pde(
    pde: PDE,
    kernel: Kernel | Mapping[str, Kernel],
    *,
    nugget: float = 1e-10,
    method: GaussNewton | None = None,
    start: Start | Sequence[State] | PDESolution | Posterior | None = None,
    backend: Backend | None = None,
) -> PDESolution:
    """The function of least norm that satisfies nonlinear equations at points (arXiv 2103.12959).

    ``min |u|_k subject to R(u)(x_i) = 0``: equivalently, the most probable Gaussian process given
    the equations. Each iteration solves one linear system with as many unknowns as equations.

    Parameters
    ----------
    pde
        Equations.
    kernel
        Of the unknown function; of several, one by name.
    nugget
        Relative to each row's variance. Smaller is more accurate, as its square root, down to
        about 1e-13 in float64.
    method
        `GaussNewton` with its settings.
    start
        Functions by field, states, or another solution; u = 0 by default.
    backend
        Who factorises (see `choose_backend`).

    Warns
    -----
    ConvergenceWarning
        It did not converge; with ``strict`` `NotConvergedError` is raised.

    Raises
    ------
    FloatingPointError
        It diverged to NaN or infinity.

    Examples
    --------
    >>> import torch, hyperlearn as hl, operators as ops
    >>> x = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)[:, None]
    >>> ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    >>> pde = hl.PDE(
    ...     [
    ...         hl.Equation(lambda x, u, lap_u: -lap_u + u**3 - torch.sin(3 * x[0]), x),
    ...         hl.Equation(lambda u: u, ends),
    ...     ]
    ... )
    >>> u = hl.solve_pde(pde, ops.RBF(0.3))
    >>> u.converged, len(u.iterations) <= 5
    (True, True)
    """
    method = method or GaussNewton()
    kernels = by_field(kernel, pde)
    states = starting_states(pde, start)
    iterations: list[Iteration] = []
    with torch.no_grad():
        for stage in _stages(pde, method.continuation):
            outcome = _iterate(stage, kernels, states, nugget, method, backend)
            states = outcome.states
            iterations += outcome.iterations
    solution = replace(outcome, iterations=tuple(iterations))
    if not solution.converged:
        if method.strict:
            raise NotConvergedError(_info(solution))
        warnings.warn(solution.reason, ConvergenceWarning, stacklevel=2)
    return solution


def _info(found: PDESolution) -> Info:
    """In the words of `solvers`."""
    residual = found.iterations[-1].residual
    count = len(found.iterations)
    return Info(False, count, residual, "GaussNewton", "maxiter", found.reason, 0)


def by_field(kernel: Kernel | Mapping[str, Kernel], pde: PDE) -> dict[str, Kernel]:
    """Kernels by the names of the fields.

    Raises
    ------
    ValueError
        Other names.
    """
    fields = pde.fields
    if isinstance(kernel, Kernel):
        if len(fields) != 1:
            raise ValueError(
                f"kernel is one for the fields {', '.join(fields)}; expected a dictionary with one "
                "for each (an argument of a residual other than x, params, data, grad_u, lap_u, "
                "hess_u is taken for the name of a field)"
            )
        return {fields[0]: kernel}
    if not isinstance(kernel, Mapping) or set(kernel) != set(fields):
        got = list(kernel) if isinstance(kernel, Mapping) else type(kernel).__name__
        raise ValueError(f"kernel is {got}; expected a Kernel for each of {', '.join(fields)}")
    return {name: kernel[name] for name in fields}


def starting_states(pde: PDE, start: Any) -> list[State]:
    """States of functions by field, of a solution, or zeros."""
    if start is None:
        return pde.zeros()
    if isinstance(start, PDESolution):
        start = start.posterior
    if isinstance(start, Posterior):
        with torch.no_grad():
            return start.states(pde)
    if isinstance(start, Mapping):
        return [_state_of(equation, start) for equation in pde.equations]
    states = [dict(state) for state in start]
    for equation, state, zeros in zip(pde.equations, states, pde.zeros(), strict=True):
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        expected = {name: tuple(value.shape) for name, value in zeros.items()}
        if shapes != expected:
            raise ValueError(f"start of {equation} has shapes {shapes}; expected {expected}")
    return states


def _state_of(equation: Any, functions: Start) -> State:
    state, order = equation.zeros(), {"value": 0, "gradient": 1, "laplacian": 2, "hessian": 2}
    for name, wanted in equation.wanted.items():
        if wanted.field not in functions:
            raise ValueError(f"start has no function for the field {wanted.field!r}")
        function = functions[wanted.field]

        def column(x: Any, function: Any = function) -> Any:
            values = function(x)
            return values.unsqueeze(-1) if values.ndim == x.ndim - 1 else values

        value, slope, bend = jets(column, equation.points, order[wanted.kind])
        if wanted.kind == "value":
            state[name] = value[:, 0]
        elif wanted.kind == "gradient":
            assert slope is not None
            state[name] = slope[:, 0]
        else:
            assert bend is not None
            full = bend[:, 0]
            state[name] = full if wanted.kind == "hessian" else full.diagonal(0, 1, 2).sum(-1)
    return state


def _stages(pde: PDE, continuation: Mapping[str, Sequence[float]]) -> list[PDE]:
    """The PDE with other values of a parameter, and at last with its own."""
    if not continuation:
        return [pde]
    if not isinstance(pde.params, Mapping) or any(name not in pde.params for name in continuation):
        known = list(pde.params) if isinstance(pde.params, Mapping) else pde.params
        raise ValueError(f"continuation in {list(continuation)}, but the PDE's params are {known}")
    lengths = {len(values) for values in continuation.values()}
    if len(lengths) != 1:
        raise ValueError("continuation: the parameters have different numbers of values")
    stages = []
    for k in range(lengths.pop()):
        changed = dict(pde.params)
        for name, values in continuation.items():
            old = pde.params[name]
            changed[name] = (
                torch.as_tensor(values[k]).to(old) if isinstance(old, Tensor) else values[k]
            )
        stages.append(replace(pde, params=changed))
    return [*stages, pde]


def step(
    pde: PDE,
    kernels: Mapping[str, Kernel],
    states: Sequence[State],
    nugget: float,
    backend: Backend | None = None,
    params: Any = None,
    previous: Posterior | None = None,
) -> Posterior:
    """One undamped step: the least norm subject to the equations linearised at the states."""
    return Posterior(kernels, pde.linearised(states, params), nugget, backend, previous)


@dataclass(frozen=True)
class Advance:
    """One iteration: where it led, and by which linear problem.

    Parameters
    ----------
    states
        After it.
    posterior
        Of the linearisation before it.
    iteration
        In numbers.
    squared_norm
        ``|u|^2`` after it.
    settled
        Whether the state stopped changing, to the tolerance or to rounding.
    damping
        For the next one.
    """

    states: list[State]
    posterior: Posterior
    iteration: Iteration
    squared_norm: float
    settled: bool
    damping: float


def advance(
    pde: PDE,
    kernels: Mapping[str, Kernel],
    states: list[State],
    *,
    nugget: float,
    method: GaussNewton,
    backend: Backend | None = None,
    squared_norm: float | None = None,
    damping: float | None = None,
    previous: Posterior | None = None,
) -> Advance:
    """One Gauss-Newton iteration with its line search.

    Parameters
    ----------
    squared_norm
        ``|u_k|^2`` where it is known; by default that of its part in the span of the equations.
    damping
        mu of a Levenberg-Marquardt step, should one be needed.
    previous
        Of the iteration before, with the same kernels; see `Posterior`.

    Raises
    ------
    FloatingPointError
        The new state is not finite, or no step makes anything better.
    """
    posterior = step(pde, kernels, states, nugget, backend, previous=previous)
    proposed = posterior.states(pde)
    change = _change(pde, states, proposed)
    if not math.isfinite(change):
        raise FloatingPointError(
            "Gauss-Newton diverged: the state is no longer finite; start nearer to the solution, "
            "or "
            "use GaussNewton(continuation=...)"
        )
    merit = _Merit(pde, states, proposed, posterior, squared_norm)
    mu = method.damping if damping is None else damping
    before = float(merit.residual.square().mean().sqrt())
    t: float | None = 1.0
    if method.line_search and change > method.rtol:
        t = merit.length(method.min_step)
    if t is not None:
        # Beyond rounding nothing is left to gain, though alpha, of 1e6, keeps the state moving.
        settled = change <= method.rtol or (
            change <= _ROUNDING and abs(merit.at(t) - merit.at(0.0)) <= 1e-6 * merit.at(0.0)
        )
        taken, norm = between(states, proposed, t), merit.norm(t)
    elif change <= _ROUNDING or merit.gain() <= _ROUNDING:
        t, settled, taken, norm = 0.0, True, proposed, merit.new
    elif method.damping:
        taken, norm, mu = _damped(merit, mu)
        t, settled = 0.0, False
    else:
        t, settled = method.min_step, False
        taken, norm = between(states, proposed, t), merit.norm(t)
    iteration = Iteration(before, change, t, float(posterior.norm()))
    return Advance(taken, posterior, iteration, norm, settled, mu)


# Relative change of the state, and promise of the linear model, that rounding may keep up.
_ROUNDING = 1e-4


def _iterate(
    pde: PDE,
    kernels: Mapping[str, Kernel],
    states: list[State],
    nugget: float,
    method: GaussNewton,
    backend: Backend | None,
) -> PDESolution:
    iterations: list[Iteration] = []
    norm, mu, posterior = None, method.damping, None
    for _ in range(method.maxiter):
        made = advance(
            pde, kernels, states, nugget=nugget, method=method, backend=backend,
            squared_norm=norm, damping=mu, previous=posterior,
        )  # fmt: skip
        states, norm, mu = made.states, made.squared_norm, made.damping
        posterior = made.posterior
        iterations.append(made.iteration)
        if made.settled:
            change = made.iteration.change
            reason = (
                f"converged after {len(iterations)} linear solves: relative change {change:.2g}"
            )
            return PDESolution(made.posterior, states, True, reason, tuple(iterations))
    last = iterations[-1]
    reason = (
        f"Gauss-Newton: not converged after {len(iterations)} linear solves: the state changed by "
        f"{last.change:.2g}, asked for {method.rtol:.2g}; residuals are {last.residual:.2g} "
        f"standard "
        "deviations of the prior. Raise maxiter, start nearer, or continue in a parameter"
    )
    return PDESolution(made.posterior, states, False, reason, tuple(iterations))


def _change(pde: PDE, old: Sequence[State], new: Sequence[State]) -> float:
    """Largest change of a value or derivative, relative to the largest of its kind and field.

    Of all equations together: where a boundary value is zero, its own size says nothing.
    """
    size: dict[Any, float] = {}
    moved: dict[Any, float] = {}
    for equation, before, after in zip(pde.equations, old, new, strict=True):
        for name, value in after.items():
            kind = equation.wanted[name]
            size[kind] = max(size.get(kind, 0.0), float(value.abs().max()))
            step = float((value - before[name]).abs().max())
            if not math.isfinite(step):
                return math.inf
            moved[kind] = max(moved.get(kind, 0.0), step)
    return max(moved[kind] / size[kind] if size[kind] > 0 else moved[kind] for kind in moved)


def between(old: Sequence[State], new: Sequence[State], s: float) -> list[State]:
    """``old + s (new - old)``, of states."""
    return [
        {name: before[name] + s * (after[name] - before[name]) for name in after}
        for before, after in zip(old, new, strict=True)
    ]


class _Merit:
    """``|u|^2 + R(u)^2 / D``, which equations with a nugget minimise, at ``u_k + t (u - u_k)``.

    ``R`` is scaled to the rows' deviations and D is the nugget, so for the linearised equations the
    minimum is at t = 1. Inner products need no more than is known: ``<u, u_k> = alpha . L u_k``,
    and ``L u_k = b + R(u_k)``.
    """

    def __init__(
        self,
        pde: PDE,
        states: list[State],
        proposed: list[State],
        posterior: Posterior,
        squared_norm: float | None,
    ) -> None:
        self.pde, self.states, self.proposed, self.posterior = pde, states, proposed, posterior
        self.residual = self.scaled(states)
        alpha, target = posterior.alpha, posterior.target
        self.image = target + self.residual  # L u_k
        if squared_norm is None:
            squared_norm = float(self.image @ posterior.factor.solve(self.image))
        self.old = squared_norm
        self.new = float(alpha @ (target - posterior.diagonal * alpha))
        self.cross = float(alpha @ self.image)

    def scaled(self, states: list[State]) -> Tensor:
        """Residuals in units of their rows' deviations."""
        values = torch.cat([block.T.reshape(-1) for block in self.pde.values(states)])
        return values * self.posterior.scale

    def norm(self, t: float) -> float:
        """``|u_k + t (u - u_k)|^2``."""
        return (1 - t) ** 2 * self.old + 2 * t * (1 - t) * self.cross + t**2 * self.new

    def at(self, t: float) -> float:
        if t == 0:
            return self.norm(0.0) + self.penalty(self.residual)
        return self.norm(t) + self.penalty(self.scaled(between(self.states, self.proposed, t)))

    def gain(self) -> float:
        """Share that the linear model promises of a full step: its minimum is ``alpha . b``."""
        now = self.at(0.0)
        return (now - float(self.posterior.alpha @ self.posterior.target)) / max(now, 1e-300)

    def penalty(self, residual: Tensor) -> float:
        """``R^2 / D``."""
        return float((residual**2 / self.posterior.diagonal).sum())

    def length(self, min_step: float) -> float | None:
        """The longest step, of 1, 1/2, 1/4, ..., that decreases it; None for none."""
        start, t = self.at(0.0), 1.0
        while t >= min_step:
            value = self.at(t)
            if math.isfinite(value) and value <= start * (1 + 1e-9):
                return t
            t /= 2
        return None


def _damped(merit: _Merit, mu: float) -> tuple[list[State], float, float]:
    """``u_k + k(., L) a`` with ``(K + mu I) a = -R(u_k)``; its squared norm; the next mu."""
    pde, states, posterior = merit.pde, merit.states, merit.posterior
    linear, before = posterior.linearised, merit.at(0.0)
    for _ in range(24):
        shifted = Posterior(
            posterior.kernels,
            replace(linear, target=-merit.residual / posterior.scale),
            mu + posterior.nugget,
            posterior.backend,
            posterior,
        )
        steps = shifted.states(pde)
        trial = [
            {name: value + moved[name] for name, value in state.items()}
            for state, moved in zip(states, steps, strict=True)
        ]
        a = shifted.alpha
        size = float(a @ (shifted.target - shifted.diagonal * a))
        norm = merit.old + 2 * float(a @ merit.image) + size
        value = norm + merit.penalty(merit.scaled(trial))
        if math.isfinite(value) and value < before:
            return trial, norm, max(mu / 10, 1e-14)
        mu *= 10
    raise FloatingPointError(
        "Gauss-Newton is stuck: no Levenberg-Marquardt step makes residuals (now "
        f"{float(merit.residual.square().mean().sqrt()):.2g} standard deviations of the prior) or "
        f"norm "
        "smaller; start elsewhere, or continue in a parameter"
    )
