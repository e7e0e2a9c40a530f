"""The Monge-Ampere equation: fully nonlinear, and elliptic where the solution is convex."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hyperlearn.experiments.pde_experiment import (
    PDEExperiment,
    PDETask,
    error_metrics,
    grid_fields,
    named_parameters,
    untrained,
    with_named_parameters,
)
from hyperlearn.experiments.references import monge_ampere, points
from hyperlearn.gp import (
    PDE,
    Equation,
    KernelLearning,
    KernelProblem,
    PDESolution,
    Posterior,
    ValidationResidual,
    kernel_problem,
    solve_pde,
)
from hyperlearn.methods import Method
from operators import RBF, Kernel, Matern


@dataclass(frozen=True, kw_only=True)
class MongeAmpereTask(PDETask):
    """``det D^2 u = f`` on the unit square, u given on its boundary.

    Parameters
    ----------
    kernel
        ``"matern"``: of order 7/2; ``"rbf"``.
    lengthscale
        Where it starts.
    """

    kernel: Literal["matern", "rbf"] = "matern"
    lengthscale: float = 0.3


class MongeAmpere(PDEExperiment):
    """The Monge-Ampere equation of arXiv 2304.01294, its length learnt."""

    name = "monge-ampere"

    def task(self, seed: int) -> MongeAmpereTask:  # noqa: D102
        return MongeAmpereTask(points_seed=seed)

    def methods(self, task: Any, seed: int) -> Mapping[str, Method]:  # noqa: D102
        return {
            "learn": KernelLearning(
                step_size=0.05, learning_steps=25, outer_batch_size=min(200, task.validation)
            ),
            "none": untrained(),
        }

    def kernel(self, task: MongeAmpereTask) -> Kernel:
        """Where it starts."""
        length = task.lengthscale
        return RBF(length) if task.kernel == "rbf" else Matern(length, nu=3.5)

    def problem(self, task: MongeAmpereTask) -> KernelProblem:  # noqa: D102
        pde, held = equations(task)
        kernel = self.kernel(task)
        grid = points.grid(task.test_grid, points.UNIT_SQUARE)
        reference = {"u": monge_ampere.solution(grid)}

        def fields(posterior: Posterior) -> dict[str, Any]:
            return grid_fields(posterior, grid, reference) | named_parameters(
                posterior.kernels["u"]
            )

        problem = kernel_problem(
            pde,
            kernel,
            ValidationResidual([held]),
            nugget=task.nugget,
            start=convex_start(pde, kernel, task.nugget),
            metrics=error_metrics(grid, reference),
            fields=fields,
            name=self.name,
        )
        return with_named_parameters(problem)


def equations(task: MongeAmpereTask) -> tuple[PDE, Equation]:
    """The PDE, and its equation at validation points."""
    generator = torch.Generator().manual_seed(task.points_seed)
    inside = points.uniform_interior(task.interior, points.UNIT_SQUARE, generator)
    edge = points.uniform_boundary(task.boundary, points.UNIT_SQUARE, generator)
    held = points.uniform_interior(task.validation, points.UNIT_SQUARE, generator)

    def residual(hess_u: Tensor, data: Tensor) -> Tensor:
        return hess_u[0, 0] * hess_u[1, 1] - hess_u[0, 1] * hess_u[1, 0] - data

    interior = Equation(residual, inside, monge_ampere.source(inside), name="interior")
    boundary = Equation(
        lambda u, data: u - data, edge, monge_ampere.solution(edge), name="boundary"
    )
    return PDE([interior, boundary]), interior.at(held, monge_ampere.source(held))


def convex_start(pde: PDE, kernel: Kernel, nugget: float) -> PDESolution:
    """The solution of ``Lap u = 2 sqrt(f)`` with the same boundary values.

    Equal eigenvalues of D^2 u would make it the solution itself. Newton's iteration needs a convex
    function to start with: at u = 0 the linearised determinant is zero.
    """
    interior, boundary = pde.equations
    assert interior.data is not None
    poisson = Equation(
        lambda lap_u, data: lap_u - data, interior.points, 2 * interior.data.sqrt(), name="Poisson"
    )
    return solve_pde(PDE([poisson, boundary]), kernel, nugget=nugget)
