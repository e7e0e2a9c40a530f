"""The cubic elliptic equation on a grid, with a solution of limited smoothness: a test of scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hyperlearn.experiments.pde_experiment import (
    PDEExperiment,
    error_metrics,
    grid_fields,
    named_parameters,
    untrained,
    with_named_parameters,
)
from hyperlearn.experiments.references import points, sum_of_sines
from hyperlearn.gp import (
    PDE,
    Equation,
    KernelLearning,
    KernelProblem,
    MarginalLikelihood,
    Objective,
    Posterior,
    ValidationResidual,
    kernel_problem,
)
from hyperlearn.methods import Method
from operators import Kernel, Matern


@dataclass(frozen=True, kw_only=True)
class SumOfSinesTask:
    """``-Lap u + u^3 = f`` on the unit square, ``u = 0`` on its boundary.

    Parameters
    ----------
    h
        Spacing of the grid of collocation points, 1 over a whole number: ``(1 + 1 / h)^2`` points,
        2,601 for 0.02 and 10,201 for 0.01.
    lengthscale
        Of the Matern kernel of order 7/2, where it starts.
    nugget
        Relative to the variance of each equation.
    objective
        ``"likelihood"``, which needs no further points, or ``"validation"``: the residual in the
        middles of the cells.
    test_grid
        Points a side of the grid on which errors are measured.
    """

    h: float = 0.04
    lengthscale: float = 0.3
    nugget: float = 1e-10
    objective: Literal["likelihood", "validation"] = "likelihood"
    test_grid: int = 60

    def __post_init__(self) -> None:
        if not 0 < self.h <= 0.5 or abs(1 / self.h - self.cells) > 1e-6:
            raise ValueError(f"h={self.h}; expected 1/2, 1/3, 1/4, ...")
        if not 0 < self.nugget < 1:
            raise ValueError(f"nugget={self.nugget}; expected between 0 and 1")
        if self.test_grid < 2:
            raise ValueError(f"test_grid={self.test_grid}; expected at least 2")

    @property
    def cells(self) -> int:
        """In each coordinate."""
        return round(1 / self.h)


class SumOfSines(PDEExperiment):
    """The elliptic equation of arXiv 2304.01294, its length learnt."""

    name = "sum-of-sines"

    def task(self, seed: int) -> SumOfSinesTask:  # noqa: D102
        return SumOfSinesTask()  # nothing is drawn

    def methods(self, task: Any, seed: int) -> Mapping[str, Method]:  # noqa: D102
        return {
            "learn": KernelLearning(step_size=0.05, learning_steps=10),
            "none": untrained(),
        }

    def kernel(self, task: SumOfSinesTask) -> Kernel:
        """Where it starts."""
        return Matern(task.lengthscale, nu=3.5)

    def problem(self, task: SumOfSinesTask) -> KernelProblem:  # noqa: D102
        pde, held = equations(task)
        grid = points.grid(task.test_grid, points.UNIT_SQUARE)
        reference = {"u": sum_of_sines.solution(grid)}
        objective: Objective = MarginalLikelihood()
        if task.objective == "validation":
            objective = ValidationResidual([held])

        def fields(posterior: Posterior) -> dict[str, Any]:
            return grid_fields(posterior, grid, reference) | named_parameters(
                posterior.kernels["u"]
            )

        problem = kernel_problem(
            pde,
            self.kernel(task),
            objective,
            nugget=task.nugget,
            metrics=error_metrics(grid, reference),
            fields=fields,
            name=self.name,
        )
        return with_named_parameters(problem)


def equations(task: SumOfSinesTask) -> tuple[PDE, Equation]:
    """The PDE on the grid, and its equation in the middles of the cells."""
    inside = points.grid(task.cells - 1, points.UNIT_SQUARE, interior_only=True)
    everywhere = points.grid(task.cells + 1, points.UNIT_SQUARE)
    edge = everywhere[((everywhere == 0) | (everywhere == 1)).any(dim=1)]
    middle = (torch.arange(task.cells, dtype=torch.float64) + 0.5) / task.cells
    held = torch.cartesian_prod(middle, middle)

    def residual(u: Tensor, lap_u: Tensor, data: Tensor) -> Tensor:
        return -lap_u + u**3 - data

    interior = Equation(residual, inside, sum_of_sines.source(inside), name="interior")
    boundary = Equation(lambda u: u, edge, name="boundary")
    return PDE([interior, boundary]), interior.at(held, sum_of_sines.source(held))
