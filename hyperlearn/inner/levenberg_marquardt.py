"""Levenberg-Marquardt: damped Gauss-Newton for residuals, damped Newton for a loss."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hyperlearn.conditions import Conditions, LeastSquares, Stationary
from hyperlearn.inner.equation import DENSE, Equation
from hyperlearn.inner.line_search import rounding_of
from hyperlearn.inner.method import InnerMethod, State, finite, row_norm, spread, wide
from operators import Identity, Jacobian, LinearOperator
from solvers import CG, MINRES, ConvergenceWarning, solve
from solvers.columns import divisors


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt(InnerMethod):
    """``(B + lambda D) d = -g``, with lambda by how well the model told what a step would gain.

    For residuals r (of a root ``r = F``) ``g = J^T r`` and ``B = J^T J``; for another loss g is its
    gradient and B its Hessian. lambda is a trust region by another name: a step is taken where it
    lowers the merit, and lambda then falls by ``max(1/3, 1 - (2 rho - 1)^3)``, rho the gain over
    what the model promised; where not, it grows by 2, 4, 8, ... With ``damping=0`` the first steps
    are those of Gauss-Newton.

    Parameters
    ----------
    damping
        First lambda, relative to the largest entry of the diagonal of B (beyond 256 unknowns, to
        the curvature along the gradient).
    scale
        ``"identity"``: ``D = I`` (Levenberg). ``"diagonal"``: that of B, so that the steps do not
        change when an unknown is measured in other units (Marquardt); up to 256 unknowns.
    rtol, atol, maxiter, strict
        As for `InnerMethod`, of the gradient for least squares, of F for a root.

    Notes
    -----
    Up to 256 unknowns B is formed. Beyond, each step is solved by CG (MINRES for a loss) to a
    relative 1e-3. The damping is in the steps alone: the derivative of the solution knows nothing
    of it. Source: Madsen, Nielsen & Tingleff, Methods for non-linear least squares problems (2004),
    algorithm 3.16.
    """

    maxiter: int = 300
    damping: float = 1e-3
    scale: Literal["identity", "diagonal"] = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("damping", self.damping >= 0, "a number >= 0")
        self._require("scale", self.scale in ("identity", "diagonal"), "'identity' or 'diagonal'")

    @property
    def unrollable(self) -> str:
        """Never."""
        return "its damping is adapted: take Newton(line_search=False) or GradientDescent"

    def begin(self, equation: Equation, Y: Tensor) -> State:
        """Merit, curvature, and a damping of the curvature's size."""
        if self.scale == "diagonal" and equation.conditions.space.size > DENSE:
            raise ValueError(
                f"LevenbergMarquardt: scale='diagonal' with {Y.shape[1]} unknowns needs B formed; "
                f"expected at most {DENSE}, or scale='identity'"
            )
        state = {"y": Y, "F": equation.residual(Y), "merit": equation.value(Y)}
        _curve(equation, state)
        state["damping"] = self.damping * state["largest"]
        state["growth"] = torch.full_like(state["merit"], 2.0)
        state["stuck"] = torch.zeros(Y.shape[0], dtype=torch.bool, device=Y.device)
        return state

    def advance(self, equation: Equation, state: State) -> State:
        """One trial step of each member, taken or not."""
        Y, merit, damping = state["y"], state["merit"], state["damping"]
        g = state["g"]
        step, weighted = self._step(equation, state)
        # With (B + lambda D) d = -g the model loses g.d + d.B d / 2 = (g.d - lambda d.D d) / 2.
        promised = -((g * step).sum(1) - damping * (step * weighted).sum(1)) / 2
        trial = Y + step
        value, F = equation.value(trial), equation.residual(trial)
        gained = merit - value
        eps = torch.finfo(Y.dtype).eps
        # Where rounding hides what the merit gains, F decides.
        hidden = gained.abs() <= 2 * rounding_of(merit, Y, state.get("B"))
        level = hidden & (row_norm(F) < row_norm(state["F"]))
        good = ((gained > 0) & (promised > 0) | level) & finite(F)
        ratio = torch.where(level, 1.0, gained / torch.where(promised > 0, promised, 1.0))
        shrink = (1 - (2 * ratio.clamp(-1, 2) - 1) ** 3).clamp_min(1 / 3)
        grown = damping.clamp_min(eps * state["largest"]) * state["growth"]
        new = {
            "y": torch.where(spread(good, Y), trial, Y),
            "F": torch.where(spread(good, Y), F, state["F"]),
            "merit": torch.where(good, value, merit),
            "damping": torch.where(good, damping * shrink, grown),
            "growth": torch.where(good, 2.0, 2 * state["growth"]),
            # With such a damping a step is lost in rounding.
            "stuck": ~good & (grown > state["largest"] / eps),
        }
        if bool(good.any()):
            _curve(equation, new)
        else:  # nobody has moved
            new |= {name: state[name] for name in ("g", "B", "largest") if name in state}
        return new

    def _step(self, equation: Equation, state: State) -> tuple[Tensor, Tensor]:
        """``d`` and ``D d``."""
        Y, damping, g = state["y"], state["damping"], state["g"]
        if "B" in state:
            B = wide(state["B"])
            diagonal = B.diagonal(dim1=1, dim2=2).clamp_min(0)
            D = diagonal if self.scale == "diagonal" else torch.ones_like(diagonal)
            damped = B + torch.diag_embed(damping[:, None].to(B.dtype) * D)
            factor, failed = torch.linalg.cholesky_ex(damped)
            step = torch.cholesky_solve(wide(-g)[..., None], factor)[..., 0]
            # Not positive definite with this damping: no step, and the damping grows.
            step = torch.where((failed == 0)[:, None], step, torch.nan)
            return step.to(Y.dtype), (D * step).to(Y.dtype)
        conditions = equation.conditions
        loss = type(conditions) is Stationary
        method = MINRES if loss else CG
        solver = method(rtol=1e-3, maxiter=200)

        def one(y: Tensor, x: Any, damping: Tensor, g: Tensor) -> Tensor:
            A = _curvature(conditions, y, x)
            solution: Tensor = solve(A + damping * Identity(A.domain), -g, solver)
            return solution

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the outer loop judges the step
            step = equation.each(one, Y, damping, g)
        return step, step


