"""Newton's method with a line search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperlearn.conditions import Stationary
from hyperlearn.inner.equation import Equation
from hyperlearn.inner.line_search import backtracking, rounding_of
from hyperlearn.inner.method import InnerMethod, State, solved, wide


@dataclass(frozen=True, kw_only=True)
class Newton(InnerMethod):
    """``y <- y - t A^-1 F(y, x)``, ``A = d_y F``; quadratic near a solution.

    With a line search, t is the first of ``1, 1/2, 1/4, ...`` that lowers ``|F|^2 / 2`` (of a loss:
    the loss) by ``decrease`` times what the slope promises (Armijo); where none does, the member
    has stagnated. Of a loss whose Hessian is formed and not positive definite, the eigenvalues are
    replaced by their absolute values, so that the step goes downhill and not to a saddle point.

    Parameters
    ----------
    line_search
        Without it t = 1: the pure iteration, which can be unrolled.
    decrease
        Share of the promised decrease that is asked for, in (0, 1/2).
    rtol, atol, maxiter, strict
        As for `InnerMethod`.

    Notes
    -----
    Up to 256 unknowns A is formed by n sweeps at once and factorised, ``O(n^3)``; beyond, and where
    a linear solver or an operator is given, that solver does it, keeping its analysis from step to
    step. Source: Nocedal & Wright, Numerical Optimization (2006), algorithms 3.2 and 11.4;
    Dauphin et al. (2014), arXiv:1406.2572, for the absolute values.
    """

    maxiter: int = 100
    line_search: bool = True
    decrease: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("decrease", 0 < self.decrease < 0.5, "a number in (0, 1/2)")

    @property
    def unrollable(self) -> str:
        """Without the line search."""
        return "its line search is not differentiable: Newton(line_search=False)" * self.line_search

    def begin(self, equation: Equation, Y: Tensor) -> State:
        """F, and A where it is formed."""
        return _with_matrix(equation, {"y": Y, "F": equation.residual(Y)}, fresh=Y)

    def advance(self, equation: Equation, state: State) -> State:
        """One damped step."""
        Y, F = state["y"], state["F"]
        descent = isinstance(equation.conditions, Stationary)
        if "A" in state:
            step = -_direction(state["A"], F, downhill=descent and self.line_search)
        else:
            step = -equation.solve(Y, F)
        if not self.line_search:
            following = Y + step
            return _with_matrix(equation, {"y": following, "F": equation.residual(following)})
        if descent:
            merit, slope = equation.value(Y), (F * step).sum(1)
        else:
            # d |F|^2/2 along -A^-1 F is -|F|^2.
            merit, slope = F.square().sum(1) / 2, -F.square().sum(1)
        rounding = rounding_of(merit, Y, state.get("A")) if descent else None
        following, residual, stuck = backtracking(
            equation,
            Y,
            F,
            step,
            merit,
            slope,
            decrease=self.decrease,
            loss=descent,
            rounding=rounding,
        )
        # Where nothing is gained, neither A nor the point changes.
        return _with_matrix(equation, {"y": following, "F": residual, "stuck": stuck})


def _with_matrix(equation: Equation, state: State, fresh: Tensor | None = None) -> State:
    if equation.dense:
        state["A"] = equation.matrix(state["y"])
    if fresh is not None:
        state["stuck"] = torch.zeros(fresh.shape[0], dtype=torch.bool, device=fresh.device)
    return state


def _direction(A: Tensor, F: Tensor, *, downhill: bool) -> Tensor:
    """``A^-1 F``, or for a loss ``|A|^-1 F`` where A is not positive definite."""
    A, right = wide(A), wide(F)[..., None]
    if downhill:
        factor, failed = torch.linalg.cholesky_ex(A)
        if not bool(failed.any()):
            return torch.cholesky_solve(right, factor)[..., 0].to(F.dtype)
        finite = torch.isfinite(A).all(-1).all(-1)
        values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], A, 0.0))
        # What is zero to rounding is no curvature: along it the step is that of the steepest
        # descent in units of the largest.
        eps = torch.finfo(A.dtype).eps * A.shape[-1]
        size = values.abs().clamp_min(values.abs().amax(1, keepdim=True) * eps)
        along = (vectors.mT @ right)[..., 0] / torch.where(size == 0, 1.0, size)
        return (vectors @ along[..., None])[..., 0].to(F.dtype)
    return solved(A, right)[..., 0].to(F.dtype)
