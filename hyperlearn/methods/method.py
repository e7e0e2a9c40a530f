"""What a bilevel algorithm is here: settings, and an estimator of the hypergradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hyperlearn.batches import Minibatches
from hyperlearn.certificate import Estimate
from hyperlearn.hypergradients import implicit_hypergradient
from hyperlearn.methods.trajectory import (
    FlatProjection,
    InnerStep,
    Trajectory,
    projected_sgd,
    stationarity,
)
from hyperlearn.oracles import Oracles
from hyperlearn.problem import BilevelProblem
from operators import LinearOperator
from solvers import LinearSolver

Tree = Any


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A double loop: warm-started projected SGD on y, a hypergradient, a step on x; and again.

    Methods differ only in the hypergradient: which operator stands for the inner Hessian, which
    solver applies its inverse, and when each is refreshed.

    Parameters
    ----------
    step_size
        Outer step: ``x <- Proj(x - step_size m)`` with ``m <- momentum m + hypergradient``.
    momentum
        In [0, 1).
    inner_steps
        T, steps of projected SGD on y an outer step; y is warm-started.
    inner_step_size, inner_decay
        Step t of the T has size ``inner_step_size / (1 + inner_decay t)``.
    inner_batch_size, outer_batch_size
        Samples a batch; None for all of the data.
    """

    step_size: float = 1.0
    momentum: float = 0.0
    inner_steps: int = 10
    inner_step_size: float = 0.1
    inner_decay: float = 0.0
    inner_batch_size: int | None = None
    outer_batch_size: int | None = None

    def __post_init__(self) -> None:
        self._require("step_size", self.step_size >= 0, "a number >= 0")
        self._require("momentum", 0 <= self.momentum < 1, "a number in [0, 1)")
        whole = isinstance(self.inner_steps, int) and self.inner_steps >= 1
        self._require("inner_steps", whole, "a whole number, at least 1")
        self._require("inner_step_size", self.inner_step_size > 0, "a positive number")
        self._require("inner_decay", self.inner_decay >= 0, "a number >= 0")
        for name in ("inner_batch_size", "outer_batch_size"):
            size = getattr(self, name)
            self._require(
                name, size is None or size >= 1, "at least 1, or None for all of the data"
            )

    def _require(self, name: str, satisfied: bool, expected: str) -> None:
        if not satisfied:
            raise ValueError(
                f"{type(self).__name__}: {name}={getattr(self, name)}; expected {expected}"
            )

    @abstractmethod
    def start(
        self, problem: BilevelProblem, oracles: Oracles, generator: torch.Generator
    ) -> Estimator:
        """A fresh estimator for one run."""


