"""The regularised eikonal equation, with neural kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hyperlearn.experiments.pde_experiment import (
    LengthNetwork,
    PDEExperiment,
    PDETask,
    WarpNetwork,
    error_metrics,
    grid_fields,
    lengthscale_fields,
    merged_errors,
    named_parameters,
    network_methods,
    rough_solution,
    with_named_parameters,
)
from hyperlearn.experiments.references import eikonal, points
from hyperlearn.gp import (
    PDE,
    Equation,
    KernelProblem,
    MarginalLikelihood,
    Posterior,
    ValidationResidual,
    kernel_problem,
)
from hyperlearn.methods import Method
from operators import RBF, Gibbs, Kernel, Matern, WarpedKernel

# Kernels whose parameters are too many to be recorded by name.
NETWORKS = ("deep", "gibbs")


@dataclass(frozen=True, kw_only=True)
class EikonalTask(PDETask):
    """``|grad u|^2 = 1 + eps Lap u`` on the unit square, ``u = 0`` on its boundary.

    Parameters
    ----------
    eps
        Viscosity; 0.01 is the hard case, 0.1 an easy one.
    kernel
        ``"deep"``: Matern 5/2, as rough as the ridges of the solution for small eps, of a warp ``x
        + MLP(x)`` of 2,802 parameters. ``"matern"``: the same without a warp. ``"gibbs"``: Gaussian
        with a length ``softplus(MLP(x)) / 3``, of 2,751 parameters, as published. ``"fixed"``: RBF,
        one length everywhere.
    objective
        ``"likelihood"``: marginal likelihood. ``"validation"``: residuals at validation points, as
        published. For small eps few of these lie on the ridges, and a kernel that smooths the
        ridges away has small residuals at all others.
    network_seed
        Of the network's weights.
    lengthscale
        Of the RBF and the Matern kernel, or where it starts.
    start
        ``"solution"``: that with the untrained kernel, to a digit or two; ``"zero"``: u = 0.
    merged_grid
        Points a side of the grid for collocation and validation points together.
    """

    nugget: float = 1e-7
    eps: float = 0.01
    kernel: Literal["deep", "matern", "gibbs", "fixed"] = "deep"
    objective: Literal["likelihood", "validation"] = "likelihood"
    network_seed: int = 0
    lengthscale: float = 0.3
    start: Literal["solution", "zero"] = "solution"
    merged_grid: int = 100


class Eikonal(PDEExperiment):
    """The eikonal equation of arXiv 2510.05568."""

    name = "eikonal"

    def task(self, seed: int) -> EikonalTask:  # noqa: D102
        return EikonalTask(points_seed=seed, network_seed=seed)

    def methods(self, task: Any, seed: int) -> Mapping[str, Method]:  # noqa: D102
        return network_methods(task, network=task.kernel in NETWORKS)

    def kernel(self, task: EikonalTask) -> Kernel:
        """Where it starts."""
        if task.kernel == "fixed":
            return RBF(task.lengthscale)
        if task.kernel == "gibbs":
            return Gibbs(LengthNetwork(1, 3.0, task.network_seed))
        matern = Matern(task.lengthscale, nu=2.5)
        if task.kernel == "matern":
            return matern
        return WarpedKernel(matern, WarpNetwork(task.network_seed))

    def problem(self, task: EikonalTask) -> KernelProblem:  # noqa: D102
        pde, held = equations(task)
        kernel = self.kernel(task)
        grid = points.grid(task.test_grid, points.UNIT_SQUARE)
        reference = {"u": eikonal.solution(grid, eps=task.eps)}

        def fields(posterior: Posterior) -> dict[str, Any]:
            learnt = posterior.kernels["u"]
            fine = points.grid(task.merged_grid, points.UNIT_SQUARE)
            found = grid_fields(posterior, grid, reference)
            found |= merged_errors(
                pde, held, posterior, fine, {"u": eikonal.solution(fine, eps=task.eps)},
                nugget=task.nugget,
            )  # fmt: skip
            if task.kernel in NETWORKS:
                return found | lengthscale_fields(learnt, grid)
            return found | named_parameters(learnt)

        start = None
        if task.start == "solution":
            start = rough_solution(pde, kernel, task.nugget)
        problem = kernel_problem(
            pde,
            kernel,
            MarginalLikelihood() if task.objective == "likelihood" else ValidationResidual([held]),
            nugget=task.nugget,
            start=start,
            metrics=error_metrics(grid, reference),
            fields=fields,
            name=self.name,
        )
        return problem if task.kernel in NETWORKS else with_named_parameters(problem)


def equations(task: EikonalTask) -> tuple[PDE, Equation]:
    """The PDE, and its equation at validation points."""
    generator = torch.Generator().manual_seed(task.points_seed)
    inside = points.uniform_interior(task.interior, points.UNIT_SQUARE, generator)
    edge = points.uniform_boundary(task.boundary, points.UNIT_SQUARE, generator)
    held = points.uniform_interior(task.validation, points.UNIT_SQUARE, generator)

    def residual(grad_u: Tensor, lap_u: Tensor, params: dict[str, Tensor]) -> Tensor:
        return grad_u.square().sum() - 1 - params["eps"] * lap_u

    interior = Equation(residual, inside, name="interior")
    boundary = Equation(lambda u: u, edge, name="boundary")
    eps = torch.tensor(task.eps, dtype=torch.float64)
    return PDE([interior, boundary], {"eps": eps}), interior.at(held)
