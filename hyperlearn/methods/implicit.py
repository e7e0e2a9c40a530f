"""Approximate implicit differentiation with the exact Hessian, and with the identity (T1-T2)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hyperlearn.methods.method import ImplicitEstimator, ImplicitMethod
from hyperlearn.methods.trajectory import Trajectory
from hyperlearn.oracles import Oracles
from hyperlearn.problem import BilevelProblem
from operators import Identity, LinearOperator
from solvers import CG, Diagonal, LinearSolver


@dataclass(frozen=True, kw_only=True)
class ImplicitDifferentiation(ImplicitMethod):
    """Exact inner Hessian x any solver, refreshed after each inner solve (AID).

    With `solvers.CG` the method of Pedregosa (2016, arXiv:1602.02355), with `solvers.Neumann` that
    of Lorraine, Vicol and Duvenaud (2020, arXiv:1911.02590).

    Parameters
    ----------
    solver
        By default `CG`.
    damping
        Added to the Hessian; biases the hypergradient and is reported in its certificate.
    """

    solver: LinearSolver = field(default_factory=CG)
    damping: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("damping", self.damping >= 0, "a number >= 0")

    def start(
        self, problem: BilevelProblem, oracles: Oracles, generator: torch.Generator
    ) -> ImplicitEstimator:
        """A fresh estimator for one run."""
        return _ExactHessian(self, problem, oracles, generator)


class _ExactHessian(ImplicitEstimator):
    method: ImplicitDifferentiation

    def operator(self, trajectory: Trajectory) -> tuple[LinearOperator | None, float]:
        return None, self.method.damping


@dataclass(frozen=True, kw_only=True)
class IdentityHessian(ImplicitMethod):
    """The identity in place of the inner Hessian: ``q = d_y g / curvature`` (T1-T2).

    Biased in scale and, unless the Hessian is a multiple of I, in direction (Luketina et al., 2016,
    arXiv:1511.06727). Costs no Hessian product.

    Parameters
    ----------
    curvature
        The multiple of I.
    """

    solver: LinearSolver = field(default_factory=Diagonal)
    curvature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("curvature", self.curvature > 0, "a positive number")

    def start(
        self, problem: BilevelProblem, oracles: Oracles, generator: torch.Generator
    ) -> ImplicitEstimator:
        """A fresh estimator for one run."""
        return _IdentityEstimator(self, problem, oracles, generator)


class _IdentityEstimator(ImplicitEstimator):
    method: IdentityHessian

    def operator(self, trajectory: Trajectory) -> tuple[LinearOperator | None, float]:
        y = trajectory.y
        return self.method.curvature * Identity(y.numel(), y.dtype, y.device), 0.0
