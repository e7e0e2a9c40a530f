"""The checks of a bilevel problem: implicit, unrolled, and the values of its value function."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.certificate import Certificate
from hyperlearn.checks.function import backward
from hyperlearn.checks.point import (
    Settings,
    Tree,
    cast,
    entry_scales,
    in_double,
    refused,
    validated,
)
from hyperlearn.checks.report import CheckRow
from hyperlearn.hypergradients import hypergradient
from hyperlearn.inner import Newton
from hyperlearn.problem import BilevelProblem
from hyperlearn.solutions import argmin
from operators import Space
from solvers import Auto, ConvergenceWarning, LinearSolver

# How far from y* a certificate is tried, and an unrolled solve starts, relative to each entry.
NEARBY = 1e-3
# Newton steps: from 1e-3 three are enough for the solution, and four for its derivative.
UNROLLED = 5


class ValueFunction:
    """``Phi(x) = outer_loss(y*(x), x)`` in the dtype of x.

    Parameters
    ----------
    problem
        Its data are taken as one batch.
    solver
        ``x -> y*(x)``; None for `hyperlearn.argmin`, for the first x from the problem's ``y0`` and
        for those after it from the first solution: where there are several, it is always the same.
    """

    def __init__(self, problem: BilevelProblem, solver: Callable[[Tree], Tree] | None) -> None:
        self.problem, self.solver = problem, solver
        self.first: dict[torch.dtype, Tree] = {}

    def at(self, dtype: torch.dtype) -> BilevelProblem:
        """The problem with its points and data in another dtype."""
        names = ("x0", "y0", "inner_data", "outer_data")
        changed = {name: cast(getattr(self.problem, name), dtype) for name in names}
        return dataclasses.replace(self.problem, **changed)

    def inner_loss(self, y: Tree, x: Tree, *batch: Tree) -> Tensor:
        """With the regulariser, as the inner problem has it."""
        value = self.problem.inner_loss(y, x, *batch)
        if self.problem.regularizer is None:
            return value
        return value + self.problem.regularizer(Space.of(y).ravel(y))

    def solve(self, x: Tree) -> Tree:
        """``y*(x)``."""
        dtype = Space.of(x).dtype
        problem = self.at(dtype)
        if self.solver is None:
            y = argmin(self._inner(problem), self.first.get(dtype, problem.y0), x)
            self.first.setdefault(dtype, pytree.tree_map(torch.detach, y))
            return y
        y = self.solver(x)
        problem.y_space.check(y, "the result of solver")
        return y

    def unrolled(self, x: Tree, start: Tree) -> Tensor:
        """``Phi(x)`` with the derivative that the inner solver's own steps have.

        The steps are those of the solver that was given; or a few pure Newton steps from `start`,
        near the solution. These converge quadratically, and their derivative one step behind.
        """
        if self.solver is None:
            inner = self._inner(self.at(Space.of(x).dtype))
            steps = Newton(line_search=False, rtol=0.0, maxiter=UNROLLED)
            with warnings.catch_warnings():
                # No tolerance is asked for, so that none is met; the comparison will tell.
                warnings.simplefilter("ignore", ConvergenceWarning)
                y = argmin(inner, start, x, method=steps, differentiate="unrolled")
        else:
            y = self.solver(x)
            if not any(leaf.requires_grad for leaf in pytree.tree_leaves(y)):
                raise RuntimeError("the result of solver carries no derivative in x")
        return self._outer(y, x)

    def __call__(self, x: Tree) -> Tensor:
        """``outer_loss(y*(x), x)``."""
        return self._outer(self.solve(x), x)

    def _inner(self, problem: BilevelProblem) -> Callable[[Tree, Tree], Tensor]:
        batch = () if problem.inner_data is None else (problem.inner_data,)
        return lambda y, x: self.inner_loss(y, x, *batch)

    def _outer(self, y: Tree, x: Tree) -> Tensor:
        data = self.at(Space.of(x).dtype).outer_data
        batch = () if data is None else (data,)
        return self.problem.outer_loss(y, x, *batch)


def check_problem(
    problem: BilevelProblem,
    x: Tree,
    solver: Callable[[Tree], Tree] | None,
    linear_solver: LinearSolver | None,
    settings: Settings,
) -> tuple[list[CheckRow], list[str]]:
    """Rows and notes for a bilevel problem at x; the arguments are those of `hyperlearn.check`."""
    own = validated(x)
    problem.x_space.check(own, "x")
    value = ValueFunction(problem, solver)
    point, refusal = in_double(value, own, settings)
    rows = [] if refusal is None else [refusal]
    notes = list(point.notes())

    here = value.at(point.space.dtype)
    y = pytree.tree_map(torch.detach, value.solve(point.x))
    if problem.project_inner is not None and _moves(problem.project_inner, y):
        raise ValueError(
            "project_inner is active at the inner solution y*(x0): the implicit hypergradient is "
            "that of the inner problem without the constraint; expected an x where it is inactive"
        )
    if linear_solver is None:
        linear_solver = Auto(rtol=max(1e-10, 100 * point.epsilon))

    def implicit(y: Tree) -> tuple[Tensor, Certificate]:
        gradient, certificate = hypergradient(
            here.outer_loss,
            value.inner_loss,
            y,
            point.x,
            inner_batch=here.inner_data,
            outer_batch=here.outer_data,
            solver=linear_solver,
            smoothness=here.smoothness,
        )
        return point.space.ravel(gradient).detach(), certificate

    space = Space.of(y)
    shift = torch.randn(space.size, generator=point.generator, dtype=torch.float64)
    flat = space.ravel(y)
    nearby = space.unravel(flat + NEARBY * entry_scales(y) * shift.to(flat))
    gradients: dict[str, Tensor] = {}
    try:
        gradients["implicit"], certificate = implicit(y)
    except Exception as error:
        rows.append(refused("implicit", error))
    else:
        notes.append(
            f"at the inner solution |d_y G| = {certificate.inner_stationarity:.1e}, and the "
            f"adjoint residual is {certificate.adjoint_residual:.1e} ({certificate.solver})"
        )
    try:
        unrolled = backward(lambda x: value.unrolled(x, nearby), point.x)
        gradients["unrolled"] = point.space.ravel(unrolled).detach()
    except Exception as error:
        rows.append(refused("unrolled", error))
    for gradient in gradients.values():
        point.learn_gradient(gradient)
    slopes = {name: point.slopes(gradient) for name, gradient in gradients.items()}
    for name, along in slopes.items():
        rows += point.compare(name, along)
    if len(slopes) == 2:
        rows += point.identity("implicit = unrolled", slopes["implicit"], slopes["unrolled"])
    if here.smoothness is not None and "implicit" in slopes:
        # At y* itself the bound is that of rounding; away from it the constants are on trial.
        inexact, certificate = implicit(nearby)
        if certificate.error_bound is not None:
            along = point.slopes(inexact)
            rows += point.compare("certificate", along, certificate.error_bound)
    return rows, notes


def _moves(projection: Callable[[Tree], Tree], y: Tree) -> bool:
    space = Space.of(y)
    flat = space.ravel(y)
    moved = space.ravel(projection(y)) - flat
    return float(moved.norm()) > math.sqrt(torch.finfo(flat.dtype).eps) * float(flat.norm())
