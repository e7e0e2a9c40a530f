"""Every problem of the zoo meets every way to its hypergradient."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hyperlearn as hl
import operators as ops
import solvers
from hyperlearn.checks.differences import sweep, value_noise
from solvers import LinearSolver
from validation.bilevel.problems import Problem
from validation.report import Case, stated

# A hypergradient must be flagged where it is not trusted to this relative error.
RTOL = 1e-3
# Relative errors of y that an inner solver is taken to have stopped at.
STOPPED = (1e-1, 1e-2, 1e-4)
EXACT: dict[str, Callable[..., LinearSolver]] = {
    "CG": solvers.CG,
    "MINRES": solvers.MINRES,
    "DenseCholesky": solvers.DenseCholesky,
    "DenseLU": solvers.DenseLU,
    "Auto": solvers.Auto,
}
# What says that there is no hypergradient to be had; anything else that is raised is a failure.
TELLING = (
    ArithmeticError,
    solvers.StructureError,
    solvers.NotConvergedError,
    torch.linalg.LinAlgError,
)


@dataclass(frozen=True)
class Answer:
    """A hypergradient and what came with it.

    Parameters
    ----------
    gradient
        The hypergradient.
    claimed
        Relative error that is claimed; NaN for none.
    doubt
        Why it is not to be trusted; empty for no reason.
    certificate
        What else was said.
    """

    gradient: Tensor
    claimed: float = math.nan
    doubt: str = ""
    certificate: dict[str, Any] | None = None


@dataclass(frozen=True)
class Mode:
    """A way to a hypergradient.

    Parameters
    ----------
    name, run
        What it is called; how it is done.
    accuracy
        Error, in units of the condition number, that it must not exceed; NaN for a way that is
        exact to no tolerance.
    biased
        Whether it approximates by request.
    """

    name: str
    run: Callable[[], Answer]
    accuracy: float = math.nan
    biased: bool = False


class Meeting:
    """A problem in torch, on a device, and all modes that apply to it."""

    def __init__(self, problem: Problem, device: str = "cpu") -> None:
        self.problem, self.device = problem, device
        self.dtype = getattr(torch, problem.dtype)
        self.eps = float(torch.finfo(self.dtype).eps)
        self.data = problem.on(self.tensor)
        self.y0, self.x = self.tensor(problem.y0), self.tensor(problem.x)
        data = self.data

        # They hold the data, and not the y and x of this meeting.
        def inner(y: Tensor, x: Tensor) -> Tensor:
            return problem.inner(torch, y, x, data)

        def loss(y: Tensor, x: Tensor) -> Tensor:
            return problem.loss(torch, y, x, data)

        def outer(y: Tensor, x: Tensor) -> Tensor:
            return problem.outer(torch, y, x, data)

        self.inner, self.loss, self.outer = inner, loss, outer

    def tensor(self, array: np.ndarray) -> Tensor:
        """On the device; numbers in the problem's dtype."""
        if array.dtype.kind != "f":
            return torch.as_tensor(array, device=self.device)
        return torch.as_tensor(array.astype(self.problem.dtype), device=self.device)

    @cached_property
    def y(self) -> Tensor:
        """The solution, rounded."""
        return self.tensor(self.problem.solution)

    def stopped(self, size: float, kind: str) -> Tensor:
        """y off the solution by `size` of its norm: as descent leaves it, or along a random line.

        What is left of the error after 200 steps lies along small curvature, where F is small.
        """
        problem, reference = self.problem, self.problem.reference
        exact = problem.solution
        if kind == "descent":
            y = problem.y0.astype(float)
            d = problem.on(lambda v: v.astype(float) if v.dtype.kind == "f" else v)
            for _ in range(200):
                y = y - problem.F(np, y, problem.x.astype(float), d) / (2 * reference.largest)
            error = y - exact
        else:
            error = np.random.default_rng(0).standard_normal(len(exact))
        length = np.linalg.norm(error)
        if not length > 0:
            return self.y
        return self.tensor(exact + size * np.linalg.norm(exact) / length * error)

    # --- modes ------------------------------------------------------------------------------------

    def modes(self) -> Iterator[Mode]:
        """Every way that applies."""
        problem = self.problem
        if problem.smooth:
            yield from self.certified()
            yield from self.inexact()
            yield from self.surrogates()
        yield from self.differentiated()
        if problem.minimum:
            yield self.finite_differences()

    def finite_differences(self) -> Mode:
        """Of values that are exact to the tolerance of the inner solve."""
        return Mode("finite differences", self.differences, 1e5 * self.eps ** (2 / 3))

    def by(self, y: Tensor | None = None, **options: Any) -> Callable[[], Answer]:
        """`hyperlearn.hypergradient` at y, by default the solution."""

        def run() -> Answer:
            gradient, certificate = hl.hypergradient(
                self.outer, self.loss, self.y if y is None else y, self.x, **options
            )
            doubt = certificate.doubt(RTOL)
            if not certificate.converged:
                doubt = f"the adjoint did not converge; {doubt}"
            claimed = certificate.relative_error
            return Answer(
                gradient, math.nan if claimed is None else claimed, doubt, stated(certificate)
            )

        return run

    def certified(self) -> Iterator[Mode]:
        """At the solution, by every solver."""
        direct, iterative = 100 * self.eps, 10 * self.eps**0.5
        for name, solver in EXACT.items():
            accuracy = direct if name.startswith("Dense") else iterative
            yield Mode(name, self.by(solver=solver()), accuracy)
        if self.problem.batches:
            yield Mode("CG, in chunks of 7", self.chunked, iterative)

    def chunked(self) -> Answer:
        """The inner data as a batch, worked through in chunks."""
        names, problem, data = self.problem.batches, self.problem, vars(self.data)

        def loss(y: Tensor, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
            # The losses sum over d.A and divide by its length, or take means.
            return problem.loss(torch, y, x, SimpleNamespace(**(data | batch)))

        batch = {name: getattr(self.data, name) for name in names}
        gradient, certificate = hl.hypergradient(
            self.outer, loss, self.y, self.x, inner_batch=batch, chunk_size=7
        )
        return Answer(
            gradient,
            certificate.relative_error or 0.0,
            certificate.doubt(RTOL),
            stated(certificate),
        )

    def inexact(self) -> Iterator[Mode]:
        """At a y that has not converged; and refined from there."""
        for size in STOPPED:
            for kind in ("descent", "random"):
                y = self.stopped(size, kind)
                for name in ("CG", "DenseLU"):
                    yield Mode(
                        f"{name}, y off by {size:g}, {kind}", self.by(y, solver=EXACT[name]())
                    )
        yield Mode("refined from y off by 0.01", self.by(self.stopped(1e-2, "random"), refine=True))

    def surrogates(self) -> Iterator[Mode]:
        """Another operator for the Hessian; the certificate either says nothing or estimates."""
        n, reference = len(self.y), self.problem.reference
        identity = ops.Identity(n, self.dtype, torch.device(self.device))
        few = solvers.Neumann(maxiter=5, stop_at_maxiter=True)
        damping = 0.1 * reference.largest
        ways: dict[str, dict[str, Any]] = {
            "identity": {"operator": identity, "solver": solvers.Diagonal()},
            "Neumann, 5 terms": {"solver": few},
            "damped": {"damping": damping},
        }
        if self.problem.kind == "least squares":
            J = torch.func.jacrev(lambda y: self.inner(y, self.x))(self.y)
            gauss = ops.Dense(J.T @ J, positive_definite=True)
            ways["Gauss-Newton"] = {"operator": gauss, "solver": solvers.DenseCholesky()}
        for name, options in ways.items():
            yield Mode(f"{name}, estimated", self.by(**options, estimate=True))
            if name != "Neumann, 5 terms":
                yield Mode(name, self.by(**options))

    def solved(self, x: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """y*(x) by the function that is for such a problem, and what it says."""
        problem = self.problem
        entry = {
            "root": hl.root,
            "fixed point": hl.fixed_point,
            "least squares": hl.least_squares,
        }.get(problem.kind, hl.argmin)
        return entry(
            self.inner, self.y0, x, return_info=True, **problem.options(self.data), **options
        )

    def through(self, **options: Any) -> Callable[[], Answer]:
        """Reverse mode through the solution."""

        def run() -> Answer:
            x = self.x.clone().requires_grad_()
            y, info = self.solved(x, **options)
            self.outer(y, x).backward()
            assert x.grad is not None
            doubt = "" if info.converged else info.reason
            for adjoint in info.adjoint:
                doubt = doubt if adjoint.converged else f"{doubt} {adjoint.reason}"
            said = {"inner_residual": info.residual, "inner_iterations": info.iterations,
                    "converged": info.converged, "reason": info.reason}  # fmt: skip
            return Answer(x.grad, doubt=doubt, certificate=said)

        return run

    def differentiated(self) -> Iterator[Mode]:
        """By autograd: implicitly, through the steps, through one step."""
        kind, reference = self.problem.kind, self.problem.reference
        loose = 100 * self.eps ** (2 / 3)  # the tolerance of an inner method
        yield Mode("autograd, implicit", self.through(), loose)
        yield Mode("autograd, implicit, by GMRES",
                   self.through(linear_solver=solvers.GMRES()), 10 * self.eps**0.5)  # fmt: skip
        yield Mode("forward mode", self.forward, loose)
        if kind != "kkt":
            yield Mode("a batch under vmap", self.mapped, loose)
        if kind != "kkt" and kind != "proximal":
            yield Mode("a decorated solver", self.decorated, loose)
        step = 1 / reference.largest
        if kind == "fixed point":
            method: Any = hl.inner.FixedPointIteration()
        elif kind == "root":
            method = hl.inner.Newton(line_search=False)
        elif kind == "kkt":
            return
        else:
            # Of a proximal problem A is that of the map, with a step of the problem's own.
            smooth = step if self.problem.smooth else 0.5 / self._curvature()
            method = hl.inner.GradientDescent(step_size=smooth, acceleration="none")
        if reference.condition < 30:
            # A derivative converges as the steps do, later by a factor of their number.
            yield Mode(
                "unrolled", self.through(method=method, differentiate="unrolled"), 1e3 * loose
            )
        exact = kind == "root"  # one step of Newton's is exact
        if reference.condition < 1e3:
            yield Mode("truncated(5)",
                       self.through(method=method, differentiate="truncated(5)"),
                       loose if exact else math.nan, not exact)  # fmt: skip
            yield Mode("one step", self.through(method=method, differentiate="one_step"),
                       loose if exact else math.nan, not exact)  # fmt: skip

    def _curvature(self) -> float:
        """Largest curvature of the smooth part."""
        hessian = torch.func.hessian(self.inner)(self.y, self.x)
        return float(torch.linalg.matrix_norm(hessian, 2))

    def decorated(self) -> Answer:
        """Through a solver that returns what numpy has found."""
        names = {"root": "residual", "fixed point": "fixed_point"}
        name = names.get(self.problem.kind, "loss")
        condition = self.loss if name == "loss" else self.inner

        @hl.implicit(**{name: condition})  # type: ignore[arg-type]
        def solver(x: Tensor) -> Tensor:
            return self.y

        x = self.x.clone().requires_grad_()
        self.outer(solver(x), x).backward()
        assert x.grad is not None
        return Answer(x.grad)

    def forward(self) -> Answer:
        """By forward mode, a direction after the other."""

        def value(x: Tensor) -> Tensor:
            return self.outer(self.solved(x)[0], x)

        return Answer(torch.func.jacfwd(value)(self.x))

    def mapped(self) -> Answer:
        """The first of a batch of three x."""
        batch = torch.stack([self.x, self.x + 0.05, self.x - 0.05])

        def value(x: Tensor) -> Tensor:
            return self.outer(self.solved(x)[0], x)

        return Answer(torch.func.vmap(torch.func.grad(value))(batch)[0])

    def differences(self) -> Answer:
        """Central differences of the value function along a random direction v, ``|v| = 1``.

        What is returned is the exact hypergradient with its part along v replaced. The uncertainty
        is that of the function as the inner solver computes it, to its own tolerance: no claim
        about the hypergradient.
        """
        exact = self.problem.reference.gradient.astype(float)
        v = np.random.default_rng(0).standard_normal(len(exact))
        v /= np.linalg.norm(v)
        along = self.tensor(v)

        def value(t: float) -> float:
            x = self.x + t * along
            return float(self.outer(self.solved(x)[0], x))

        found = sweep(value, value_noise(value, self.eps), self.eps).best
        if found is None:
            raise ArithmeticError("the value function is not finite around x")
        gradient = torch.as_tensor(exact + (found.slope - exact @ v) * v)
        unsure = found.uncertainty / float(np.linalg.norm(exact))
        doubt = "" if unsure <= RTOL else f"differences are uncertain by {unsure:.3g}"
        return Answer(gradient, doubt=doubt, certificate={"uncertainty": unsure})


def met(group: str, name: str, problem: Problem, mode: Mode, **parameters: Any) -> Case:
    """One mode meets one problem."""
    reference, start = problem.reference, time.perf_counter()
    answer, flags, raised = None, [], {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            answer = mode.run()
        except TELLING as error:
            flags.append(f"{type(error).__name__}: {error}")
        except Exception as error:  # recorded, and the other ways are tried all the same
            raised = {"raised": f"{type(error).__name__}: {error}"}
    seconds = time.perf_counter() - start
    if not raised:
        flags += [f"{w.category.__name__}: {w.message}" for w in caught if _telling(w)]
    error, claimed, certificate = math.nan, math.nan, raised
    if answer is not None:
        error = relative_error(answer.gradient, reference.gradient)
        claimed, certificate = answer.claimed, answer.certificate or {}
        flags += [answer.doubt] * bool(answer.doubt)
    tolerance = mode.accuracy * max(reference.condition, 1.0)
    described = {"problem": problem.name, "condition": f"{reference.condition:.1e}", **parameters}
    return Case(
        group, name, json.dumps(described), error, claimed, tolerance, reference.uncertainty,
        "; ".join(flags), mode.biased, problem.minimum, seconds, certificate,
    )  # fmt: skip


def _telling(warning: warnings.WarningMessage) -> bool:
    return issubclass(warning.category, (UserWarning, RuntimeWarning))


def relative_error(gradient: Tensor, exact: np.ndarray) -> float:
    """``|gradient - exact| / |exact|``, over the entries that the gradient has."""
    found = gradient.detach().cpu().double().numpy().astype(np.longdouble)
    exact = exact[: len(found)]
    if not np.isfinite(found).all():
        return math.inf
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