def _curve(equation: Equation, state: State) -> None:
    """Gradient and curvature of the merit at the state's points, and how large it is."""
    conditions, Y = equation.conditions, state["y"]
    if isinstance(conditions, Stationary):
        state["g"] = state["F"]
    else:
        state["g"] = equation.transposed_product(Y, state["F"])
    if conditions.space.size <= DENSE:
        state["B"] = equation.each(lambda y, x: _dense_curvature(conditions, y, x), Y)
        largest = state["B"].diagonal(dim1=1, dim2=2).amax(1)
    else:
        unit = state["g"] / divisors(row_norm(state["g"]))[:, None]
        image = equation.each(lambda y, x, v: _curvature(conditions, y, x) @ v, Y, unit)
        largest = row_norm(image)
    state["largest"] = divisors(largest)


def _residuals(conditions: Conditions) -> Any:
    """The r of ``B = J^T J``."""
    if isinstance(conditions, LeastSquares):
        return conditions.residuals
    return conditions.residual


def _dense_curvature(conditions: Conditions, y: Tensor, x: Any) -> Tensor:
    if type(conditions) is Stationary:
        return conditions.dense(y, x)
    J = torch.func.jacrev(_residuals(conditions))(y, x)
    return J.mT @ J


def _curvature(conditions: Conditions, y: Tensor, x: Any) -> LinearOperator:
    if type(conditions) is Stationary:
        return conditions.operator(y, x)
    J = Jacobian(_residuals(conditions), y, x)
    return J.T @ J
