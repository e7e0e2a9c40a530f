"""Unrolling: reverse-mode differentiation through the inner steps themselves (ITD)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperlearn.certificate import Certificate, Estimate
from hyperlearn.methods.method import Estimator, Method
from hyperlearn.methods.trajectory import InnerStep, Trajectory
from hyperlearn.oracles import Oracles
from hyperlearn.problem import BilevelProblem


@dataclass(frozen=True, kw_only=True)
class Unrolled(Method):
    """Gradient of ``x -> g(y_T(x), x)`` through the last steps of the inner solve.

    With the step ``y_{t+1} = S_t(y_t, x)`` and ``u_T = d_y g``, the reverse sweep

        gradient += (d_x S_t)^T u_{t+1},   u_t = (d_y S_t)^T u_{t+1}

    replays the stored points, so memory is ``T d`` numbers and no graph is kept. It is the exact
    gradient of what the steps compute with ``y_{T-K}`` held fixed, hence biased by truncation, with
    ``|u_{T-K}| / |u_T|`` left over; at a stationary y it equals the Neumann series of K terms. Each
    step costs a Hessian and a cross product. Source: Shaban et al. (2019), arXiv:1810.10667.

    Parameters
    ----------
    unroll_steps
        K, how many of the T inner steps to go back; None for all.
    """

    unroll_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        k = self.unroll_steps
        self._require(
            "unroll_steps",
            k is None or 1 <= k <= self.inner_steps,
            f"1 to inner_steps={self.inner_steps}, or None for all",
        )

    def start(
        self, problem: BilevelProblem, oracles: Oracles, generator: torch.Generator
    ) -> Estimator:
        """A fresh estimator for one run."""
        return _ReverseSweep(self, problem, oracles, generator)


class _ReverseSweep(Estimator):
    method: Unrolled

    def estimate(self, x: Tensor, trajectory: Trajectory) -> Estimate:
        oracles, y = self.oracles, trajectory.y
        u, gradient = oracles.outer_gradients(y, x, self.outer_batches.draw())
        scale = float(u.norm())
        steps = trajectory.steps[-(self.method.unroll_steps or len(trajectory.steps)) :]
        for step in reversed(steps):
            u, through_x = self._pull_back(step, x, u)
            gradient = gradient + through_x
        left_over = float(u.norm()) / scale if scale else 0.0
        last = trajectory.steps[-1]

        def certify() -> Certificate:
            tolerance = float(torch.finfo(y.dtype).eps) ** 0.5
            return Certificate(
                inner_stationarity=self.stationarity(y, x, last.batch),
                adjoint_residual=left_over,
                hessian_residual=None,
                converged=left_over <= tolerance,
                exact=False,
                iterations=len(steps),
                operator="inner steps",
                solver="reverse sweep",
                reason=(
                    f"gradient of the last {len(steps)} inner steps; the dependence on where they "
                    f"started, a share of {left_over:.3g} of d_y g, is cut off"
                ),
                constraint_active=last.projected,
            )

        return Estimate(gradient, None, certify)

    def _pull_back(self, step: InnerStep, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        def replay(y: Tensor, x: Tensor) -> Tensor:
            gradient = torch.func.grad(lambda v: self.oracles.inner(v, x, step.batch))(y)
            following = y - step.step_size * gradient
            return following if self.project is None else self.project(following)

        return self.oracles.step_pullback(replay, step.y, x, u, step.batch)
