"""Solutions as functions of x: `root`, `fixed_point`, `argmin`, `least_squares`.

Each runs an inner method to a tolerance and hands back y, which torch can differentiate with
respect to x, through the implicit function theorem or, if asked, through the steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.conditions import (
    Conditions,
    FixedPoint,
    LeastSquares,
    OperatorOf,
    ProximalGradient,
    Root,
    Stationary,
)
from hyperlearn.implicit_function import Outer, Problem, Rule, Solved, solution
from hyperlearn.inner.curvature import minimum_or_not
from hyperlearn.inner.equation import DENSE, Equation
from hyperlearn.inner.fixed_point_iteration import Anderson
from hyperlearn.inner.gradient_descent import GradientDescent, largest_curvature
from hyperlearn.inner.lbfgs import LBFGS
from hyperlearn.inner.levenberg_marquardt import LevenbergMarquardt
from hyperlearn.inner.method import InnerInfo, InnerMethod
from hyperlearn.inner.newton import Newton
from hyperlearn.kkt import KKTPoint, kkt_residual, kkt_start
from hyperlearn.lifting import Lifting, Watch
from hyperlearn.unrolling import Unroll, mode_of, unrolled
from operators import Space
from operators.closures import Closure
from operators.hidden_tensors import refuse_closed_over
from operators.space import flatten
from operators.tracing import differentiating, full_precision, readable, tracked
from solvers import LinearSolver

Tree = Any
Differentiate = str | Unroll


class Answer(NamedTuple):
    """A solution and what its solve says of itself."""

    y: Tree
    info: InnerInfo


def root(
    residual: Callable[[Tree, Tree], Tree],
    y0: Tree,
    x: Tree,
    *,
    method: InnerMethod | None = None,
    linear_solver: LinearSolver | None = None,
    operator: OperatorOf | None = None,
    differentiate: Differentiate = "implicit",
    return_info: bool = False,
) -> Any:
    """``y*(x)`` with ``residual(y*, x) = 0``, differentiable in x: ``dy = -A^-1 d_x F dx``.

    Parameters
    ----------
    residual
        ``F(y, x)``, of the structure of y; torch operations of its arguments. Tensors that it
        closes over as a nested function or lambda count as part of x. One that is differentiated
        and that it reaches otherwise (by an object, a module, a global) is refused: hand it over
        in x.
    y0
        Where to start: a tensor or nested structure (dict, tuple, dataclass, ...), of any floating
        dtype. The solution does not depend on it: its gradient is zero, but for ``"unrolled"``,
        where the steps do.
    x
        What to differentiate with respect to, and data: any nested structure.
    method
        Settings of an inner method (`hyperlearn.inner`); None for `inner.Newton`.
    linear_solver
        Applies ``A^-1`` in Newton's steps and ``A^-T`` in derivatives. None factorises A up to 256
        unknowns and takes `solvers.Auto` beyond.
    operator
        ``(y, x) -> A``, where A has a structure to use, as `operators.SparseJacobian`.
    differentiate
        ``"implicit"``; ``"unrolled"``, ``"truncated(K)"`` or `Unroll`: through the steps of the
        method, where they are differentiable; ``"one_step"``: through one step from the solution;
        ``"identity"``: I in place of A. Of the last two a second derivative is the derivative of
        that rule.
    return_info
        Return ``(y, info)``, see `inner.InnerInfo`. After a backward pass ``info.adjoint`` says how
        its linear solves went.

    Returns
    -------
    y
        Like y0.

    Raises
    ------
    TypeError, ValueError
        An argument that does not fit; a tensor that the residual reaches, and no rule would.
    solvers.NotConvergedError
        With a method that is ``strict``.
    solvers.SingularError
        A is singular, so that there is no derivative.
    NotImplementedError
        Under forward over forward mode; use forward over reverse.

    Warns
    -----
    solvers.ConvergenceWarning
        The tolerance was not met, by the solve or by the linear solve of a derivative.

    Notes
    -----
    Every transform of torch.func composes. Under vmap the problems are solved as one batch, each to
    its own convergence. A derivative costs one linear solve with A and one sweep through F,
    whatever the solve took. Source: Blondel et al. (2022), arXiv:2105.15183.

    Examples
    --------
    >>> import torch, hyperlearn as hl
    >>> x = torch.tensor([4.0, 9.0], dtype=torch.float64)
    >>> y = hl.root(lambda y, x: y**2 - x, torch.ones_like(x), x)
    >>> y
    tensor([2., 3.], dtype=torch.float64)
    >>> torch.func.grad(lambda x: hl.root(lambda y, x: y**2 - x, torch.ones_like(x), x).sum())(x)
    tensor([0.2500, 0.1667], dtype=torch.float64)
    """
    space = _space(y0)
    conditions = Root(_callable(residual, "residual"), space, operator)
    return _solution(
        conditions, y0, x, method or Newton(), linear_solver, differentiate, return_info
    )


def fixed_point(
    map: Callable[[Tree, Tree], Tree],
    y0: Tree,
    x: Tree,
    *,
    method: InnerMethod | None = None,
    linear_solver: LinearSolver | None = None,
    operator: OperatorOf | None = None,
    differentiate: Differentiate = "implicit",
    return_info: bool = False,
) -> Any:
    """``y*(x)`` with ``y* = map(y*, x)``: `root` of ``y - map(y, x)``.

    Parameters
    ----------
    map
        ``T(y, x)``, of the structure of y.
    method
        None for `inner.Anderson`; `inner.FixedPointIteration` is the plain one.
    operator
        ``(y, x) -> I - d_y T``.
    y0, x, linear_solver, differentiate, return_info
        As for `root`, whose errors and warnings are these too.

    Examples
    --------
    >>> import torch, hyperlearn as hl
    >>> x = torch.tensor(0.5, dtype=torch.float64)
    >>> y = hl.fixed_point(lambda y, x: x * torch.cos(y), torch.zeros_like(x), x)
    >>> abs(y - x * torch.cos(y)) < 1e-10
    tensor(True)
    """
    space = _space(y0)
    conditions = FixedPoint(_callable(map, "map"), space, operator)
    return _solution(
        conditions, y0, x, method or Anderson(), linear_solver, differentiate, return_info
    )


def argmin(
    loss: Callable[[Tree, Tree], Tensor],
    y0: Tree,
    x: Tree,
    *,
    constraint: Callable[..., Tree] | None = None,
    penalty: Any = None,
    equality: Callable[[Tree, Tree], Tree] | None = None,
    inequality: Callable[[Tree, Tree], Tree] | None = None,
    method: InnerMethod | None = None,
    linear_solver: LinearSolver | None = None,
    operator: OperatorOf | None = None,
    differentiate: Differentiate = "implicit",
    return_info: bool = False,
) -> Any:
    """``y*(x) = argmin_y loss(y, x)``, perhaps constrained: a point where the gradient vanishes.

    Parameters
    ----------
    loss
        ``f(y, x)``, a scalar, twice differentiable.
    constraint
        Projection onto the set that y must lie in (`Box`, `Ball`, `Simplex`, or any function of y,
        or of y and x): the solution is the fixed point of the projected gradient.
    penalty
        Nonsmooth, added to the loss (`L1`, `ElasticNet`, `GroupLasso`, or any object with
        ``prox(y, step, x)`` and ``penalty(y, x)``): derivatives are those on the active set.
    equality, inequality
        ``h(y, x) = 0`` and ``g(y, x) <= 0``, any functions: the conditions of Karush, Kuhn and
        Tucker are solved (see `kkt_residual`). A point that meets them is a minimiser where the
        problem is convex.
    method
        None for `inner.Newton` up to 256 unknowns and `inner.LBFGS` beyond; for an accelerated
        `inner.GradientDescent` with a constraint or a penalty.
    operator
        ``(y, x) -> `` the Hessian, or what is to stand for it.
    y0, x, linear_solver, differentiate, return_info
        As for `root`, whose errors and warnings are these too.

    Notes
    -----
    Of several minima it is the one that the method finds from y0; to first order it depends on x as
    this says as long as the Hessian is not singular. Up to 256 unknowns a stationary point that is
    no minimum is told as not converged (``info.status == "saddle"``); for such a one take `root` of
    the gradient.

    Examples
    --------
    Ridge regression, whose solution is linear in b:

    >>> import torch, hyperlearn as hl
    >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    >>> def loss(y, x):
    ...     return ((A @ y - x["b"]) ** 2).sum() + x["penalty"] * (y**2).sum()
    >>> x = {"b": torch.ones(3).double(), "penalty": torch.tensor(0.5).double()}
    >>> y = hl.argmin(loss, torch.zeros(2).double(), x)
    >>> exact = torch.linalg.solve(A.T @ A + 0.5 * torch.eye(2), A.T @ x["b"])
    >>> torch.allclose(y, exact)
    True

    The lasso, with the gradient of its solution by the penalty:

    >>> weight = torch.tensor(0.8, dtype=torch.float64)
    >>> def lasso(weight):
    ...     y0, b = torch.zeros(2).double(), torch.tensor([1.0, 0.3]).double()
    ...     fit = lambda y, x: ((y - b) ** 2).sum()
    ...     return hl.argmin(fit, y0, weight, penalty=hl.L1(lambda x: x))
    >>> lasso(weight), torch.func.jacrev(lasso)(weight)
    (tensor([0.6000, 0.0000], dtype=torch.float64), tensor([-0.5000,  0.0000], dtype=torch.float64))
    """
    space = _space(y0)
    _callable(loss, "loss")
    given = [
        name
        for name, value in (("constraint", constraint), ("penalty", penalty))
        if value is not None
    ]
    if len(given) == 2:
        raise ValueError(
            "argmin: constraint and penalty together; expected one of them: the proximal map of "
            "their sum is not that of either"
        )
    if equality is not None or inequality is not None:
        if given or operator is not None:
            extra = (given or ["operator"])[0]
            raise ValueError(
                f"argmin: {extra} together with equality or inequality; expected everything in "
                "those two"
            )
        return _kkt(
            loss, y0, x, equality, inequality, method, linear_solver, differentiate, return_info
        )
    conditions: Conditions
    if given:
        if operator is not None:
            raise ValueError("argmin: operator with a constraint or a penalty is not supported")
        prox, value = _proximal(constraint, penalty)
        conditions = ProximalGradient(loss, space, prox, value)
        method = method or GradientDescent(acceleration="nesterov")
    else:
        conditions = Stationary(loss, space, operator)
        method = method or (Newton() if space.size <= DENSE else LBFGS())
    return _solution(conditions, y0, x, method, linear_solver, differentiate, return_info)


def least_squares(
    residuals: Callable[[Tree, Tree], Tree],
    y0: Tree,
    x: Tree,
    *,
    method: InnerMethod | None = None,
    linear_solver: LinearSolver | None = None,
    operator: OperatorOf | None = None,
    differentiate: Differentiate = "implicit",
    return_info: bool = False,
) -> Any:
    """``y*(x) = argmin_y |residuals(y, x)|^2 / 2``.

    Parameters
    ----------
    residuals
        ``r(y, x)``: any nested structure, of as many entries as it likes.
    method
        None for `inner.LevenbergMarquardt`.
    operator
        ``(y, x) -> `` what is to stand for the Hessian: ``J^T J`` gives the derivative of
        Gauss-Newton, which leaves out ``sum_i r_i d_yy r_i``.
    y0, x, linear_solver, differentiate, return_info
        As for `root`, whose errors and warnings are these too.

    Notes
    -----
    Derivatives use the whole Hessian, also where the method is Gauss-Newton, and no damping.

    Examples
    --------
    >>> import torch, hyperlearn as hl
    >>> t = torch.linspace(0, 1, 5, dtype=torch.float64)
    >>> data = 2 * torch.exp(-3 * t)
    >>> fit = lambda y, data: y[0] * torch.exp(-y[1] * t) - data
    >>> hl.least_squares(fit, torch.ones(2).double(), data)
    tensor([2.0000, 3.0000], dtype=torch.float64)
    """
    space = _space(y0)
    conditions = LeastSquares(_callable(residuals, "residuals"), space, operator)
    return _solution(
        conditions,
        y0,
        x,
        method or LevenbergMarquardt(),
        linear_solver,
        differentiate,
        return_info,
    )


def _solution(
    conditions: Conditions,
    y0: Tree,
    x: Tree,
    method: InnerMethod,
    linear_solver: LinearSolver | None,
    differentiate: Differentiate,
    return_info: bool,
) -> Any:
    mode = mode_of(differentiate)
    if not isinstance(method, InnerMethod):
        raise TypeError(
            f"method is {method!r}; expected settings of an inner method, as "
            "hyperlearn.inner.Newton()"
        )
    if linear_solver is not None and not isinstance(linear_solver, LinearSolver):
        raise TypeError(
            f"linear_solver is {linear_solver!r}; expected settings of a solver, as solvers.CG()"
        )
    method.check(conditions)
    if not isinstance(mode, str) or mode == "one_step":
        why = method.unrollable
        if why:
            raise ValueError(f"differentiate={differentiate!r} with {type(method).__name__}: {why}")
    if differentiating():
        x = lift(conditions, x)
        for leaf in flatten(x)[0]:
            if isinstance(leaf, Tensor) and leaf.is_complex() and tracked(leaf):
                raise TypeError(
                    f"x holds a complex tensor of shape {tuple(leaf.shape)} that is being "
                    "differentiated; expected real ones: pass torch.view_as_real of it, and "
                    "torch.view_as_complex inside the function"
                )
    start = conditions.space.ravel(y0)
    with full_precision(start.device):
        if isinstance(conditions, ProximalGradient):
            x = _with_step(conditions, start.detach(), x)
        outer, tensors = Outer.of(x)
        problem = Problem(conditions, _by(method), outer, linear_solver, mode=_rule(mode, method))
        if isinstance(mode, Unroll):
            constants = [tensor.detach() for tensor in tensors]
            _, steps = solution(problem, start.detach(), constants)
            y = unrolled(mode, problem, method, start, tensors, steps)
        else:
            y, _ = solution(problem, start.detach(), tensors)
    info = problem.log[0]
    method.report(info, frames=3)
    tree = conditions.space.unravel(y)
    return Answer(tree, info) if return_info else tree


def _rule(mode: str | Unroll, method: InnerMethod) -> Rule:
    """What stands for the derivative of the solution."""
    if mode == "one_step":
        return method
    return "identity" if mode == "identity" else "implicit"


def _with_step(conditions: ProximalGradient, start: Tensor, x: Tree) -> Tree:
    """``(x, s)``: F is to be measured with a step that suits the loss, of each member its own."""
    outer, tensors = Outer.of(x)
    equation = Equation(conditions, outer, [tensor.detach() for tensor in tensors])
    step = 1 / largest_curvature(equation, start[None])[0]
    conditions.take_step()
    return x, step.detach()


def _by(method: InnerMethod) -> Callable[[Equation, Tensor], Solved]:
    """The method as an inner solver; members one by one where it takes no blocks."""

    def solve(equation: Equation, Y: Tensor) -> Solved:
        if not method.blocks and equation.sizes:
            return _one_by_one(method, equation, Y)
        state, info = method.run(equation, Y)
        info = minimum_or_not(equation, state["y"], info, state.get("A"))
        return Solved(state["y"], info, state.get("A"), equation.prepared)

    return solve


def _one_by_one(method: InnerMethod, equation: Equation, Y: Tensor) -> Solved:
    solved = [_by(method)(equation.member(i), Y[i : i + 1]) for i in range(len(Y))]
    infos = [one.info for one in solved]
    worst = max(infos, key=lambda info: (not info.converged, info.residual))
    steps = torch.tensor([info.iterations for info in infos], device=Y.device)
    residuals = torch.tensor([info.residual for info in infos], device=Y.device)
    failed = sum(not info.converged for info in infos)
    info = replace(
        worst,
        reason=worst.reason + (f" ({failed} of {len(infos)} members)" if failed else ""),
        iterations=int(steps.max()),
        evaluations=sum(info.evaluations for info in infos),
        seconds=sum(info.seconds for info in infos),
        member_iterations=steps,
        member_residuals=residuals,
    )
    return Solved(torch.cat([one.y for one in solved]), info)


def _kkt(
    loss: Callable[[Tree, Tree], Tensor],
    y0: Tree,
    x: Tree,
    equality: Callable[[Tree, Tree], Tree] | None,
    inequality: Callable[[Tree, Tree], Tree] | None,
    method: InnerMethod | None,
    linear_solver: LinearSolver | None,
    differentiate: Differentiate,
    return_info: bool,
) -> Any:
    residual = kkt_residual(loss, equality, inequality)
    start = kkt_start(y0, x, equality, inequality)
    answer = root(
        residual,
        start,
        x,
        method=method or LevenbergMarquardt(),
        linear_solver=linear_solver,
        differentiate=differentiate,
        return_info=True,
    )
    point: KKTPoint = answer.y
    return Answer(point.y, answer.info) if return_info else point.y


def _proximal(
    constraint: Callable[..., Tree] | None, penalty: Any
) -> tuple[Callable[[Tree, Any, Tree], Tree], Callable[[Tree, Tree], Tensor] | None]:
    if penalty is not None:
        if not (callable(getattr(penalty, "prox", None)) and hasattr(penalty, "penalty")):
            raise TypeError(
                f"penalty is {penalty!r}; expected an object with prox(y, step, x) and "
                "penalty(y, x), as hyperlearn.L1(0.1)"
            )
        return penalty.prox, penalty.penalty
    if not callable(constraint):
        raise TypeError(f"constraint is {constraint!r}; expected a projection, as Box(0, 1)")
    takes_x = _takes_x(constraint)
    project = constraint

    def prox(y: Tree, step: Any, x: Tree) -> Tree:
        return project(y, x) if takes_x else project(y)

    return prox, None


def _takes_x(projection: Callable[..., Any]) -> bool:
    """Whether a projection is one of y and x: by a second parameter that needs a value, or `x`."""
    try:
        parameters = list(inspect.signature(projection).parameters.values())
    except ValueError:
        return False  # a builtin without a signature
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    second = [p for p in parameters if p.kind in positional][1:2]
    return any(p.default is inspect.Parameter.empty or p.name == "x" for p in second)


def _space(y0: Tree) -> Space:
    space = Space.of(y0, "y0")
    if not space.size:
        raise ValueError("y0 has no entries; expected at least one unknown")
    leaves = pytree.tree_leaves(y0)
    if readable(*leaves):
        for leaf in leaves:
            if not bool(torch.isfinite(leaf).all()):
                count = int((~torch.isfinite(leaf)).sum())
                raise ValueError(f"y0 holds {count} NaN or infinite entries; expected numbers")
    return space


def _callable(function: Any, name: str) -> Any:
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__}; expected a function of (y, x)")
    return function


def lift(conditions: Conditions, x: Tree) -> Tree:
    """Make what the user's functions close over part of x, and freeze the rest; return x.

    Raises
    ------
    ValueError
        They reach a tensor that is differentiated where it cannot be lifted from.
    """
    lifting = Lifting(conditions.function, conditions._operator)
    held: list[Any] = []
    if isinstance(conditions, ProximalGradient):
        held = [conditions.prox, conditions.penalty]
    # With numbers in place of what is lifted: what is found now is reached in another way. An
    # object in x is a constant; one that holds such a tensor is none.
    functions = lifting.bound([0.0] * len(lifting.tensors))
    rest = [leaf for leaf in flatten(x)[0] if not isinstance(leaf, Tensor)]
    closure = Closure(*functions, *held, *rest)
    refuse_closed_over(conditions.noun, closure, x)
    conditions.watch = Watch(conditions.noun, closure)
    if not lifting.tensors:
        conditions.freeze(lifting)
        return x
    conditions.rebind(lifting)
    return (x, tuple(lifting.tensors))
