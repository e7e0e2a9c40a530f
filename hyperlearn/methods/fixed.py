"""The floor: train the inner problem and leave the outer variable where it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperlearn.certificate import Certificate, Estimate
from hyperlearn.methods.method import Estimator, Method
from hyperlearn.methods.trajectory import Trajectory
from hyperlearn.oracles import Oracles
from hyperlearn.problem import BilevelProblem


@dataclass(frozen=True, kw_only=True)
class FixedOuter(Method):
    """x stays at x0: what any bilevel method has to beat in the same time."""

    def start(
        self, problem: BilevelProblem, oracles: Oracles, generator: torch.Generator
    ) -> Estimator:
        """A fresh estimator for one run."""
        return _NoHypergradient(self, problem, oracles, generator)


class _NoHypergradient(Estimator):
    def estimate(self, x: Tensor, trajectory: Trajectory) -> Estimate:
        last = trajectory.steps[-1]

        def certify() -> Certificate:
            return Certificate(
                inner_stationarity=self.stationarity(trajectory.y, x, last.batch),
                adjoint_residual=0.0,
                hessian_residual=None,
                converged=True,
                exact=False,
                iterations=0,
                operator="none",
                solver="none",
                reason="x is held fixed: there is no hypergradient",
                constraint_active=last.projected,
            )

        return Estimate(torch.zeros_like(x), None, certify)
