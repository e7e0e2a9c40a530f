"""Darcy flow: the permeability from noisy observations of the pressure, an inverse problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hyperlearn.experiments.pde_experiment import (
    PDEExperiment,
    PDETask,
    errors,
    grid_fields,
    untrained,
    with_numbers,
)
from hyperlearn.experiments.references import darcy, points
from hyperlearn.gp import (
    PDE,
    Equation,
    KernelLearning,
    KernelProblem,
    LeaveOneOut,
    Objective,
    Posterior,
    ValidationResidual,
    WeightedSum,
    kernel_problem,
)
from hyperlearn.methods import Method
from hyperlearn.runs import Field
from operators import RBF, Functionals, Kernel


@dataclass(frozen=True, kw_only=True)
class DarcyTask(PDETask):
    """``-div(a grad u) = 1`` on the unit square, ``u = 0`` on its boundary; u and a are unknown.

    Parameters
    ----------
    observations
        Of u, at the first of the interior points.
    noise
        Their standard deviation; u is at most 0.024.
    noise_seed
        Of the draw.
    objective
        ``"leave-one-out"``: each observation predicted from all others and from the PDE, and
        residuals at validation points. ``"misfit"``: these residuals and the misfit of the
        observations, as published. It is of those that u was fitted to, and falls for ever shorter
        lengths, below what the noise lets one see.
    tolerance
        Unit of the residuals, whose terms are of about .3.
    lengthscale_u, lengthscale_w
        Where those of u and of ``w = log a`` start.
    """

    interior: int = 400
    boundary: int = 100
    validation: int = 400
    nugget: float = 1e-5
    observations: int = 60
    noise: float = 1e-3
    noise_seed: int = 0
    objective: Literal["leave-one-out", "misfit"] = "leave-one-out"
    tolerance: float = 0.03
    lengthscale_u: float = 1.0
    lengthscale_w: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.observations <= self.interior:
            raise ValueError(f"observations={self.observations}; expected 1 to {self.interior}")
        if not self.noise > 0:
            raise ValueError(f"noise={self.noise}; expected a positive standard deviation")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance={self.tolerance}; expected a positive number")


class Darcy(PDEExperiment):
    """The inverse problem of arXiv 2510.05568, a length for each field."""

    name = "darcy"

    def task(self, seed: int) -> DarcyTask:  # noqa: D102
        return DarcyTask(points_seed=seed, noise_seed=seed)

    def methods(self, task: Any, seed: int) -> Mapping[str, Method]:  # noqa: D102
        return {
            "learn": KernelLearning(
                step_size=0.02,
                learning_steps=25,
                outer_batch_size=min(100, task.validation),
                decay=2e-3,
                averaging=0.5,
            ),
            "none": untrained(),
        }

    def kernel(self, task: DarcyTask) -> dict[str, Kernel]:
        """Where they start."""
        return {"u": RBF(task.lengthscale_u), "w": RBF(task.lengthscale_w)}

    def problem(self, task: DarcyTask) -> KernelProblem:  # noqa: D102
        pde, held = equations(task)
        observed = pde.equations[-1]
        grid = points.grid(task.test_grid, points.UNIT_SQUARE)
        reference = {"u": darcy.solution(grid), "w": darcy.log_permeability(grid)}

        def fields(posterior: Posterior) -> dict[str, Any]:
            found = grid_fields(posterior, grid, reference)
            variance = posterior.variance({"w": Functionals.value_at(grid)})
            return (
                found
                | {
                    "l2_error": found["u_l2_error"],
                    "linf_error": found["u_linf_error"],
                    "log_a_rmse": found["w_l2_error"],
                    "a_relative_l2_error": relative_error(
                        posterior.value(grid, "w"), reference["w"]
                    ),
                    # Rounding may make a variance of almost nothing negative.
                    "w_standard_deviation": Field(
                        variance.clamp_min(0).sqrt().reshape(task.test_grid, task.test_grid),
                        found["w"].coordinates,
                    ),
                }
                | lengths(posterior.kernels)
            )

        residual = (task.tolerance**-2, ValidationResidual([held]))
        # Observations count in units of their noise.
        fit: Objective = LeaveOneOut([pde.equations.index(observed)])
        if task.objective == "misfit":
            residual, fit = (1.0, residual[1]), ValidationResidual([observed])
        problem = kernel_problem(
            pde,
            self.kernel(task),
            WeightedSum([residual, (1.0, fit)]),
            nugget=task.nugget,
            metrics={
                "l2_error": lambda p: errors(p.value(grid, "u"), reference["u"])[0],
                "linf_error": lambda p: errors(p.value(grid, "u"), reference["u"])[1],
                "log_a_rmse": lambda p: errors(p.value(grid, "w"), reference["w"])[0],
            },
            fields=fields,
            name=self.name,
        )
        return with_numbers(problem, lengths)


def equations(task: DarcyTask) -> tuple[PDE, Equation]:
    """The PDE with its observations, and its equation at validation points."""
    generator = torch.Generator().manual_seed(task.points_seed)
    inside = points.uniform_interior(task.interior, points.UNIT_SQUARE, generator)
    edge = points.uniform_boundary(task.boundary, points.UNIT_SQUARE, generator)
    held = points.uniform_interior(task.validation, points.UNIT_SQUARE, generator)
    where = inside[: task.observations]
    draw = torch.Generator().manual_seed(task.noise_seed)
    noise = task.noise * torch.randn(len(where), generator=draw, dtype=where.dtype)

    def residual(lap_u: Tensor, grad_u: Tensor, w: Tensor, grad_w: Tensor) -> Tensor:
        # -div(a grad u) = 1, divided by -a.
        return lap_u + (grad_w * grad_u).sum() + torch.exp(-w)

    interior = Equation(residual, inside, name="interior")
    boundary = Equation(lambda u: u, edge, name="boundary")
    observed = Equation(
        lambda u, data: u - data,
        where,
        darcy.solution(where) + noise,
        noise=task.noise,
        name="observations",
    )
    return PDE([interior, boundary, observed]), interior.at(held)


def lengths(kernels: Mapping[str, Kernel]) -> dict[str, float]:
    """Of the kernels of u and w."""
    return {
        f"lengthscale_{name}": float(kernel.parameters["log_lengthscale"].exp())
        for name, kernel in kernels.items()
    }


def relative_error(w: Tensor, reference: Tensor) -> float:
    """``|a - a*| / |a*|`` of ``a = exp(w)``."""
    a = reference.exp()
    return float((w.exp() - a).norm() / a.norm())
