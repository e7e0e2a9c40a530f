"""Hypergradients of every solver against central differences of the value function.

    python -m validation.hypergradients

Each problem has a nonzero direct gradient, so that a wrong sign or scale of the implicit term
shows.
Prints the relative errors and writes them to ``runs/validation/hypergradients.h5``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import hyperlearn as hl
from hyperlearn import operators, solvers

TOLERANCE = 1e-6
REPORT = Path("runs/validation/hypergradients.h5")


@dataclass(frozen=True)
class Problem:
    """Two losses f(y, x) in float64 with a unique, regular inner minimum."""

    name: str
    inner: Callable[[Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor], Tensor]
    y0: Tensor
    x: Tensor

    def minimiser(self, x: Tensor) -> Tensor:
        """``argmin_y inner(y, x)`` by Newton's method, until the step is at rounding level."""
        y = self.y0
        for _ in range(100):
            gradient = torch.func.grad(self.inner)(y, x)
            step = torch.linalg.solve(torch.func.hessian(self.inner)(y, x), gradient)
            y = y - step
            if step.norm() <= 1e-13 * (1 + y.norm()):
                return y
        raise RuntimeError(f"{self.name}: Newton's method did not converge")

    def central_differences(self, h: float = 1e-5) -> Tensor:
        """Gradient in x of ``outer(minimiser(x), x)``."""
        slopes = []
        for unit in torch.eye(len(self.x), dtype=self.x.dtype):
            above, below = self.x + h * unit, self.x - h * unit
            rise = self.outer(self.minimiser(above), above) - self.outer(
                self.minimiser(below), below
            )
            slopes.append(rise / (2 * h))
        return torch.stack(slopes)


def problems(seed: int) -> list[Problem]:
    """Ridge and logistic regression with a penalty a feature, and weighted softmax regression."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B, target, held_out = normal(40, 6), normal(20, 6), normal(40), normal(20)
    sign = torch.sign(A @ normal(6) + 0.5 * normal(40))
    held_sign = torch.sign(B @ normal(6) + 0.5 * normal(20))
    labels = torch.randint(3, (40,), generator=generator)
    held_labels = torch.randint(3, (20,), generator=generator)
    cross_entropy = torch.nn.functional.cross_entropy
    logistic = torch.nn.functional.softplus

    def weighted(y: Tensor, x: Tensor) -> Tensor:
        losses = cross_entropy(A @ y.reshape(6, 3), labels, reduction="none")
        return (torch.sigmoid(x) * losses).mean() + 0.05 * (y * y).sum()

    return [
        Problem(
            "ridge",
            lambda y, x: ((A @ y - target) ** 2).mean() + (x.exp() * y * y).sum(),
            lambda y, x: ((B @ y - held_out) ** 2).mean() + (x * x).sum(),
            torch.zeros(6, dtype=torch.float64),
            normal(6) - 1,
        ),
        Problem(
            "logistic",
            lambda y, x: logistic(-sign * (A @ y)).mean() + (x.exp() * y * y).sum(),
            lambda y, x: logistic(-held_sign * (B @ y)).mean() + x.sin().sum(),
            torch.zeros(6, dtype=torch.float64),
            normal(6) - 2,
        ),
        Problem(
            "weighted softmax",
            weighted,
            lambda y, x: cross_entropy(B @ y.reshape(6, 3), held_labels) + 0.01 * (x * x).sum(),
            torch.zeros(18, dtype=torch.float64),
            normal(40),
        ),
    ]


def estimates(problem: Problem) -> dict[str, tuple[Tensor, bool]]:
    """Hypergradients by every way at hand, and whether each should be exact."""
    y = problem.minimiser(problem.x)

    def by(**options: Any) -> Tensor:
        return hl.hypergradient(problem.outer, problem.inner, y, problem.x, **options)[0]

    few = solvers.Neumann(maxiter=5, stop_at_maxiter=True)
    return {
        "DenseCholesky": (by(solver=solvers.DenseCholesky()), True),
        "DenseLU": (by(solver=solvers.DenseLU()), True),
        "CG": (by(solver=solvers.CG(rtol=1e-10)), True),
        "Neumann": (by(solver=solvers.Neumann(rtol=1e-10, maxiter=100_000)), True),
        "Neumann, 5 terms": (by(solver=few), False),
        "identity": (
            by(operator=operators.Identity(operators.Space.of(y)), solver=solvers.Diagonal()),
            False,
        ),
    }


def main() -> bool:
    """Run, print, write the report; returns whether every exact way is within the tolerance."""
    console, sound = Console(width=100), True
    table = Table(title=f"relative error against central differences (exact ways: < {TOLERANCE:g})")
    for column in ("problem", "way", "worst of 5 seeds", "verdict"):
        table.add_column(column)
    errors: dict[tuple[str, str], list[float]] = {}
    exactness: dict[str, bool] = {}
    for seed in range(5):
        for problem in problems(seed):
            truth = problem.central_differences()
            for way, (estimate, exact) in estimates(problem).items():
                error = float((estimate - truth).norm() / truth.norm())
                errors.setdefault((problem.name, way), []).append(error)
                exactness[way] = exact
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(REPORT, "w") as file:
        for (name, way), values in errors.items():
            file[f"{name}/{way}"] = np.array(values)
            worst = max(values)
            if exactness[way]:
                verdict = "ok" if worst < TOLERANCE else "WRONG"
                sound = sound and worst < TOLERANCE
            else:
                verdict = "biased, as known"
            table.add_row(name, way, f"{worst:.1e}", verdict)
    console.print(table)
    console.print(f"written to {REPORT}")
    return sound


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
