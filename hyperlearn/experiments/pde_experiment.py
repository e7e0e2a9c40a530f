"""`PDEExperiment`: a PDE with points, kernel, reference and methods, for ``hyperlearn run``."""

from __future__ import annotations

import itertools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperlearn.budget import Budget
from hyperlearn.experiments.experiment import BuiltIn
from hyperlearn.experiments.references import points
from hyperlearn.gp import (
    PDE,
    Equation,
    GaussNewton,
    KernelLearning,
    KernelProblem,
    PDESolution,
    Posterior,
    solve_pde,
)
from hyperlearn.methods import Method
from hyperlearn.outer import minimize
from hyperlearn.runs import Field, Run
from hyperlearn.settings import override
from operators import Kernel, WarpedKernel
from operators.kernels.jets import jets
from solvers import ConvergenceWarning, NotPositiveDefiniteError


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


class PDEExperiment(BuiltIn):
    """A task whose problem is a `KernelProblem` and whose methods are those of a table."""

    name: str
    default_method = "learn"
    default_budget = Budget(steps=250)

    @abstractmethod
    def task(self, seed: int) -> Any:
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


# --- points and kernels -------------------------------------------------------------------------


def initial_and_walls(n: int, box: points.Box, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A third of n points at the initial time, the others on both walls alike; ``(t, x)``."""
    first = n // 3
    upper = (n - first) // 2
    start = points.uniform_face(first, box, generator, axis=0, upper=False)
    walls = [
        points.uniform_face(count, box, generator, axis=1, upper=side)
        for side, count in ((False, n - first - upper), (True, upper))
    ]
    return start, torch.cat(walls)


def perceptron(outputs: int, seed: int) -> nn.Sequential:
    """Layers ``2-50-50-outputs`` with tanh between, in float64; Glorot weights, no biases."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise([2, 50, 50, outputs]):
        linear = nn.utils.skip_init(nn.Linear, n, m, dtype=torch.float64)
        nn.init.xavier_normal_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class LengthNetwork(nn.Module):
    """``softplus(MLP(x)) / divisor``: lengths of `Gibbs`, about ``log 2 / divisor`` at first.

    Parameters
    ----------
    outputs
        1 for one length, 2 for one a coordinate.
    divisor
        Lengths are small against the domain.
    seed
        Of the weights.
    """

    def __init__(self, outputs: int, divisor: float, seed: int) -> None:
        super().__init__()
        self.layers = perceptron(outputs, seed)
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        """``(n, 2)`` to ``(n, outputs)``."""
        return F.softplus(self.layers(x)) / self.divisor


class WarpNetwork(nn.Module):
    """``x + MLP(x)``, near the identity at first: the warp of a deep kernel.

    Parameters
    ----------
    seed
        Of the weights; those of the last layer are a tenth of `perceptron`'s.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layers = perceptron(2, seed)
        with torch.no_grad():
            self.layers[-1].weight.mul_(0.1)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """``(n, 2)`` to ``(n, 2)``."""
        return x + self.layers(x)


def rough_solution(pde: PDE, kernel: Kernel | Mapping[str, Kernel], nugget: float) -> PDESolution:
    """The solution with a kernel that is to be learnt, to a digit or two.

    What residuals an untrained kernel leaves make the iteration slow: the rest is not worth it. Nor
    is the way by larger viscosities, which takes more iterations than the line search does from
    zero.
    """
    return solve_pde(pde, kernel, nugget=nugget, method=GaussNewton(rtol=0.05))


def network_methods(task: PDETask, *, network: bool) -> dict[str, Method]:
    """Of tasks whose length-scale is a network (moved less than a log)."""
    return {
        "learn": KernelLearning(
            step_size=5e-3 if network else 0.05,
            learning_steps=20,
            outer_batch_size=min(200, task.validation),
            decay=2e-3,
            averaging=0.5,
        ),
        "none": untrained(),
    }


def untrained() -> KernelLearning:
    """The method that leaves the kernel as it is, and converges the state."""
    return KernelLearning(step_size=0.0, learning_steps=1)


# --- results ------------------------------------------------------------------------------------


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


def error_metrics(
    grid: Tensor, reference: Mapping[str, Tensor]
) -> dict[str, Callable[[Posterior], float]]:
    """`errors` on a grid, of the worst field, as metrics of a problem."""

    def worst(which: int) -> Callable[[Posterior], float]:
        return lambda p: max(
            errors(p.value(grid, name), exact)[which] for name, exact in reference.items()
        )

    return {"l2_error": worst(0), "linf_error": worst(1)}


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
    """The local length-scale on a square grid: one field, or one a coordinate.

    Of a Gibbs kernel that which it has; of a warped one ``l / |det D phi|^(1/2)``, the geometric
    mean over directions.
    """
    n = round(len(grid) ** 0.5)
    coordinates = {axes[0]: grid[::n, 0], axes[1]: grid[:n, 1]}
    with torch.no_grad():
        if isinstance(kernel, WarpedKernel):
            base: Any = kernel.kernel
            slopes = jets(kernel.warp, grid, 1)[1]
            assert slopes is not None
            lengths = base.lengthscale / torch.linalg.det(slopes).abs().sqrt()
        else:
            lengths = kernel.lengthscale(grid)
    lengths = lengths.reshape(n, n, -1)
    if lengths.shape[-1] == 1:
        return {"lengthscale": Field(lengths[..., 0], coordinates)}
    return {
        f"lengthscale_{axis}": Field(lengths[..., k], coordinates) for k, axis in enumerate(axes)
    }


def named_parameters(kernel: Kernel, axes: tuple[str, str] = ("x", "y")) -> dict[str, float]:
    """A kernel's numbers by their plain names, without logarithms; of a pair one a coordinate."""
    found = {}
    for name, value in kernel.parameters.items():
        last = name.rpartition(".")[2]
        numbers = value.exp() if last.startswith("log_") else value
        last = last.removeprefix("log_")
        if numbers.ndim == 0:
            found[last] = float(numbers)
        else:
            found |= {f"{last}_{a}": float(v) for a, v in zip(axes, numbers, strict=True)}
    return found


def with_named_parameters(
    problem: KernelProblem, axes: tuple[str, str] = ("x", "y")
) -> KernelProblem:
    """The same, with `named_parameters` of its only kernel as metrics: a run records their path."""
    (field,) = problem.kernels
    return with_numbers(problem, lambda kernels: named_parameters(kernels[field], axes))


def with_numbers(
    problem: KernelProblem, numbers: Callable[[Mapping[str, Kernel]], dict[str, float]]
) -> KernelProblem:
    """The same, with numbers of its kernels as metrics."""

    def at(name: str) -> Callable[[Any, Any], float]:
        return lambda y, x: numbers(problem.kernels_at(x))[name]

    return replace(
        problem, metrics={**problem.metrics, **{n: at(n) for n in numbers(problem.kernels)}}
    )


def together(equation: Equation, held: Equation) -> Equation:
    """An equation at its points and at those of another one."""
    data = None
    if equation.data is not None and held.data is not None:
        data = torch.cat([equation.data, held.data])
    return equation.at(torch.cat([equation.points, held.points]), data)


def merged_errors(
    pde: PDE,
    held: Equation,
    posterior: Posterior,
    grid: Tensor,
    reference: Mapping[str, Tensor],
    *,
    nugget: float,
) -> dict[str, Any]:
    """Errors when collocation and validation points are taken together, as the paper tests kernels.

    Gauss-Newton goes on from the learnt solution: with short lengths it may not get there from
    zero. Whether it converged is part of the result, and so is what stopped it.

    Parameters
    ----------
    pde
        Its first equation is the one that `held` has more points of.
    held
        The equation at validation points.
    posterior
        What was learnt.
    grid, reference
        As for `grid_fields`.
    nugget
        Of this solution.
    """
    interior, *others = pde.equations
    everything = PDE([together(interior, held), *others], pde.params)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is in the result
            found = solve_pde(
                everything, posterior.kernels, nugget=nugget, start=posterior,
                backend=posterior.backend,
            )  # fmt: skip
    except (FloatingPointError, NotPositiveDefiniteError) as error:
        return {"merged_converged": False, "merged_reason": str(error)}
    pairs = [errors(found.value(grid, name), exact) for name, exact in reference.items()]
    return {
        "merged_l2_error": max(pair[0] for pair in pairs),
        "merged_linf_error": max(pair[1] for pair in pairs),
        "merged_converged": found.converged,
        "merged_reason": found.reason,
    }
