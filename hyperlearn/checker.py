"""Checks of derivatives for users: a function, or a bilevel problem, against its own values.

<gradient, v> = (phi(h) - phi(-h)) / 2h,   phi(t) = f(x + t v)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hyperlearn.checks.bilevel import check_problem
from hyperlearn.checks.function import check_function
from hyperlearn.checks.point import Function, Settings
from hyperlearn.checks.report import CheckReport
from hyperlearn.oracles import Loss
from hyperlearn.problem import BilevelProblem
from solvers import LinearSolver

Tree = Any


def check(
    target: BilevelProblem | Function | None = None,
    x: Tree = None,
    *,
    outer_loss: Loss | None = None,
    inner_loss: Loss | None = None,
    y0: Tree = None,
    inner_data: Tree = None,
    outer_data: Tree = None,
    solver: Callable[[Tree], Tree] | None = None,
    linear_solver: LinearSolver | None = None,
    directions: int = 3,
    seed: int = 0,
    rtol: float = 1e-5,
    allow_refusals: bool = True,
) -> CheckReport:
    r"""Compare derivatives at x with ``(f(x + h v) - f(x - h v)) / 2h`` over a sweep of steps h.

    Of a function: reverse mode (`torch.func.grad`), ``backward()``, forward mode
    (`torch.func.jvp`), forward against reverse, a batch under `torch.func.vmap` against one point
    at a time, and x's own dtype (float32 for an x in float64) against float64.

    Of a bilevel problem: the implicit hypergradient and the one that is unrolled through the inner
    solver, both against the value function ``Phi(x) = outer_loss(y*(x), x)`` and each other; and,
    where the problem has `Smoothness` constants, whether a hypergradient at an inexact y is off by
    no more than its certificate claims.

    Parameters
    ----------
    target
        A function ``f(x) -> scalar tensor``, or a `BilevelProblem`; or None, with `outer_loss` and
        `inner_loss`.
    x
        Where to check: a tensor or a nested structure of tensors, of one floating dtype and device.
        The problem's ``x0`` by default.
    outer_loss, inner_loss, y0, inner_data, outer_data
        A bilevel problem by its parts, as for `BilevelProblem`.
    solver
        For a bilevel problem: ``x -> y``, in place of a tight solve by `hyperlearn.argmin`. Values
        are then taken at its y, and the unrolled hypergradient goes through its own steps.
    linear_solver
        For the adjoint system of the implicit hypergradient; by default `solvers.Auto` with a
        tolerance of 1e-10 in float64.
    directions, seed
        How many random directions, and what they are drawn from.
    rtol
        Error to accept, relative to the size of the directional derivative; never below
        ``100 eps^(2/3)``, which is what differences can resolve: 4e-9 in float64, and 2e-3 where
        the function can only be computed in float32.
    allow_refusals
        Whether checks that cannot run (a function without forward mode, say) count as passed. They
        are listed in any case, and reverse mode has to run.

    Returns
    -------
    CheckReport
        ``print`` it; ``report.passed``; ``report.raise_for_failure()``.

    Raises
    ------
    TypeError, ValueError
        x is empty, not floating or not finite; f changes x in place, or its value is not a finite
        scalar tensor; arguments that do not go together.

    Notes
    -----
    The comparison is made in float64. Directions are relative to each entry,
    ``v_i = +-[0.5, 1.5] s_i`` with ``s_i = |x_i|`` (an entry 0 gets the typical size of its tensor,
    or 1), so that entries of 1e-6 and of 1e6 weigh the same, and an error in a single entry cannot
    hide. Errors are relative to

        max(|<gradient, v>|, |difference|, |s * gradient|_2, bend),

    which does not vanish where the terms of a directional derivative cancel. The bend is by how
    much the slope changes within the smallest step, and matters only near stationary points. The
    tolerance of a row is `rtol` plus the uncertainty of the differences, which
    `hyperlearn.checks.differences.sweep` estimates.

    - passed: within the tolerance, and the differences resolve `rtol`.
    - failed: they have a clear plateau and the derivative is off it.
    - noisy: they have no plateau; or there is a kink at x; or there are two plateaus and the
      derivative is on the other one.

    Costs about 20 values of f a direction, and the derivatives; for a bilevel problem each value is
    an inner solve.

    Examples
    --------
    >>> import torch, hyperlearn as hl
    >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> hl.check(lambda x: (x**3).sum(), x).passed
    True
    >>> report = hl.check(lambda x: (x * x.detach() ** 2).sum(), x)
    >>> report.rows[0].check, report.rows[0].verdict
    ('reverse mode', 'failed')
    """
    if not isinstance(directions, int) or directions < 1:
        raise ValueError(f"directions={directions!r}; expected an integer of at least 1")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol={rtol!r}; expected a number between 0 and 1")
    settings = Settings(directions, seed, rtol)
    parts = {
        "outer_loss": outer_loss,
        "inner_loss": inner_loss,
        "y0": y0,
        "inner_data": inner_data,
        "outer_data": outer_data,
    }
    given = [name for name, part in parts.items() if part is not None]
    if target is None:
        needed = [name for name in ("outer_loss", "inner_loss", "y0") if parts[name] is None]
        if needed or x is None:
            missing = ", ".join([*needed, *(["x"] if x is None else [])])
            raise TypeError(
                f"neither a function nor a BilevelProblem was given, and of its parts {missing} "
                "is missing; expected check(function, x), check(problem), or "
                "check(outer_loss=..., inner_loss=..., x=..., y0=...)"
            )
        target = BilevelProblem(x0=x, **parts)
    elif given:
        raise TypeError(f"{', '.join(given)} go without a function or problem in front of them")
    if isinstance(target, BilevelProblem):
        rows, notes = check_problem(
            target, target.x0 if x is None else x, solver, linear_solver, settings
        )
    elif callable(target):
        if solver is not None or linear_solver is not None:
            raise TypeError("solver and linear_solver are for bilevel problems, not for a function")
        if x is None:
            raise TypeError("x is missing: expected where to check the function")
        rows, notes = check_function(target, x, settings)
    else:
        raise TypeError(
            f"target is a {type(target).__name__}; expected a function f(x) or a BilevelProblem"
        )
    return CheckReport(tuple(rows), tuple(notes), allow_refusals)
