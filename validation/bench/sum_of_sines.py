"""The cubic elliptic equation at up to 160,000 points: error, time and memory by backend.

    -Lap u + u^3 = f ,     u = sum_{k <= 600} k^-6 sin(k pi x) sin(k pi y) ,

on grids of spacing h; Matern 7/2 of length 0.3, nugget 1e-10, three Gauss-Newton iterations.
Published (arXiv 2304.01294 and its Python port, rho = 3): 16.6 s on 32 threads, 6.0 s on one H200,
for an error of 1e-5 at 10,201 points; without derivatives.
"""

from __future__ import annotations

import math
import resource
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hyperlearn as hl
import operators as ops
from hyperlearn.experiments.references import points, sum_of_sines
from hyperlearn.gp.backend import Backend, Dense
from hyperlearn.gp.gauss_newton import step
from hyperlearn.gp.objectives import Held
from hyperlearn.gp.sparse import Sparse
from validation.bench.timing import Bench

LENGTH, NUGGET, ITERATIONS = 0.3, 1e-10, 3
# Points at which the loss is taken, whose derivative by the length is timed.
VALIDATION = 1_000
# Of the tables; the rest is printed row by row.
COLUMNS = ("L2", "Linf", "s", "cpu s", "GiB", "CG", "gradient s", "gradient GiB")
# What a dense factorisation fits in, with its derivative.
DENSE_POINTS = 11_000


def small(bench: Bench) -> None:
    """Up to 10,201 points, against dense Cholesky."""
    spacings(bench, (0.02, 0.01), (Dense(), Sparse(rho=3.0), Sparse()))


def large(bench: Bench) -> None:
    """Up to 160,801 points."""
    spacings(bench, (0.02, 0.01, 0.005, 0.0025), (Sparse(), Sparse(rho=3.0)))


def spacings(bench: Bench, wanted: tuple[float, ...], backends: tuple[Backend, ...]) -> None:
    """Each run in a process of its own, one after the other."""
    for backend in backends:
        rows: dict[str, dict[str, float]] = {}
        for h in wanted:
            n = (round(1 / h) + 1) ** 2
            if isinstance(backend, Dense) and n > DENSE_POINTS:
                continue
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                threads = torch.get_num_threads()
                rows[f"{n} points"] = pool.submit(solved, h, backend, threads).result()
            bench.console.print({"h": h, **rows[f"{n} points"]})
        shown = {name: {column: row[column] for column in COLUMNS} for name, row in rows.items()}
        bench.table(f"sum of sines, {backend!r}", shown, _growth(rows))


def _growth(rows: dict[str, dict[str, float]]) -> str:
    """Exponents of time in the number of points, by least squares."""
    if len(rows) < 2:
        return ""
    sizes = np.log([row["points"] for row in rows.values()])
    found = {
        name: np.polyfit(sizes, np.log([row[name] for row in rows.values()]), 1)[0]
        for name in ("cpu s", "gradient cpu s")
    }
    return "time grows as points to the power " + ", ".join(
        f"{value:.2f} ({name})" for name, value in found.items()
    )


def problem(h: float) -> tuple[hl.PDE, Tensor, hl.Equation]:
    """Equations on the grid, u at the interior points, and the equation at validation points."""
    grid = points.grid(round(1 / h) + 1, points.UNIT_SQUARE)
    edge = ((grid == 0) | (grid == 1)).any(1)
    inside, boundary = grid[~edge], grid[edge]
    interior = hl.Equation(
        lambda u, lap_u, data: -lap_u + u**3 - data, inside, data=sum_of_sines.source(inside)
    )
    values = sum_of_sines.solution(boundary)
    pde = hl.PDE([interior, hl.Equation(lambda u, data: u - data, boundary, data=values)])
    generator = torch.Generator().manual_seed(0)
    x = points.uniform_interior(VALIDATION, points.UNIT_SQUARE, generator)
    return pde, sum_of_sines.solution(inside), interior.at(x, sum_of_sines.source(x))


def solved(h: float, backend: Backend, threads: int) -> dict[str, float]:
    """One solution and the derivative of a loss by the logarithm of the length."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", hl.solvers.ConvergenceWarning)
    pde, exact, validation = problem(h)
    method = hl.GaussNewton(maxiter=ITERATIONS)
    wall, cpu = time.perf_counter(), time.process_time()
    solution = hl.solve_pde(
        pde, ops.Matern(LENGTH, nu=3.5), nugget=NUGGET, method=method, backend=backend
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    error = solution.states[0]["u"] - exact
    peak = _peak()
    info = getattr(solution.posterior.factor, "info", None)
    row = {
        "points": float(pde.size),
        "L2": float(error.square().mean().sqrt()),
        "Linf": float(error.abs().max()),
        "s": wall,
        "cpu s": cpu,
        "GiB": peak,
        "CG": math.nan if info is None else float(info.iterations),
    }
    states, known = solution.states, solution.posterior.state(validation)
    del solution
    wall, cpu = time.perf_counter(), time.process_time()
    log_length = torch.tensor(math.log(LENGTH), dtype=torch.float64, requires_grad=True)
    value = loss(pde, validation, states, known, backend, log_length)
    (gradient,) = torch.autograd.grad(value, log_length)
    return row | {
        "loss": float(value.detach()),
        "gradient": float(gradient),
        "gradient s": time.perf_counter() - wall,
        "gradient cpu s": time.process_time() - cpu,
        "gradient GiB": _peak(),
    }


def loss(
    pde: hl.PDE,
    validation: hl.Equation,
    states: Any,
    known: Any,
    backend: Backend,
    log_length: Tensor,
) -> Tensor:
    """Mean square of the linearised residual at validation points, one iteration from a state."""
    kernels = {"u": ops.Matern(log_length.exp(), nu=3.5)}
    posterior = step(pde, kernels, states, NUGGET, backend)
    objective = hl.ValidationResidual([validation])
    return objective.loss(posterior, Held([validation], [known]), None, torch.Generator())


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
