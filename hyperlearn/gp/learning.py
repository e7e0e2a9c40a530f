"""`KernelLearning`: steps on a kernel's parameters between Gauss-Newton iterations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.certificate import Certificate, Estimate
from hyperlearn.gp.gauss_newton import (
    GaussNewton,
    PDESolution,
    advance,
    between,
    solve_pde,
)
from hyperlearn.gp.objectives import Held
from hyperlearn.gp.posterior import Posterior
from hyperlearn.gp.problem import KernelProblem
from hyperlearn.methods import Method
from hyperlearn.methods.method import Estimator
from hyperlearn.methods.trajectory import Trajectory
from hyperlearn.oracles import Oracles
from hyperlearn.problem import BilevelProblem
from operators import FunctionOperator
from solvers import GMRES, Info

Tree = Any


@dataclass(frozen=True, kw_only=True)
class KernelLearning(Method):
    """Steps on the kernel's parameters between Gauss-Newton iterations on the state.

    Parameters
    ----------
    step_size
        Of Adam, or the first trial step of L-BFGS.
    hypergradient
        ``"one-step"``: of J at the solution of the equations linearised at the current state, which
        is held fixed (arXiv 2510.05568): one Cholesky, the exact total derivative in the limit of
        quadratic convergence. ``"implicit"``: total derivative at the fixed point ``y = T(y, x)``,
        by ``(I - d_y T)^T q = d_y J``; the state is converged before each step. ``"unrolled"``:
        derivative of `newton_steps` iterations, from the state as it was.
    learning_steps
        Steps on x for each Gauss-Newton iteration; 50 in the paper. ``"implicit"`` and
        ``"unrolled"`` have one.
    newton_steps
        Gauss-Newton iterations each time; with ``"implicit"`` the most of them.
    optimizer
        ``"adam"``, or ``"lbfgs"``, where each step is a line search on the loss of the present
        state and batch.
    fresh
        Whether Adam forgets its moments after each Gauss-Newton iteration, as published. Where x
        moves once an iteration it never does: each step would be the first, of full size.
    decay
        Step t of x has size ``step_size / (1 + decay t)``.
    averaging
        Share of the last steps since the latest Gauss-Newton iteration whose mean is the next x,
        against the noise of mini-batches; 0 for none.
    outer_batch_size
        Validation points a batch, drawn anew with each Gauss-Newton iteration; None for all.
    gauss_newton
        Line search and damping.
    rtol
        Stop when, over one Gauss-Newton iteration with its learning steps, x has changed by at most
        this and the loss by a share of at most this; 0: never.

    Notes
    -----
    Where the equations have residuals left in the null space of their linearisation, the one-step
    derivative is not the total one: `hyperlearn.gp.derivative_ratio` compares the two.
    """

    step_size: float = 0.01
    hypergradient: Literal["one-step", "implicit", "unrolled"] = "one-step"
    learning_steps: int = 50
    newton_steps: int = 1
    optimizer: Literal["adam", "lbfgs"] = "adam"
    fresh: bool = True
    decay: float = 0.0
    averaging: float = 0.0
    gauss_newton: GaussNewton = field(default_factory=GaussNewton)
    rtol: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("one-step", "implicit", "unrolled")
        self._require("hypergradient", self.hypergradient in kinds, " or ".join(kinds))
        self._require("learning_steps", self.learning_steps >= 1, "at least 1")
        self._require("newton_steps", self.newton_steps >= 1, "at least 1")
        self._require("optimizer", self.optimizer in ("adam", "lbfgs"), "'adam' or 'lbfgs'")
        self._require("decay", self.decay >= 0, "a number >= 0")
        self._require("averaging", 0 <= self.averaging < 1, "a number in [0, 1)")
        self._require("rtol", self.rtol >= 0, "a number >= 0")

    def start(
        self, problem: BilevelProblem, oracles: Oracles, generator: torch.Generator
    ) -> Estimator:
        """A fresh estimator for one run.

        Raises
        ------
        TypeError
            The problem is none of `kernel_problem`.
        """
        if not isinstance(problem, KernelProblem):
            raise TypeError(
                f"KernelLearning: problem is {type(problem).__name__}; expected one of "
                "hyperlearn.kernel_problem"
            )
        plain = replace(self, inner_batch_size=None, outer_batch_size=None)
        return _KernelEstimator(self, plain, problem, oracles, generator)


class _KernelEstimator(Estimator):
    method: KernelLearning
    problem: KernelProblem

    def __init__(
        self,
        method: KernelLearning,
        plain: KernelLearning,
        problem: KernelProblem,
        oracles: Oracles,
        generator: torch.Generator,
    ) -> None:
        # Batches are of equations, drawn here; the problem has no data of its own.
        super().__init__(plain, problem, oracles, generator)
        self.method, self.generator = method, generator
        self.count = 0  # steps on x
        self.since = 0  # of these since the last Gauss-Newton iteration
        self.squared_norm, self.damping = 0.0, method.gauss_newton.damping
        self.moments: dict[str, Tensor] = {}
        self.average: dict[str, Any] = {}
        self.held: Held | None = None
        self.stationary = math.inf
        # For the stopping rule: x and the loss at the last Gauss-Newton iteration.
        self.marked: dict[str, Any] = {}
        self.settled: str | None = None
        self.last_loss = math.nan
        self.current: Tensor | None = None  # y of the latest estimate

    # --- y ------------------------------------------------------------------------------------

    def solve_inner(self, y: Tensor, x: Tensor) -> Trajectory:
        """The next state, after so many steps on x."""
        each_time = self.method.hypergradient != "one-step"
        if self.since % self.method.learning_steps and not each_time and self.held is not None:
            return Trajectory(y)
        if self.method.hypergradient == "unrolled":
            self._hold(y, x)
            return Trajectory(y)  # the estimate moves it, as it differentiates through that
        self._check_settled(x)
        tree, problem = self.problem.y_space.unravel(y), self.problem
        outer = problem.x_space.unravel(x)
        pde = replace(problem.pde, params=problem.params_at(outer))
        kernels = problem.kernels_at(outer)
        states, validation = tree["states"], tree["validation"]
        posterior = None
        for _ in range(self.method.newton_steps):
            made = advance(
                pde, kernels, states, nugget=problem.nugget, method=self.method.gauss_newton,
                backend=problem.backend, damping=self.damping,
                squared_norm=self.squared_norm if self.count == 0 else None,
            )  # fmt: skip
            states, posterior, self.damping = made.states, made.posterior, made.damping
            self.stationary, length = made.iteration.change, made.iteration.step
            there = [posterior.state(equation) for equation in problem.objective.validation]
            # A shortened step is one everywhere; where another function was added, its limit
            # counts.
            validation = between(validation, there, length or 1.0)
            if made.settled:
                break
        assert posterior is not None
        y = problem.y_space.ravel({"states": states, "validation": validation})
        self._hold(y, x, posterior)
        if self.method.fresh and self.method.learning_steps > 1 and not each_time:
            self.moments = {}
        self.since = 0
        return Trajectory(y)

    def _hold(self, y: Tensor, x: Tensor, posterior: Posterior | None = None) -> None:
        """Draw what the loss is taken on until the next Gauss-Newton iteration."""
        tree = self.problem.y_space.unravel(y)
        held = self.problem.held(tree)
        sampler = getattr(self.problem.objective, "sampler", None)
        if sampler is not None:
            points = sampler(self.generator)
            equations = [e.at(p) for e, p in zip(held.equations, points, strict=True)]
            if posterior is None:
                posterior = self.problem.posterior(tree, self.problem.x_space.unravel(x))
            held = Held(equations, [posterior.state(equation) for equation in equations])
        if held.equations:
            held = held.batch(self.method.outer_batch_size, self.generator)
        self.held = held

    def _check_settled(self, x: Tensor) -> None:
        if self.marked and self.method.rtol:
            moved = float((x - self.marked["x"]).abs().max())
            before, now = self.marked["loss"], self.last_loss
            if moved <= self.method.rtol and abs(now - before) <= self.method.rtol * abs(before):
                self.settled = (
                    f"x changed by {moved:.2g} and the loss by {abs(now - before):.2g} over a "
                    f"Gauss-Newton iteration: settled to rtol={self.method.rtol:g}"
                )
        self.marked = {"x": x.clone(), "loss": self.last_loss}

    # --- the gradient --------------------------------------------------------------------------

    def estimate(self, x: Tensor, trajectory: Trajectory) -> Estimate:
        """By the method's kind of hypergradient."""
        kind = self.method.hypergradient
        self.current = trajectory.y
        with torch.enable_grad():
            if kind == "implicit":
                return self._implicit(x, trajectory)
            outer = x.detach().requires_grad_()
            tree = self.problem.y_space.unravel(trajectory.y)
            steps = 0
            if kind == "unrolled":
                steps = self.method.newton_steps
                for _ in range(steps):
                    tree = self.problem.mapped(tree, self.problem.x_space.unravel(outer))
                trajectory.y = self.problem.y_space.ravel(tree).detach()
            loss, posterior = self._loss(tree, outer)
            (gradient,) = torch.autograd.grad(loss, outer)
        self.last_loss = float(loss.detach())
        residual, backend = posterior.residual(), repr(posterior.backend)
        reason = (
            "state held fixed: derivative of one Gauss-Newton step"
            if kind == "one-step"
            else f"derivative of {steps} Gauss-Newton steps"
        )
        reason = "; ".join(filter(None, [reason, self.told()]))
        return Estimate(
            gradient, None, lambda: self._certificate(residual, None, reason, gradient, backend)
        )

    def _loss(self, tree: Tree, outer: Tensor) -> tuple[Tensor, Posterior]:
        x = self.problem.x_space.unravel(outer)
        posterior = self.problem.posterior(tree, x)
        assert self.held is not None
        held = self.held
        if self.method.hypergradient != "one-step" and held.equations:
            # Their state moves with the function.
            held = Held(held.equations, [posterior.state(e) for e in held.equations])
        return self.problem.loss(posterior, held, x, self.generator), posterior

    def _implicit(self, x: Tensor, trajectory: Trajectory) -> Estimate:
        """``d_x J + (d_x T)^T q`` with ``(I - d_y T)^T q = d_y J``."""
        space = self.problem.y_space
        y = trajectory.y.detach().requires_grad_()
        outer = x.detach().requires_grad_()
        loss, posterior = self._loss(space.unravel(y), outer)
        by_x, by_y = torch.autograd.grad(loss, (outer, y), retain_graph=True, allow_unused=True)
        by_y = torch.zeros_like(y) if by_y is None else by_y
        image = space.ravel(self.problem.state_of(posterior))
        known = y.detach()

        def transposed(q: Tensor) -> Tensor:
            (back,) = torch.autograd.grad(image, y, q, retain_graph=True, allow_unused=True)
            return q if back is None else q - back

        with torch.no_grad():
            scale = _scales(space.unravel(known), space)
            scaled = FunctionOperator(
                _Columns(lambda v: transposed(v / scale) * scale), known, rmatvec=_refused
            )
            # An autograd product is linear by construction.
            solver = GMRES(rtol=1e-8, maxiter=60).prepare(scaled.vouched())
            solution = solver.solve(by_y * scale)
            q = solution.value / scale
        (pulled,) = torch.autograd.grad(image, outer, q)
        self.last_loss = float(loss.detach())
        self.stationary = float(((image.detach() - known) / known.abs().max()).norm())
        gradient = by_x + pulled
        reason = "total derivative at the fixed point of the Gauss-Newton step"
        residual = posterior.residual()
        info = solution.info
        return Estimate(
            gradient, info, lambda: self._certificate(residual, info, reason, gradient, ""), q
        )

    def _certificate(
        self, residual: float, info: Info | None, reason: str, gradient: Tensor, backend: str
    ) -> Certificate:
        return Certificate(
            inner_stationarity=self.stationary,
            adjoint_residual=residual if info is None else info.residual,
            hessian_residual=None,
            converged=info is None or info.converged,
            exact=info is not None,
            iterations=0 if info is None else info.iterations,
            operator="I - d_y T of the Gauss-Newton step" if info else "Gram matrix",
            solver=backend if info is None else info.solver,
            reason=reason,
            gradient_norm=float(gradient.norm()),
        )

    # --- x ------------------------------------------------------------------------------------

    def told(self) -> str:
        """Whether the state is not that of a solution yet; empty if it is."""
        if not self.stationary > 1e-2 or math.isinf(self.stationary):
            return ""
        return (
            f"the state is not converged (it changed by {self.stationary:.2g} of its size in the "
            f"last "
            "Gauss-Newton iteration): more steps, or fewer learning_steps for each"
        )

    def move(self, x: Tensor, velocity: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Adam, or a line search of L-BFGS; averaged at the end of a Gauss-Newton iteration."""
        method = self.method
        size = method.step_size / (1 + method.decay * self.count)
        self.count, self.since = self.count + 1, self.since + 1
        if method.optimizer == "lbfgs":
            return self._searched(x, size), velocity
        m = self.moments.get("first", torch.zeros_like(x))
        v = self.moments.get("second", torch.zeros_like(x))
        t = float(self.moments.get("count", torch.zeros(()))) + 1
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        self.moments = {"first": m, "second": v, "count": torch.tensor(t)}
        x = x - size * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        return self._averaged(x), velocity

    def _averaged(self, x: Tensor) -> Tensor:
        method = self.method
        if not method.averaging or method.hypergradient != "one-step":
            return x
        first = method.learning_steps - max(1, round(method.averaging * method.learning_steps))
        if self.since <= first:
            self.average = {}
            return x
        total = self.average.get("sum", torch.zeros_like(x)) + x
        count = self.average.get("count", 0) + 1
        self.average = {"sum": total, "count": count}
        return total / count if self.since >= method.learning_steps else x

    def _searched(self, x: Tensor, size: float) -> Tensor:
        tree = None
        with torch.enable_grad():
            outer = x.detach().clone().requires_grad_()
            optimizer = torch.optim.LBFGS(
                [outer], lr=1.0, max_iter=10, history_size=10, line_search_fn="strong_wolfe"
            )
            assert self.current is not None
            tree = self.problem.y_space.unravel(self.current)

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss, _ = self._loss(tree, outer)
                loss.backward()
                return loss

            optimizer.step(closure)
        return outer.detach()

    # --- state --------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on."""
        held = None
        if self.held is not None and self.held.equations:
            held = {
                "points": [equation.points for equation in self.held.equations],
                "data": [
                    torch.zeros(0) if equation.data is None else equation.data
                    for equation in self.held.equations
                ],
                "states": [dict(state) for state in self.held.states],
            }
        return super().state() | {
            "count": self.count,
            "since": self.since,
            "damping": self.damping,
            "moments": dict(self.moments),
            "average": dict(self.average),
            "held": held or {},
            "drawn": self.held is not None,
            "marked": dict(self.marked),
            "last_loss": self.last_loss,
            "stationary": self.stationary,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        super().restore(state)
        for name in ("count", "since", "damping", "last_loss", "stationary"):
            setattr(self, name, state[name])
        self.moments, self.average = dict(state["moments"]), dict(state["average"])
        self.marked = dict(state["marked"])
        if not state["drawn"]:
            return
        held, equations = state["held"], self.problem.objective.validation
        if not held:
            self.held = Held([], [])
            return
        made = [
            equation.at(points, None if equation.data is None else data)
            for equation, points, data in zip(equations, held["points"], held["data"], strict=True)
        ]
        self.held = Held(made, held["states"])


class _Columns:
    """A map of vectors as a product with vectors; blocks go column by column."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, v: Tensor) -> Tensor:
        return self.function(v)

    def __tensors__(self) -> list[Tensor]:
        return []


def _refused(v: Tensor) -> Tensor:
    raise TypeError("the product of the adjoint system's transpose is not asked for")


def _scales(tree: Tree, space: Any) -> Tensor:
    """For each entry the largest of its kind: values and Laplacians differ by much."""
    sizes = pytree.tree_map(
        lambda leaf: torch.full_like(leaf, float(leaf.abs().max().clamp_min(1e-300))), tree
    )
    scale: Tensor = space.ravel(sizes)
    return scale


def learnt_solution(
    problem: KernelProblem, x: Tree, *, method: GaussNewton | None = None, start: Any = None
) -> PDESolution:
    """The PDE's solution with the parameters x, converged: what a run of `KernelLearning` is for.

    Parameters
    ----------
    problem
        Of `kernel_problem`.
    x
        ``run.x``.
    method, start
        As for `solve_pde`.
    """
    pde = replace(problem.pde, params=problem.params_at(x))
    return solve_pde(
        pde, problem.kernels_at(x), nugget=problem.nugget, method=method, start=start,
        backend=problem.backend,
    )  # fmt: skip


def derivative_ratio(problem: KernelProblem, x: Tree, *, newton_steps: int = 10) -> float:
    """``<one-step, total> / |total|^2`` of the two hypergradients at a converged state.

    1 where Gauss-Newton converges quadratically: then one step's derivative, which holds the state
    fixed, is the total one, at a fraction of its cost.

    Parameters
    ----------
    problem
        Of `kernel_problem`.
    x
        Parameters: ``problem.x0``, or ``run.x``.
    newton_steps
        Gauss-Newton iterations at most.
    """
    flat = problem.x_space.ravel(x)
    gradients = []
    for kind in ("one-step", "implicit"):
        method = KernelLearning(hypergradient=kind, newton_steps=newton_steps)
        estimator = method.start(problem, problem.oracles(), torch.Generator().manual_seed(0))
        with torch.no_grad():
            trajectory = estimator.solve_inner(problem.y_space.ravel(problem.y0), flat)
        gradients.append(estimator.estimate(flat, trajectory).gradient)
    one, total = gradients
    return float(one @ total / (total @ total))
