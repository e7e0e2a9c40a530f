"""The nonlinear elliptic problem: one length-scale (case A), or an additive kernel (case B)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hyperlearn.experiments.pde_experiment import (
    PDEExperiment,
    PDETask,
    errors,
    grid_fields,
    merged_errors,
    named_parameters,
    with_named_parameters,
)
from hyperlearn.experiments.references import elliptic, points
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
from operators import RBF, Kernel, Polynomial


@dataclass(frozen=True, kw_only=True)
class EllipticTask(PDETask):
    """``-Lap u + u^3 = f`` on the unit square, ``u = 0`` on its boundary.

    Parameters
    ----------
    lengthscale
        Where it starts.
    merged_nugget
        Of the evaluation that takes collocation and validation points together.
    """

    lengthscale: float = 1.0
    merged_nugget: float = 1e-12


def equations(task: PDETask) -> tuple[Equation, Equation, Equation]:
    """Of the interior, of the boundary, and of the interior at validation points."""
    generator = torch.Generator().manual_seed(task.points_seed)
    inside = points.uniform_interior(task.interior, points.UNIT_SQUARE, generator)
    edge = points.uniform_boundary(task.boundary, points.UNIT_SQUARE, generator)
    held = points.uniform_interior(task.validation, points.UNIT_SQUARE, generator)

    def residual(u: torch.Tensor, lap_u: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        return -lap_u + u**3 - data

    interior = Equation(residual, inside, elliptic.source(inside), name="interior")
    boundary = Equation(lambda u: u, edge, name="boundary")
    return interior, boundary, interior.at(held, elliptic.source(held))


def _learning(task: PDETask) -> KernelLearning:
    """Batches as published; averages and smaller steps against their noise."""
    return KernelLearning(
        step_size=0.05, learning_steps=25, outer_batch_size=min(200, task.validation),
        decay=0.01, averaging=0.3,
    )  # fmt: skip


class EllipticA(PDEExperiment):
    """Case A of arXiv 2510.05568: ``exp(-r^2 / (2 l^2))``."""

    name = "elliptic-a"

    def task(self, seed: int) -> EllipticTask:  # noqa: D102
        return EllipticTask(points_seed=seed)

    def methods(self, task: Any, seed: int) -> Mapping[str, Method]:  # noqa: D102
        return {
            "learn": _learning(task),
            "implicit": KernelLearning(step_size=0.05, hypergradient="implicit", newton_steps=8),
            "none": KernelLearning(step_size=0.0, learning_steps=1),
        }

    def kernel(self, task: EllipticTask) -> Kernel:
        """Where it starts."""
        return RBF(task.lengthscale)

    def problem(self, task: EllipticTask) -> KernelProblem:  # noqa: D102
        interior, boundary, held = equations(task)
        pde = PDE([interior, boundary])
        grid = points.grid(task.test_grid, points.UNIT_SQUARE)
        reference = elliptic.solution(grid)

        def fields(posterior: Posterior) -> dict[str, Any]:
            found = grid_fields(posterior, grid, {"u": reference})
            found |= merged_errors(
                pde, held, posterior, grid, {"u": reference}, nugget=task.merged_nugget
            )
            return found | named_parameters(posterior.kernels["u"])

        problem = kernel_problem(
            pde,
            self.kernel(task),
            ValidationResidual([held]),
            nugget=task.nugget,
            metrics={
                "l2_error": lambda p: errors(p.value(grid), reference)[0],
                "linf_error": lambda p: errors(p.value(grid), reference)[1],
            },
            fields=fields,
            name=self.name,
        )
        return with_named_parameters(problem)


class EllipticB(EllipticA):
    """Case B: ``sigma^2 exp(-r^2 / (2 l^2)) + (alpha x.y + c)^2``.

    The nugget is relative to each row's variance. Published is 1e-10 relative to the mean variance
    of values times a ratio of traces, for a kernel whose variance is learnt: with the published
    result (values of variance 240 on average) that comes to 4e-13 of a row's.
    """

    name = "elliptic-b"

    def task(self, seed: int) -> EllipticTask:  # noqa: D102
        return EllipticTask(points_seed=seed, nugget=1e-12)

    def methods(self, task: Any, seed: int) -> Mapping[str, Method]:  # noqa: D102
        return {
            "learn": _learning(task),
            "none": KernelLearning(step_size=0.0, learning_steps=1),
        }

    def kernel(self, task: EllipticTask) -> Kernel:  # noqa: D102
        return 1.0 * RBF(task.lengthscale) + Polynomial(2)
