"""Preconditioned conjugate gradients: multigrid against pyamg, blocks against loops, sketches."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import pyamg
import scipy.sparse
import torch
from torch import Tensor

import operators as ops
from solvers.dense.cholesky import DenseCholesky
from solvers.krylov.cg import CG
from solvers.preconditioners.amg import AMG
from solvers.preconditioners.nystrom import Nystrom
from validation.bench.timing import Bench

KINDS: dict[str, Callable[..., Any]] = {
    "smoothed-aggregation": pyamg.smoothed_aggregation_solver,
    "ruge-stuben": pyamg.ruge_stuben_solver,
}
GRIDS = ((1000, 1000), (64, 64, 64))
RTOL = 1e-8


def poisson(*sides: int) -> Any:
    """Scipy matrix of the five- or seven-point Laplacian, with indices of 32 bits."""

    def add(A: Any, B: Any) -> Any:
        eyes = (scipy.sparse.eye_array(M.shape[0]) for M in (B, A))
        return scipy.sparse.kron(A, next(eyes)) + scipy.sparse.kron(next(eyes), B)

    lines = (
        scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(side, side))
        for side in sides
    )
    matrix = scipy.sparse.csr_array(reduce(add, lines))
    matrix.sort_indices()
    matrix.indices, matrix.indptr = matrix.indices.astype("i4"), matrix.indptr.astype("i4")
    return matrix


def against_pyamg(bench: Bench) -> None:
    """Setup and solve, two and three dimensions, smoothed aggregation and Ruge-Stuben."""
    for sides in GRIDS:
        for kind in KINDS:
            against_pyamg_of(bench, sides, kind)


def against_pyamg_of(bench: Bench, sides: tuple[int, ...], kind: str) -> None:
    """One problem: CG with AMG against `solve(b, accel="cg")`, to one residual."""
    matrix = poisson(*sides)
    A = ops.Sparse(matrix, symmetric=True, positive_definite=True)
    b = np.random.default_rng(0).standard_normal(A.shape[0])
    title = f"Poisson {' x '.join(map(str, sides))}, {kind}, float64"
    bench.compare(
        f"{title}: setup",
        {
            "AMG": lambda: AMG(kind=kind).prepare(A),  # type: ignore[arg-type]
            "pyamg": lambda: KINDS[kind](matrix.copy()),
        },
        tolerance=None,
    )
    theirs, settings = KINDS[kind](matrix.copy()), AMG(kind=kind)  # type: ignore[arg-type]
    ours = CG(rtol=RTOL, preconditioner=settings).prepare(A)
    residuals: list[float] = []
    found = theirs.solve(b, accel="cg", tol=RTOL, residuals=residuals)
    info = ours.solve(torch.from_numpy(b)).info
    reached = np.linalg.norm(b - matrix @ found) / np.linalg.norm(b)
    bench.compare(
        f"{title}: solve",
        {
            "CG(AMG)": lambda: ours.solve(torch.from_numpy(b)).value,
            "pyamg": lambda: theirs.solve(b, accel="cg", tol=RTOL),
        },
        f"Iterations: {info.iterations}, pyamg {len(residuals) - 1}. True relative residuals: "
        f"{info.residual:.1e}, pyamg {reached:.1e}. Operator complexity: "
        f"{info.operator_complexity:.2f}, pyamg {theirs.operator_complexity():.2f}.",
        tolerance=1e-4,
    )


def many_right_hand_sides(bench: Bench) -> None:
    """16 right-hand sides at once and one by one."""
    for sides in ((300, 300), (64, 64, 64)):
        many_right_hand_sides_of(bench, sides, 16)


def many_right_hand_sides_of(bench: Bench, sides: tuple[int, ...], count: int) -> None:
    """One problem; pyamg has no blocks and loops."""
    matrix = poisson(*sides)
    A = ops.Sparse(matrix, symmetric=True, positive_definite=True)
    block = torch.from_numpy(np.random.default_rng(0).standard_normal((A.shape[0], count)))
    ours, theirs = CG(rtol=RTOL, preconditioner=AMG()).prepare(A), KINDS["smoothed-aggregation"]
    made, columns = theirs(matrix.copy()), block.T.contiguous()
    bench.compare(
        f"Poisson {' x '.join(map(str, sides))}, {count} right-hand sides, float64",
        {
            "block": lambda: ours.solve(block).value.T,
            "one by one": lambda: torch.stack([ours.solve(b).value for b in columns]),
            "pyamg, one by one": lambda: np.stack(
                [made.solve(b.numpy(), accel="cg", tol=RTOL) for b in columns]
            ),
        },
        tolerance=1e-4,
    )


def kernel(bench: Bench) -> None:
    """Kernel matrices of small and of large effective dimension, n = 4000."""
    for length in (3.0, 1.0):
        kernel_of(bench, 4000, length, mu=4e-3)


def kernel_of(bench: Bench, n: int, length: float, mu: float) -> None:
    """One system ``(K + mu I) x = b`` by all, setup included."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    b = torch.randn(n, generator=generator, dtype=torch.float64)
    K = torch.exp(-(torch.cdist(points, points) ** 2) / (2 * length**2))
    K = (K + K.T) / 2
    A = ops.Dense(K, symmetric=True) + mu * ops.Identity(n)
    values = torch.linalg.eigvalsh(K).clamp_min(0)
    effective = float((values / (values + mu)).sum())
    solvers = {
        f"{name}, rank {rank}": CG(
            rtol=RTOL, preconditioner=Nystrom(rank=rank, sketch=sketch, tolerance=None)
        )
        for rank in (300, 800)
        for name, sketch in (("Nystrom", "gaussian"), ("RPCholesky", "rpcholesky"))
    }
    rivals = {**solvers, "plain CG": CG(rtol=RTOL), "dense Cholesky": DenseCholesky(rtol=RTOL)}

    def solve(name: str) -> Tensor:
        value: Tensor = rivals[name].prepare(A).solve(b).value
        return value

    counts = {name: rivals[name].prepare(A).solve(b).info.iterations for name in rivals}
    bench.compare(
        f"Kernel system, n = {n}, length {length:g}, mu = {mu:g}, float64, setup and solve",
        {name: lambda name=name: solve(name) for name in rivals},  # type: ignore[misc]
        f"Effective dimension {effective:.0f}. Iterations: "
        + ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        + ".",
        tolerance=1e-5,
    )
