"""`PDEExperiment`: a PDE with its points, kernel, reference and methods, as ``hyperlearn run`` runs it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperlearn.experiments.experiment import Experiment
from hyperlearn.gp import KernelProblem, Posterior
from hyperlearn.methods import Method
from hyperlearn.outer import minimize
from hyperlearn.runs import Field, Run
from hyperlearn.settings import override


@dataclass(frozen=True, kw_only=True)
class PDETask:
    """What the experiments with PDEs have in common.

    Parameters
    ----------
    points_seed
        Of collocation and validation points.
    interior, boundary
        Collocation points in the interior, and on the boundary (with those of the initial time).
    validation
        Points at which the validation residual is taken.
    nugget
        Relative to the variance of each equation.
    test_grid
        Points a side of the grid on which errors are measured.
    """

    points_seed: int = 0
    interior: int = 900
    boundary: int = 300
    validation: int = 900
    nugget: float = 1e-10
    test_grid: int = 60

    def __post_init__(self) -> None:
        for name in ("interior", "boundary", "validation", "test_grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if not 0 < self.nugget < 1:
            raise ValueError(f"nugget={self.nugget}; expected between 0 and 1")


class PDEExperiment(Experiment):
    """A task whose problem is a `KernelProblem` and whose methods are those of a table."""

    name: str

    @abstractmethod
    def task(self, seed: int) -> PDETask:
        """The settings at their defaults; the seed is that of the points too."""

    @abstractmethod
    def problem(self, task: Any) -> KernelProblem:
        """The problem of a task."""

    def settings(self, task: Any, method: Method) -> dict[str, Any]:  # noqa: D102
        return {"task": task, "method": method}

    def run(  # noqa: D102
        self, task: Any, label: str, changes: Sequence[str], *, seed: int, **options: Any
    ) -> Run:
        (method,) = override([self.methods(task, seed)[label]], changes)
        return self.run_method(task, label, method, seed=seed, **options)

    def run_method(
        self, task: Any, label: str, method: Method, *, seed: int, **options: Any
    ) -> Run:
        """`hyperlearn.minimize` with a method."""
        problem = self.problem(task)
        return minimize(
            problem, method, seed=seed, config={"label": label, "task": task},
            attachments=collocation(problem), **options,
        )  # fmt: skip


def collocation(problem: KernelProblem) -> dict[str, Any]:
    """Points of each equation, by its name."""
    return {
        f"points/{equation.name or k}": equation.points
        for k, equation in enumerate(problem.pde.equations)
    }


def errors(found: Tensor, reference: Tensor) -> tuple[float, float]:
    """Root mean square and largest error."""
    difference = found - reference
    return float(difference.square().mean().sqrt()), float(difference.abs().max())


def grid_fields(
    posterior: Posterior,
    grid: Tensor,
    reference: Mapping[str, Tensor],
    axes: tuple[str, str] = ("x", "y"),
) -> dict[str, Any]:
    """Solution, reference and error of each field on a square grid, and the error norms.

    Parameters
    ----------
    posterior
        Of the solution.
    grid
        ``(n n, 2)``, the last coordinate running fastest.
    reference
        Values there, by field.
    axes
        Names of the coordinates.
    """
    n = round(len(grid) ** 0.5)
    coordinates = {axes[0]: grid[::n, 0], axes[1]: grid[:n, 1]}
    fields: dict[str, Any] = {}
    worst = (0.0, 0.0)
    for name, exact in reference.items():
        found = posterior.value(grid, name)
        pair = errors(found, exact)
        worst = (max(worst[0], pair[0]), max(worst[1], pair[1]))
        for key, values in (
            (name, found), (f"{name}_reference", exact), (f"{name}_error", found - exact),
        ):  # fmt: skip
            fields[key] = Field(values.reshape(n, n), coordinates)
        if len(reference) > 1:
            fields[f"{name}_l2_error"], fields[f"{name}_linf_error"] = pair
    return fields | {"l2_error": worst[0], "linf_error": worst[1]}


def lengthscale_fields(
    kernel: Any, grid: Tensor, axes: tuple[str, str] = ("x", "y")
) -> dict[str, Any]:
    """The length-scale of a Gibbs kernel on a square grid: one field, or one a coordinate."""
    n = round(len(grid) ** 0.5)
    coordinates = {axes[0]: grid[::n, 0], axes[1]: grid[:n, 1]}
    with torch.no_grad():
        lengths = kernel.lengthscale(grid).reshape(n, n, -1)
    if lengths.shape[-1] == 1:
        return {"lengthscale": Field(lengths[..., 0], coordinates)}
    return {
        f"lengthscale_{axis}": Field(lengths[..., k], coordinates) for k, axis in enumerate(axes)
    }
