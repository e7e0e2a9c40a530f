"""Gradient descent, proximal where there is a constraint or a penalty, and its accelerations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hyperlearn.conditions import ProximalGradient, Stationary
from hyperlearn.inner.equation import Equation
from hyperlearn.inner.method import InnerMethod, State, row_norm, spread

Acceleration = Literal["none", "nesterov", "strongly-convex"]


@dataclass(frozen=True, kw_only=True)
class GradientDescent(InnerMethod):
    """``y <- prox_{s h}(z - s d_y f(z, x))``, with ``z = y + beta (y - y_before)``.

    ``prox`` is the identity for a plain loss, the projection under a constraint.

    - ``"none"``: beta = 0.
    - ``"nesterov"``: ``t' = (1 + sqrt(1 + 4 t^2)) / 2``, ``beta = (t - 1) / t'`` (FISTA), with
      t = 1 again where the step turns against the momentum (O'Donoghue & Candes).
    - ``"strongly-convex"``: ``beta = (1 - sqrt(q)) / (1 + sqrt(q))``, ``q = s strong_convexity``.

    Parameters
    ----------
    step_size
        s. None: ``1 / L``, with L the largest eigenvalue of the Hessian at y0 by the power method,
        and halved where a step raises what ``f`` may be at most for that L (backtracking).
    acceleration
        See above.
    strong_convexity
        mu, a lower bound of the Hessian's eigenvalues; for ``"strongly-convex"``.
    rtol, atol, maxiter, strict
        As for `InnerMethod`.

    Notes
    -----
    A step costs a gradient; with backtracking two values more. Source: Beck & Teboulle, SIAM J.
    Imaging Sci. 2 (2009); O'Donoghue & Candes (2015), arXiv:1204.3982, eq. 12; Nesterov,
    Introductory Lectures (2004), 2.2.11.
    """

    maxiter: int = 20000
    step_size: float | None = None
    acceleration: Acceleration = "none"
    strong_convexity: float | None = None

    solves = (Stationary, ProximalGradient)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            "step_size", self.step_size is None or self.step_size > 0, "a number > 0, or None"
        )
        kinds = ("none", "nesterov", "strongly-convex")
        self._require("acceleration", self.acceleration in kinds, f"one of {kinds}")
        if (self.acceleration == "strongly-convex") != (self.strong_convexity is not None):
            raise ValueError(
                "GradientDescent: strong_convexity and acceleration='strongly-convex' go together; "
                f"got strong_convexity={self.strong_convexity}, {self.acceleration!r}"
            )

    @property
    def unrollable(self) -> str:
        """With a step size that is given."""
        return "" if self.step_size else "its step size is searched for: set step_size"

    def begin(self, equation: Equation, Y: Tensor) -> State:
        """F at the first points, and a step size."""
        state = {"y": Y, "F": equation.residual(Y), "before": Y}
        state["t"] = torch.ones_like(Y[:, 0])
        if self.step_size is None:
            state["s"] = 1 / largest_curvature(equation, Y)
            state["stuck"] = torch.zeros_like(state["t"], dtype=torch.bool)
        else:
            state["s"] = torch.full_like(state["t"], self.step_size)
        return state

    def advance(self, equation: Equation, state: State) -> State:
        """One step."""
        Y, before, t, s = state["y"], state["before"], state["t"], state["s"]
        beta, t_next = self._momentum(t, s)
        Z = Y + spread(beta, Y) * (Y - before)
        plain = self.acceleration == "none" and not _proximal(equation)
        gradient = state["F"] if plain else self._gradient(equation, Z)
        new: State = {"before": Y}
        if self.step_size is None:
            following, s, stuck = self._searched(equation, Z, gradient, s)
            new["stuck"] = stuck
        else:
            following = self._step(equation, Z, gradient, s)
        if self.acceleration == "nesterov":
            # (z - y+).(y+ - y) > 0: the step turns against the momentum.
            turned = ((Z - following) * (following - Y)).sum(1) > 0
            t_next = torch.where(turned, 1.0, t_next)
            new["before"] = torch.where(spread(turned, Y), following, Y)
        return new | {"y": following, "F": equation.residual(following), "t": t_next, "s": s}

    def _momentum(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        if self.acceleration == "nesterov":
            t_next = (1 + (1 + 4 * t.square()).sqrt()) / 2
            return (t - 1) / t_next, t_next
        if self.acceleration == "strongly-convex":
            assert self.strong_convexity is not None
            root = (s * self.strong_convexity).clamp_max(1.0).sqrt()
            return (1 - root) / (1 + root), t
        return torch.zeros_like(t), t

    def _gradient(self, equation: Equation, Z: Tensor) -> Tensor:
        smooth = smooth_part(equation)
        equation.evaluations += 1
        gradient: Tensor = equation.each(smooth.residual, Z)
        return gradient

    def _step(self, equation: Equation, Z: Tensor, gradient: Tensor, s: Tensor) -> Tensor:
        free = Z - spread(s, Z) * gradient
        conditions = equation.conditions
        if not isinstance(conditions, ProximalGradient):
            return free

        def one(y: Tensor, x: Any, s: Tensor) -> Tensor:
            return conditions.proximal(y, s, x)

        result: Tensor = equation.each(one, free, s)
        return result

    def _searched(
        self, equation: Equation, Z: Tensor, gradient: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Halve s until ``f(y+) <= f(z) + g.(y+ - z) + |y+ - z|^2 / (2 s)``.

        Where rounding of f hides the last term, the gradient tells: ``(g+ - g).(y+ - z)`` is to be
        at most ``|y+ - z|^2 / s``, which for a quadratic f is the same.
        """
        smooth = smooth_part(equation)
        value = equation.each(smooth.value, Z)
        rounding = torch.finfo(Z.dtype).eps ** (2 / 3) * value.abs()
        following = self._step(equation, Z, gradient, s)
        for _ in range(60):
            move = following - Z
            square = move.square().sum(1)
            reached = equation.each(smooth.value, following)
            high = ~(reached <= value + (gradient * move).sum(1) + square / (2 * s))
            hidden = square / (2 * s) <= rounding
            if bool((high & hidden).any()):
                bent = ((self._gradient(equation, following) - gradient) * move).sum(1)
                high = torch.where(hidden, ~(bent <= square / s), high)
            if not bool(high.any()):
                return following, s, high
            s = torch.where(high, s / 2, s)
            following = torch.where(
                spread(high, Z), self._step(equation, Z, gradient, s), following
            )
        return torch.where(spread(high, Z), Z, following), s, high


def smooth_part(equation: Equation) -> Stationary:
    """What has a gradient."""
    conditions = equation.conditions
    if isinstance(conditions, ProximalGradient):
        return conditions.smooth
    assert isinstance(conditions, Stationary)
    return conditions


def _proximal(equation: Equation) -> bool:
    return isinstance(equation.conditions, ProximalGradient)


def largest_curvature(equation: Equation, Y: Tensor, steps: int = 20) -> Tensor:
    """``|A v|`` after so many steps of the power method for the smooth part's Hessian, ``(B,)``.

    An estimate from below, of the size of the largest eigenvalue; 1 where there is no curvature.
    """
    smooth = smooth_part(equation)

    def product(y: Tensor, x: Any, v: Tensor) -> Tensor:
        image: Tensor = torch.func.vjp(lambda y: smooth.residual(y, x), y)[1](v)[0]
        return image

    # No random numbers under vmap; and the same for every member, whatever company it is in.
    v = torch.cos(torch.arange(1, Y.shape[1] + 1, dtype=torch.float64) ** 2).to(Y).expand_as(Y)
    size = torch.ones_like(Y[:, 0])
    with torch.no_grad():
        for _ in range(steps):
            v = equation.each(product, Y, v / spread(size, Y))
            size = row_norm(v).to(Y.dtype)
            size = torch.where((size > 0) & torch.isfinite(size), size, 1.0)
    return size
