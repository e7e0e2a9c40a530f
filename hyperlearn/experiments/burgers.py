"""The viscous Burgers equation and its shock, with neural lengths in time and space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hyperlearn.experiments.pde_experiment import (
    LengthNetwork,
    PDEExperiment,
    PDETask,
    error_metrics,
    grid_fields,
    initial_and_walls,
    lengthscale_fields,
    merged_errors,
    named_parameters,
    network_methods,
    rough_solution,
    with_named_parameters,
)
from hyperlearn.experiments.references import burgers, points
from hyperlearn.gp import (
    PDE,
    Equation,
    KernelProblem,
    Posterior,
    ValidationResidual,
    kernel_problem,
)
from hyperlearn.methods import Method
from operators import RBF, Gibbs, Kernel

AXES = ("t", "x")


@dataclass(frozen=True, kw_only=True)
class BurgersTask(PDETask):
    """``u_t + u u_x = nu u_xx``, ``u(0, x) = -sin(pi x)``, ``u(t, -1) = u(t, 1) = 0``.

    Parameters
    ----------
    nu
        Viscosity.
    kernel
        ``"gibbs"``: a product of lengths in t and x, ``softplus(MLP(t, x)) / 4``, of 2,802
        parameters. ``"fixed"``: RBF, the same two lengths everywhere, ``exp(-(3 dt)^2 - (20
        dx)^2)`` to begin with (arXiv 2103.12959, with 1,000 interior and 200 boundary points).
    network_seed
        Of the network's weights.
    start
        ``"solution"``: that with the untrained kernel, to a digit or two; ``"zero"``: u = 0.
    """

    nu: float = 0.02
    kernel: Literal["gibbs", "fixed"] = "gibbs"
    network_seed: int = 0
    start: Literal["solution", "zero"] = "solution"


class Burgers(PDEExperiment):
    """The Burgers equation of arXiv 2510.05568, its neural kernel."""

    name = "burgers"

    def task(self, seed: int) -> BurgersTask:  # noqa: D102
        return BurgersTask(points_seed=seed, network_seed=seed)

    def methods(self, task: Any, seed: int) -> Mapping[str, Method]:  # noqa: D102
        return network_methods(task, network=task.kernel == "gibbs")

    def kernel(self, task: BurgersTask) -> Kernel:
        """Where it starts."""
        if task.kernel == "fixed":
            lengths = torch.tensor([1 / 3, 1 / 20], dtype=torch.float64) / math.sqrt(2)
            return RBF(lengths)
        return Gibbs(LengthNetwork(2, 4.0, task.network_seed))

    def problem(self, task: BurgersTask) -> KernelProblem:  # noqa: D102
        pde, held = equations(task)
        kernel = self.kernel(task)
        grid = points.grid(task.test_grid, burgers.BOX)
        reference = {"u": burgers.solution(grid, nu=task.nu)}

        def fields(posterior: Posterior) -> dict[str, Any]:
            learnt = posterior.kernels["u"]
            found = grid_fields(posterior, grid, reference, AXES)
            found |= merged_errors(pde, held, posterior, grid, reference, nugget=task.nugget)
            if task.kernel == "gibbs":
                return found | lengthscale_fields(learnt, grid, AXES)
            return found | named_parameters(learnt, AXES)

        start = None
        if task.start == "solution":
            start = rough_solution(pde, kernel, task.nugget)
        problem = kernel_problem(
            pde,
            kernel,
            ValidationResidual([held]),
            nugget=task.nugget,
            start=start,
            metrics=error_metrics(grid, reference),
            fields=fields,
            name=self.name,
        )
        # Of a network they are too many.
        return problem if task.kernel == "gibbs" else with_named_parameters(problem, AXES)


def equations(task: BurgersTask) -> tuple[PDE, Equation]:
    """The PDE, and its equation at validation points."""
    generator = torch.Generator().manual_seed(task.points_seed)
    inside = points.uniform_interior(task.interior, burgers.BOX, generator)
    first, walls = initial_and_walls(task.boundary, burgers.BOX, generator)
    held = points.uniform_interior(task.validation, burgers.BOX, generator)

    def residual(u: Tensor, grad_u: Tensor, hess_u: Tensor, params: dict[str, Tensor]) -> Tensor:
        return grad_u[0] + u * grad_u[1] - params["nu"] * hess_u[1, 1]

    interior = Equation(residual, inside, name="interior")
    initial = Equation(lambda u, data: u - data, first, burgers.initial(first), name="initial")
    wall = Equation(lambda u: u, walls, name="walls")
    nu = torch.tensor(task.nu, dtype=torch.float64)
    return PDE([interior, initial, wall], {"nu": nu}), interior.at(held)
