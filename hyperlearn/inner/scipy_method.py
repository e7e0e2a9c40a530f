"""scipy.optimize as an inner method, for small problems."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy import optimize as _optimize
from torch import Tensor

from hyperlearn.conditions import LeastSquares, ProximalGradient, Stationary
from hyperlearn.inner.equation import Equation
from hyperlearn.inner.method import InnerInfo, InnerMethod, State, Tolerance

# Its stubs tell every method apart by a literal; here the name is the user's.
optimize: Any = _optimize


@dataclass(frozen=True, kw_only=True)
class SciPy(InnerMethod):
    """``scipy.optimize``: `root` for a residual, `minimize` for a loss, `least_squares` for those.

    F, its Jacobian and gradients come from torch, in float64 on the CPU. What scipy says of itself
    is noted; whether it has converged is judged by the residual, as of every method.

    Parameters
    ----------
    method
        Of the function of scipy; None for ``"hybr"``, ``"L-BFGS-B"`` or ``"trf"``. The Hessian is
        handed to those that want one (``"trust-exact"``, ``"Newton-CG"``, ``"dogleg"``, ...).
    options
        For scipy as they are (``options=`` of `root` and `minimize`, keywords of `least_squares`).
        Tolerances are set to what rtol asks for unless given here.
    rtol
        As for `InnerMethod`, but None means ``sqrt(eps)``: scipy's line searches compare values of
        the loss, which tell points apart no better.
    atol, maxiter, strict
        As for `InnerMethod`.

    Notes
    -----
    Dense throughout. The members of a batch are solved one by one.
    """

    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    blocks = False
    power = 0.5

    @property
    def unrollable(self) -> str:
        """Never."""
        return "scipy's steps are not torch's: take GradientDescent or Newton(line_search=False)"

    def begin(self, equation: Equation, Y: Tensor) -> State:
        """F at the first point."""
        return {"y": Y, "F": equation.residual(Y)}

    def advance(self, equation: Equation, state: State) -> State:
        """Scipy does all of its steps at once."""
        raise NotImplementedError("SciPy has no single step")

    def run(self, equation: Equation, Y: Tensor) -> tuple[State, InnerInfo]:
        """The whole solve."""
        start = time.perf_counter()
        state = self.begin(equation, Y)
        tolerance = Tolerance(self, equation, state)
        met = tolerance.met(state)
        history = [torch.linalg.vector_norm(state["F"], dim=1)]
        steps, said = 0, ""
        if not bool(met.all()) and self.maxiter:
            tolerance.measure(state, ~met)
            scale = float(tolerance.scale.max()) * tolerance.rtol
            found, steps, said = self._solve(equation, Y, max(scale, self.atol))
            following = torch.as_tensor(found).to(Y).reshape(Y.shape)
            state = self.begin(equation, following)
            met = tolerance.met(state)
            history.append(torch.linalg.vector_norm(state["F"], dim=1))
        unmeasured = torch.isinf(tolerance.scale)
        if bool(unmeasured.any()):
            tolerance.measure(state, unmeasured)
        count = torch.full((1,), steps, dtype=torch.long)
        info = self._judge(tolerance, state, met, count, history, equation, start)
        if said and not info.converged:
            # It stopped of itself, whether at its limit of steps or at one of its tolerances.
            status = (
                "stagnated" if info.status == "maxiter" and steps < self.maxiter else info.status
            )
            reason = info.reason.replace(f": {info.status} after", f": {status} after", 1)
            info = replace(
                info, status=status, reason=f"{reason} (scipy: {' '.join(said.split())})"
            )
        return state, info

    def _solve(self, equation: Equation, Y: Tensor, target: float) -> tuple[np.ndarray, int, str]:
        def at(function: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
            def numbers(y: np.ndarray) -> np.ndarray:
                point = torch.as_tensor(y).to(Y)[None]
                return function(point)[0].double().cpu().numpy()

            return numbers

        y0 = Y[0].double().cpu().numpy()
        conditions, options = equation.conditions, dict(self.options)
        residual, matrix = at(equation.residual), at(equation.matrix)
        if isinstance(conditions, LeastSquares):
            residuals = at(lambda Y: equation.each(conditions.residuals, Y))
            jacobian = at(
                lambda Y: equation.each(
                    lambda y, x: torch.func.jacrev(conditions.residuals)(y, x), Y
                )
            )
            tolerances = {"xtol": 1e-15, "ftol": 1e-15, "gtol": max(target, 1e-15)}
            answer = optimize.least_squares(
                residuals,
                y0,
                jacobian,
                method=self.method or "trf",
                max_nfev=self.maxiter,
                **(tolerances | options),
            )
            return answer.x, int(answer.nfev), str(answer.message)
        if isinstance(conditions, Stationary):
            method = self.method or "L-BFGS-B"
            wants_hessian = method in (
                "Newton-CG",
                "dogleg",
                "trust-ncg",
                "trust-krylov",
                "trust-exact",
                "trust-constr",
            )
            limits: dict[str, Any] = {"maxiter": self.maxiter}
            if method == "L-BFGS-B":
                limits |= {"gtol": target / max(len(y0), 1) ** 0.5, "ftol": 0.0, "maxls": 50}
            elif method in ("BFGS", "CG", "trust-ncg", "trust-krylov", "trust-exact", "dogleg"):
                limits |= {"gtol": target / max(len(y0), 1) ** 0.5}
            elif method == "Newton-CG":
                limits |= {"xtol": 1e-15}
            answer = optimize.minimize(
                lambda y: float(at(equation.value)(y)),
                y0,
                jac=residual,
                hess=matrix if wants_hessian else None,
                method=method,
                options=limits | options,
            )
            return answer.x, int(getattr(answer, "nit", 0)), str(answer.message)
        if isinstance(conditions, ProximalGradient):
            raise TypeError("SciPy is not for constraints or penalties: take GradientDescent")
        method = self.method or "hybr"
        limits = {"xtol": 1e-14} if method in ("hybr", "lm") else {"fatol": target}
        if method == "lm":
            limits |= {"ftol": 1e-15}
        answer = optimize.root(residual, y0, jac=matrix, method=method, options=limits | options)
        return answer.x, int(getattr(answer, "nfev", 0)), str(answer.message)
