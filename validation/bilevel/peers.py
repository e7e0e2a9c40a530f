"""The same zoo through JAXopt with its defaults: default tolerances, steps, linear solver.

Double precision is switched on, and the problems are those in float64. Each hypergradient is
``jax.grad`` of ``outer(solver.run(y0, x).params, x)`` with ``implicit_diff=True``, the default.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console

from validation.bilevel.problems import Problem, zoo
from validation.bilevel.run import relative_error
from validation.report import Case, show, write


def solvers(problem: Problem, jax: Any, jaxopt: Any, data: SimpleNamespace) -> Iterator[Any]:
    """``(name, x -> (y, state), tolerance)`` of what JAXopt has for such a problem."""
    xp, y0 = jax.numpy, jax.numpy.asarray(problem.y0)

    def inner(y: Any, x: Any) -> Any:
        return problem.inner(xp, y, x, data)

    def plain(kind: Any) -> Any:
        solver = kind(inner)
        return kind.__name__, lambda x: solver.run(y0, x), solver.tol

    if problem.kind == "argmin":
        yield plain(jaxopt.GradientDescent)
        yield plain(jaxopt.LBFGS)
    elif problem.kind == "root":
        yield plain(jaxopt.Broyden)
    elif problem.kind == "fixed point":
        yield plain(jaxopt.FixedPointIteration)
        yield plain(jaxopt.AndersonAcceleration)
    elif problem.kind == "least squares":
        yield plain(jaxopt.GaussNewton)
        yield plain(jaxopt.LevenbergMarquardt)
    elif problem.kind == "kkt":
        yield from quadratic_programmes(problem, jax, jaxopt, data)
    else:
        maps: dict[str, tuple[Any, Callable[[Any], Any]]] = {
            "lasso": (jaxopt.prox.prox_lasso, lambda x: xp.exp(x[0])),
            "elastic net": (
                # Its second number is relative to the first, with a factor 1/2.
                jaxopt.prox.prox_elastic_net,
                lambda x: (xp.exp(x[0]), 2 * xp.exp(x[1] - x[0])),
            ),
            "group lasso": (
                lambda y, weight, scaling=1.0: jax.vmap(
                    lambda group: jaxopt.prox.prox_group_lasso(group, weight, scaling)
                )(y.reshape(-1, 3)).reshape(-1),
                lambda x: xp.exp(x[0]),
            ),
            "box": (
                jaxopt.projection.projection_box,
                lambda x: (-0.3 + 0 * y0, 0.2 * xp.exp(x[0]) + 0 * y0),
            ),
            "ball": (jaxopt.projection.projection_l2_ball, lambda x: xp.exp(x[0])),
            "simplex": (jaxopt.projection.projection_simplex, lambda x: 1.0),
        }
        proximal, setting = maps[problem.family]
        if problem.family in ("box", "ball", "simplex"):
            solver = jaxopt.ProjectedGradient(inner, projection=proximal)
        else:
            solver = jaxopt.ProximalGradient(inner, prox=proximal)
        yield type(solver).__name__, lambda x: solver.run(y0, setting(x), x), solver.tol


def quadratic_programmes(
    problem: Problem, jax: Any, jaxopt: Any, data: SimpleNamespace
) -> Iterator[Any]:
    """The programmes of the zoo are quadratic: their matrices come from the inner loss."""
    options = problem.options(data)
    xp = jax.numpy

    def run(x: Any, solver: Any) -> Any:
        objective = (data.H, -(data.C @ x))
        equal = (data.E, x[0] * data.e) if "equality" in options else None
        unequal = (data.G, data.g * xp.exp(x[1])) if "inequality" in options else None
        if unequal is None and not isinstance(solver, jaxopt.OSQP):
            params, state = solver.run(params_obj=objective, params_eq=equal)
        else:
            params, state = solver.run(params_obj=objective, params_eq=equal, params_ineq=unequal)
        return params.primal, state

    kinds = [jaxopt.OSQP]
    if "inequality" not in options:
        kinds.append(jaxopt.EqualityConstrainedQP)
    for kind in kinds:
        solver = kind()
        tolerance = getattr(solver, "tol", 1e-3)  # OSQP hides it; its documentation says 1e-3
        yield kind.__name__, lambda x, solver=solver: run(x, solver), tolerance


def met(problem: Problem, name: str, run: Any, tolerance: float, jax: Any) -> Case:
    """One of its solvers meets one problem."""
    xp, reference = jax.numpy, problem.reference
    data = problem.on(xp.asarray)
    flags, said, error = [], {}, math.nan
    start, printed = time.perf_counter(), io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        try:

            def value(x: Any) -> Any:
                y, state = run(x)
                return problem.outer(xp, y, x, data), state

            gradient, state = jax.grad(value, has_aux=True)(xp.asarray(problem.x))
            found = torch.as_tensor(np.array(gradient))
            error = relative_error(found, reference.gradient)
            if not bool(torch.isfinite(found).all()):
                flags.append("not finite")
            if hasattr(state, "error"):
                said = {"error": float(state.error), "tol": float(tolerance)}
                said["met"] = said["error"] <= said["tol"]
        except Exception as failure:  # whatever it raises is a flag
            flags.append(f"{type(failure).__name__}: {str(failure)[:200]}")
    seconds = time.perf_counter() - start
    flags += [
        f"{w.category.__name__}: {w.message}"
        for w in caught
        if issubclass(w.category, (UserWarning, RuntimeWarning))
    ]
    flags += [f"printed: {printed.getvalue()[:200]}"] * bool(printed.getvalue())
    parameters = json.dumps({"problem": problem.name, "condition": f"{reference.condition:.1e}"})
    return Case(
        problem.family, name, parameters, error, uncertainty=reference.uncertainty,
        flagged="; ".join(flags), valid=problem.minimum, seconds=seconds, certificate=said,
    )  # fmt: skip


def counts(cases: list[Case]) -> dict[str, float]:
    """How many are wrong, and how many of these anything tells of."""
    answered = [case for case in cases if case.answered]
    wrong = [case for case in answered if case.wrong]
    inexact = [case for case in answered if case.wrong or not case.error <= 1e-4]

    def unmet(case: Case) -> bool:
        return case.certificate.get("met") is False

    return {
        "cases": len(cases),
        "answers": len(answered),
        "above 1e-2": len(wrong),
        "of these flagged": sum(bool(case.flagged) for case in wrong),
        "or state.error > tol": sum(bool(case.flagged) or unmet(case) for case in wrong),
        "above 1e-4": len(inexact),
        "of these flagged ": sum(bool(case.flagged) for case in inexact),
        "or state.error > tol ": sum(bool(case.flagged) or unmet(case) for case in inexact),
        "median error": float(np.median([case.error for case in answered])) if answered else 0.0,
    }


def main(seed: int, only: str, console: Console, path: Path) -> list[Case]:
    """Run, print, write the report; what is missing is said."""
    try:
        import jax
        import jaxopt
    except ModuleNotFoundError as error:
        console.print(f"{error.name} is not installed: no peer was run (pip install jaxopt jax)")
        return []
    jax.config.update("jax_enable_x64", True)
    cases = []
    for problem in zoo(seed):
        if only not in problem.name or problem.dtype != "float64":
            continue
        data = problem.on(jax.numpy.asarray)
        for name, run, tolerance in solvers(problem, jax, jaxopt, data):
            cases.append(met(problem, name, run, tolerance, jax))
    rows: Mapping[str, list[Case]] = {
        name: [case for case in cases if case.name == name]
        for name in dict.fromkeys(case.name for case in cases)
    }
    if cases:
        table = {name: counts(mine) for name, mine in rows.items()} | {"all": counts(cases)}
        show("JAXopt with its defaults", table, console)
    write(cases, path, seed=seed)
    console.print(f"written to {path}")
    return cases
