"""`implicit`: any solver of the user's, made a differentiable function of its arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hyperlearn.conditions import Conditions, FixedPoint, Root, Stationary
from hyperlearn.implicit_function import Outer, Problem, Rule, Solved, solution
from hyperlearn.inner.curvature import minimum_or_not
from hyperlearn.inner.equation import Equation
from hyperlearn.inner.fixed_point_iteration import FixedPointIteration
from hyperlearn.inner.method import InnerInfo, InnerMethod, State
from hyperlearn.solutions import Answer, lift
from operators import Space
from operators.space import flatten
from operators.tracing import differentiating, tracked
from solvers import LinearSolver, PreparedSolver

Tree = Any
KINDS: dict[str, type[Conditions]] = {
    "residual": Root,
    "loss": Stationary,
    "fixed_point": FixedPoint,
}


def implicit(
    *,
    residual: Callable[..., Tree] | None = None,
    loss: Callable[..., Tensor] | None = None,
    fixed_point: Callable[..., Tree] | None = None,
    linear_solver: LinearSolver | None = None,
    operator: Callable[..., Any] | None = None,
    byproduct: bool = False,
    differentiate: str = "implicit",
    rtol: float | None = None,
    atol: float = 0.0,
    strict: bool = False,
    return_info: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a solver ``x -> y`` with what its result fulfils; then torch can differentiate it.

    The solver may be any code: it is called with plain tensors and is never differentiated. Its
    result is checked: ``|F(y, x)|`` is measured, and where it is above the tolerance a
    `solvers.ConvergenceWarning` says so.

    Parameters
    ----------
    residual, loss, fixed_point
        One of them: ``F(y, *args) = 0``, ``d_y f(y, *args) = 0``, or ``y = T(y, *args)``, with the
        positional arguments of the solver. All tensors in these are differentiated with respect to.
        What a solver needs besides (a start, options) goes to it by keyword, and is a constant.
    linear_solver, operator
        As for `root`; ``operator(y, *args)``.
    byproduct
        The solver returns ``(y, prepared)``, where `prepared` is a solver prepared for A at y or
        near it (its last factorisation): the adjoint system is solved with its help, to the same
        tolerance. Only y is handed on.
    differentiate
        ``"implicit"``, ``"identity"``, or for a fixed point ``"one_step"`` (see `root`).
    rtol, atol
        Tolerance of the check, as for `inner.InnerMethod`; rtol None means ``sqrt(eps)``.
    strict
        Raise `solvers.NotConvergedError` where the check warns.
    return_info
        The decorated function returns ``(y, info)``.

    Raises
    ------
    TypeError, ValueError
        None or more than one of the three; from the function: a result that is no nested tensor, a
        tensor that is being differentiated in a keyword argument, or closed over.

    Notes
    -----
    Under ``torch.func.vmap`` the solver is called for one member after the other.

    Examples
    --------
    A bisection, which no derivative passes through:

    >>> import torch, hyperlearn as hl
    >>> @hl.implicit(residual=lambda y, a: y**3 - a)
    ... def cube_root(a, *, steps=200):
    ...     low, high = torch.zeros_like(a), torch.ones_like(a) * 10
    ...     for _ in range(steps):
    ...         middle = (low + high) / 2
    ...         low, high = (
    ...             torch.where(middle**3 < a, middle, low),
    ...             torch.where(middle**3 < a, high, middle),
    ...         )
    ...     return (low + high) / 2
    >>> a = torch.tensor(8.0, dtype=torch.float64)
    >>> torch.func.grad(cube_root)(a)
    tensor(0.0833, dtype=torch.float64)
    """
    named = {"residual": residual, "loss": loss, "fixed_point": fixed_point}
    given = {name: function for name, function in named.items() if function is not None}
    if len(given) != 1:
        raise TypeError(
            f"implicit: {', '.join(given) or 'nothing'} given; expected one of residual=, loss=, "
            "fixed_point="
        )
    ((name, function),) = given.items()
    if not callable(function):
        raise TypeError(f"implicit: {name} is a {type(function).__name__}; expected f(y, *args)")
    modes = ("implicit", "identity") + (("one_step",) if name == "fixed_point" else ())
    if differentiate not in modes:
        raise ValueError(
            f"implicit: differentiate={differentiate!r}; expected one of {modes}: the steps of the "
            "solver are not known"
        )
    if linear_solver is not None and not isinstance(linear_solver, LinearSolver):
        raise TypeError(f"linear_solver is {linear_solver!r}; expected settings, as solvers.CG()")
    condition, kind = function, KINDS[name]

    def decorate(solver: Callable[..., Any]) -> Callable[..., Any]:
        judge = AsGiven(rtol=rtol, atol=atol, strict=strict, name=_name(solver))

        @functools.wraps(solver)
        def solved(*args: Any, **options: Any) -> Any:
            _refuse_keywords(options, condition, name)

            def of(y: Tree, x: Sequence[Any]) -> Any:
                return condition(y, *x)

            def operator_of(y: Tree, x: Sequence[Any]) -> Any:
                assert operator is not None
                return operator(y, *x)

            unknown = Space.flat(0, torch.float32)  # until the solver returns y
            conditions = kind(of, unknown, None if operator is None else operator_of)
            x: Any = args
            if differentiating():
                x = lift(conditions, args)
            lifted = x is not args

            def solve(x: Any) -> Any:
                with torch.enable_grad():
                    return solver(*(x[0] if lifted else x), **options)

            outer, tensors = Outer.of(x)
            rule: Rule = "identity" if differentiate == "identity" else "implicit"
            if differentiate == "one_step":
                rule = FixedPointIteration()
            problem = _Called(conditions, solve, judge, byproduct, outer, linear_solver, rule)
            y, _ = solution(problem, torch.zeros(()), tensors)
            info = problem.log[0]
            judge.report(info, frames=2)
            tree = problem.conditions.space.unravel(y)
            return Answer(tree, info) if return_info else tree

        return solved

    return decorate


