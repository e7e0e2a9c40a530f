"""The Gray-Scott equations: two species that react and diffuse, with zero flux at the walls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperlearn.experiments.pde_experiment import (
    PDEExperiment,
    PDETask,
    error_metrics,
    grid_fields,
    initial_and_walls,
    untrained,
    with_numbers,
)
from hyperlearn.experiments.references import gray_scott, points
from hyperlearn.gp import (
    PDE,
    Equation,
    KernelLearning,
    KernelProblem,
    Posterior,
    ValidationResidual,
    kernel_problem,
)
from hyperlearn.methods import Method
from operators import RBF, Kernel

AXES = ("t", "x")


@dataclass(frozen=True, kw_only=True)
class GrayScottTask(PDETask):
    """``u_t = d_u u_xx - u v^2 + F (1 - u)``, ``v_t = d_v v_xx + u v^2 - (F + k) v``.

    With ``u_x = v_x = 0`` at x = 0 and 1.

    Parameters
    ----------
    sigma
        Where all four scales of the kernels ``exp(-(dt / sigma_t)^2 - (dx / sigma_x)^2)`` start.
    diffusion_u, diffusion_v, feed, kill
        ``d_u, d_v, F, k``.
    """

    interior: int = 600
    boundary: int = 400
    validation: int = 600
    sigma: float = 1.0
    diffusion_u: float = 1e-3
    diffusion_v: float = 2e-3
    feed: float = 0.04
    kill: float = 0.06


class GrayScott(PDEExperiment):
    """The Gray-Scott equations of arXiv 2510.05568, four scales."""

    name = "gray-scott"

    def task(self, seed: int) -> GrayScottTask:  # noqa: D102
        return GrayScottTask(points_seed=seed)

    def methods(self, task: Any, seed: int) -> Mapping[str, Method]:  # noqa: D102
        return {
            "learn": KernelLearning(
                step_size=0.05,
                learning_steps=25,
                outer_batch_size=min(200, task.validation),
                decay=5e-3,
                averaging=0.5,
            ),
            "none": untrained(),
        }

    def kernel(self, task: GrayScottTask) -> dict[str, Kernel]:
        """Where they start."""
        lengths = torch.full((2,), task.sigma / math.sqrt(2), dtype=torch.float64)
        return {name: RBF(lengths) for name in ("u", "v")}

    def problem(self, task: GrayScottTask) -> KernelProblem:  # noqa: D102
        pde, held = equations(task)
        grid = points.grid(task.test_grid, gray_scott.BOX)
        exact = gray_scott.solution(
            grid,
            diffusion=(task.diffusion_u, task.diffusion_v),
            feed=task.feed,
            kill=task.kill,
        )
        reference = {"u": exact[:, 0], "v": exact[:, 1]}

        def fields(posterior: Posterior) -> dict[str, Any]:
            return grid_fields(posterior, grid, reference, AXES) | scales(posterior.kernels)

        problem = kernel_problem(
            pde,
            self.kernel(task),
            ValidationResidual([held]),
            nugget=task.nugget,
            metrics=error_metrics(grid, reference),
            fields=fields,
            name=self.name,
        )
        return with_numbers(problem, scales)


def equations(task: GrayScottTask) -> tuple[PDE, Equation]:
    """The PDE, and its equation at validation points."""
    generator = torch.Generator().manual_seed(task.points_seed)
    inside = points.uniform_interior(task.interior, gray_scott.BOX, generator)
    first, walls = initial_and_walls(task.boundary, gray_scott.BOX, generator)
    held = points.uniform_interior(task.validation, gray_scott.BOX, generator)

    def residual(
        u: Tensor, v: Tensor, grad_u: Tensor, grad_v: Tensor, hess_u: Tensor, hess_v: Tensor
    ) -> Tensor:
        reaction = u * v**2
        gain_u = task.diffusion_u * hess_u[1, 1] - reaction + task.feed * (1 - u)
        gain_v = task.diffusion_v * hess_v[1, 1] + reaction - (task.feed + task.kill) * v
        return torch.stack([grad_u[0] - gain_u, grad_v[0] - gain_v])

    def initial(u: Tensor, v: Tensor, data: Tensor) -> Tensor:
        return torch.stack([u, v]) - data

    def flux(grad_u: Tensor, grad_v: Tensor) -> Tensor:
        return torch.stack([grad_u[1], grad_v[1]])

    interior = Equation(residual, inside, name="interior")
    start = Equation(initial, first, gray_scott.initial(first[:, 1]), name="initial")
    return PDE([interior, start, Equation(flux, walls, name="walls")]), interior.at(held)


def scales(kernels: Mapping[str, Kernel]) -> dict[str, float]:
    """``sigma_t`` and ``sigma_x`` of both kernels."""
    return {
        f"sigma_{name}_{axis}": math.sqrt(2) * float(length)
        for name, kernel in kernels.items()
        for axis, length in zip(AXES, kernel.parameters["log_lengthscale"].exp(), strict=True)
    }