class Estimator(ABC):
    """Runs the inner solve and estimates the hypergradient, step after step; holds the state.

    `settled` says, once it does, why there is nothing left to do: then the run ends.

    Parameters
    ----------
    method, problem, oracles
        Settings, problem, and its counted derivatives.
    generator
        Source of every random draw.
    """

    settled: str | None = None

    def __init__(
        self,
        method: Method,
        problem: BilevelProblem,
        oracles: Oracles,
        generator: torch.Generator,
    ) -> None:
        self.method, self.problem, self.oracles = method, problem, oracles
        self.inner_batches = Minibatches(
            problem.inner_data, method.inner_batch_size, generator, "inner_data"
        )
        self.outer_batches = Minibatches(
            problem.outer_data, method.outer_batch_size, generator, "outer_data"
        )
        self.project = flat_projection(problem)

    def solve_inner(self, y: Tensor, x: Tensor) -> Trajectory:
        """The T inner steps of one outer step."""
        method = self.method
        return projected_sgd(
            self.oracles,
            y,
            x,
            self.inner_batches,
            steps=method.inner_steps,
            step_size=method.inner_step_size,
            decay=method.inner_decay,
            project=self.project,
        )

    def stationarity(self, y: Tensor, x: Tensor, batch: Tree) -> float:
        """Of the inner problem, with its projection."""
        return stationarity(self.oracles, y, x, batch, self.method.inner_step_size, self.project)

    @abstractmethod
    def estimate(self, x: Tensor, trajectory: Trajectory) -> Estimate:
        """Hypergradient at the end of a trajectory."""

    def move(self, x: Tensor, velocity: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The next x, before its projection, and velocity: gradient descent with momentum."""
        velocity = self.method.momentum * velocity + gradient
        return x - self.method.step_size * velocity, velocity

    def told(self) -> str:
        """What a user should know of the result, in a sentence; empty for nothing."""
        return ""

    def state(self) -> dict[str, Any]:
        """What the next steps depend on, of all that this holds, but for `generator`.

        Tensors, numbers, text, and lists and dictionaries of these: a run stores it, and `restore`
        gets it back.
        """
        return {
            "inner_batches": self.inner_batches.state(),
            "outer_batches": self.outer_batches.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.inner_batches.restore(state["inner_batches"])
        self.outer_batches.restore(state["outer_batches"])


def flat_projection(problem: BilevelProblem) -> FlatProjection | None:
    """The inner projection on flat vectors."""
    project, space = problem.project_inner, problem.y_space
    if project is None:
        return None
    return lambda y: space.ravel(project(space.unravel(y)), "project_inner(y)")


@dataclass(frozen=True, kw_only=True)
class ImplicitMethod(Method):
    """A method that solves ``A q = d_y g`` and returns ``d_x g - C q``.

    Parameters
    ----------
    solver
        Applies the inverse of the operator.
    cross
        ``"end"``: C at the end of the inner solve, on `cross_batches` fresh batches.
        ``"trajectory"``: the mean of C over the inner steps, each on its own batch.
    cross_batches
        M; the exact Hessian, where a method needs it, is taken on the same M batches.
    """

    solver: LinearSolver
    cross: Literal["end", "trajectory"] = "end"
    cross_batches: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.solver, LinearSolver):
            raise TypeError(
                f"{type(self).__name__}: solver={self.solver!r}; expected a solver, e.g. CG()"
            )
        self._require("cross", self.cross in ("end", "trajectory"), "'end' or 'trajectory'")
        self._require("cross_batches", self.cross_batches >= 1, "at least 1")


class ImplicitEstimator(Estimator):
    """Estimator of an `ImplicitMethod`; a subclass names the operator."""

    method: ImplicitMethod

    @abstractmethod
    def operator(self, trajectory: Trajectory) -> tuple[LinearOperator | None, float]:
        """What stands for the Hessian, and its damping; None for the exact one plus damping."""

    def estimate(self, x: Tensor, trajectory: Trajectory) -> Estimate:
        """Solve the adjoint system and apply the cross derivative."""
        operator, damping = self.operator(trajectory)
        steps = trajectory.steps

        def along_trajectory(q: Tensor) -> Tensor:
            # Each y_s is a point here, not a function of x; otherwise this would be unrolling.
            terms = [self.oracles.cross(step.y, x, step.batch) @ q for step in steps]
            return torch.stack(terms).mean(0)

        inner_batch = self.inner_batches.draw(self.method.cross_batches)
        # On a minibatch the constants say nothing of the exact hypergradient.
        all_data = self.inner_batches.is_full and self.outer_batches.is_full
        return implicit_hypergradient(
            self.oracles,
            trajectory.y,
            x,
            inner_batch=inner_batch,
            outer_batch=self.outer_batches.draw(),
            operator=operator,
            solver=self.method.solver,
            damping=damping,
            cross=along_trajectory if self.method.cross == "trajectory" else None,
            constraint_active=_active(steps),
            stationarity=lambda: self.stationarity(trajectory.y, x, inner_batch),
            smoothness=self.problem.smoothness if all_data else None,
        )


def _active(steps: list[InnerStep]) -> bool:
    return bool(steps) and steps[-1].projected