@dataclass(frozen=True, kw_only=True)
class AsGiven(InnerMethod):
    """A solution that somebody else has found: measured, and left as it is."""

    maxiter: int = 0
    name: str = "the solver"

    power = 0.5

    def begin(self, equation: Equation, Y: Tensor) -> State:
        """F at the solution."""
        return {"y": Y, "F": equation.residual(Y)}

    def advance(self, equation: Equation, state: State) -> State:
        """Nothing."""
        return state

    def run(self, equation: Equation, Y: Tensor) -> tuple[State, InnerInfo]:
        """Measure."""
        state, info = super().run(equation, Y)
        status = "converged" if info.converged else "inaccurate"
        noun = equation.conditions.noun
        reason = (
            f"{self.name} returned y with a residual of {noun}(y, x) of {info.residual:.3g} of its "
            f"scale; asked for {self.tolerance(Y.dtype):.3g}"
        )
        return state, replace(info, status=status, reason=reason, method=self.name)


class _Called(Problem):
    """A problem whose solver is a function of the user's, and whose y is known once it returns."""

    def __init__(
        self,
        conditions: Conditions,
        call: Callable[[Any], Any],
        judge: AsGiven,
        byproduct: bool,
        outer: Outer,
        linear_solver: LinearSolver | None,
        rule: Rule,
    ) -> None:
        super().__init__(conditions, self._solve, outer, linear_solver, mode=rule)
        self.call, self.judge = call, judge
        self.byproduct = byproduct

    def _solve(self, equation: Equation, Y: Tensor) -> Solved:
        # Of each member: the solver knows nothing of batches.
        members = [equation.member(i) for i in range(Y.shape[0])]
        # Copies: what the solver does to its arguments is its own affair.
        plain = [[tensor.detach().clone() for tensor in member.tensors] for member in members]
        returned = [self.call(equation.tree(tensors)) for tensors in plain]
        near: PreparedSolver | None = None
        if self.byproduct:
            for value in returned:
                if not (isinstance(value, tuple) and len(value) == 2):
                    raise TypeError(
                        f"{self.judge.name} returned {type(value).__name__}; with byproduct=True "
                        "expected (y, prepared)"
                    )
            prepared = [value[1] for value in returned]
            if not all(isinstance(one, PreparedSolver) for one in prepared):
                raise TypeError(
                    f"the by-product of {self.judge.name} is a {type(prepared[0]).__name__}; "
                    "expected a prepared solver, as solvers.DenseLU().prepare(A)"
                )
            returned = [value[0] for value in returned]
            near = prepared[0] if not equation.sizes else None
        space = Space.of(returned[0], f"the result of {self.judge.name}")
        rows = [space.ravel(y, f"the result of {self.judge.name}").detach() for y in returned]
        block = torch.stack(rows)
        if not bool(torch.isfinite(block).all()):
            raise ValueError(f"{self.judge.name} returned NaN or infinite entries")
        self.conditions.space = space
        _, info = self.judge.run(equation, block)
        return Solved(block, minimum_or_not(equation, block, info), None, near)


def _refuse_keywords(options: dict[str, Any], condition: Callable[..., Any], kind: str) -> None:
    try:
        shared = sorted(options.keys() & inspect.signature(condition).parameters.keys())
    except ValueError:  # a builtin without a signature
        shared = []
    if shared:
        raise TypeError(
            f"{', '.join(shared)} given by keyword; {kind} has a parameter of that name, which "
            "would not get it: expected the arguments of the condition by position"
        )
    for name, value in options.items():
        leaves, _ = flatten(value)
        if any(isinstance(leaf, Tensor) and tracked(leaf) for leaf in leaves):
            raise ValueError(
                f"the keyword argument {name} holds a tensor that is being differentiated; its "
                "derivative would be a silent zero: make it a positional argument, of the "
                "condition too, or detach it"
            )


def _name(solver: Callable[..., Any]) -> str:
    return str(getattr(solver, "__name__", type(solver).__name__))
