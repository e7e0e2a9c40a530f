"""The inner solve: projected stochastic gradient descent, and the trajectory it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hyperlearn.batches import Minibatches
from hyperlearn.oracles import Oracles

Tree = Any
FlatProjection = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class InnerStep:
    """One step ``y_{t+1} = Proj(y_t - step_size (score + d_y R))``.

    Parameters
    ----------
    y
        ``y_t``, flat.
    batch
        What the gradient was taken on.
    step_size
        Of this step.
    score
        Gradient of the inner loss alone, without the regulariser.
    gradient
        Gradient of the whole inner objective; where the projection was active, the step that was
        really taken, ``(y_t - y_{t+1}) / step_size``.
    projected
        Whether the projection changed the step.
    """

    y: Tensor
    batch: Tree
    step_size: float
    score: Tensor
    gradient: Tensor
    projected: bool


@dataclass
class Trajectory:
    """The steps of one inner solve and the point ``y`` that they lead to."""

    y: Tensor
    steps: list[InnerStep] = field(default_factory=list)


def stationarity(
    oracles: Oracles,
    y: Tensor,
    x: Tensor,
    batch: Tree,
    step_size: float,
    project: FlatProjection | None,
) -> float:
    """``|d_y G|``, or with a projection ``|y - Proj(y - s d_y G)| / s``: zero at a solution."""
    gradient = oracles.inner_gradient(y, x, batch)
    if project is not None:
        free = y - step_size * gradient
        following = project(free)
        if bool((following != free).any()):  # otherwise the gradient itself, without rounding
            gradient = (y - following) / step_size
    return float(gradient.norm())


def projected_sgd(
    oracles: Oracles,
    y: Tensor,
    x: Tensor,
    batches: Minibatches,
    *,
    steps: int,
    step_size: float,
    decay: float = 0.0,
    project: FlatProjection | None = None,
) -> Trajectory:
    """Run `steps` steps of size ``step_size / (1 + decay t)`` from y with x held fixed.

    One gradient a step. Source: arXiv:2602.10905, eq. (3.1).
    """
    trajectory = Trajectory(y)
    for t in range(steps):
        batch = batches.draw()
        rate = step_size / (1.0 + decay * t)
        score = oracles.score(y, x, batch)
        gradient = score + oracles.regularizer.gradient(y)
        following = y - rate * gradient
        projected = False
        if project is not None:
            free, following = following, project(following)
            projected = bool((free != following).any())
            if projected:
                gradient = (y - following) / rate
        trajectory.steps.append(InnerStep(y, batch, rate, score, gradient, projected))
        y = following
    trajectory.y = y
    return trajectory
