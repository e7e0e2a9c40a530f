"""The constants behind `Auto`'s predictions, measured here: `solvers.auto.costs`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import nnls

import operators as ops
import solvers
from solvers.auto import costs
from solvers.sparse.analysis import analyse
from validation.bench.forty import convection, laplacian
from validation.bench.timing import Bench


def constants(bench: Bench) -> None:
    """Each constant: its value, and what is measured now, in seconds per unit."""
    measured = dict(_dense(bench.repeats)) | dict(_sparse(bench.repeats))
    rows = {
        name: {"in the code": getattr(costs, name), "here": value, "ratio": value / _value(name)}
        for name, value in measured.items()
    }
    bench.table("Costs that Auto predicts with, seconds per unit", rows, "Only ratios matter.")


def _value(name: str) -> float:
    value: float = getattr(costs, name)
    return value


def _seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _dense(repeats: int) -> list[tuple[str, float]]:
    n = 2000
    M = torch.randn(n, n, dtype=torch.float64)
    S, tall, v = M @ M.T / n + torch.eye(n), torch.randn(n, 200, dtype=torch.float64), M[0]
    small = S[:500, :500].contiguous()
    long, w = torch.randn(30_000, 200, dtype=torch.float64), v[:200]
    third, m = n**3 / 3, 200
    return [
        ("CHOLESKY", _seconds(lambda: torch.linalg.cholesky(S), repeats) / third),
        ("LU", _seconds(lambda: torch.linalg.lu_factor(M), repeats) / (2 * third)),
        ("LDL", _seconds(lambda: torch.linalg.ldl_factor(S), repeats) / third),
        ("QR", _seconds(lambda: torch.linalg.qr(tall), repeats) / (n * m**2)),
        ("SVD", _seconds(lambda: torch.linalg.svd(tall, full_matrices=False), repeats)
         / (n * m**2)),
        ("EIGEN", _seconds(lambda: torch.linalg.eigh(small), repeats) / 500**3),
        ("MEMORY", _seconds(lambda: torch.zeros(3000, 3000, dtype=M.dtype), repeats) / 3000**2),
        ("DENSE_PRODUCT", _seconds(lambda: long.T @ (long @ w), repeats) / (2 * long.numel())),
    ]  # fmt: skip


def _sparse(repeats: int) -> list[tuple[str, float]]:
    grid = ops.Sparse.from_scipy(laplacian(316, 316), symmetric=True)
    v = torch.ones(grid.shape[0], dtype=torch.float64)
    product = _seconds(lambda: grid @ v, repeats)
    cholesky = solvers.SparseCholesky()
    factor, fill = cholesky.prepare(grid), analyse(grid).factor_nonzeros

    multigrid = solvers.CG(preconditioner=solvers.AMG(kind="ruge-stuben"), rtol=1e-8)
    prepared = multigrid.prepare(grid)
    cycle = _seconds(lambda: prepared.solve(v), repeats) / prepared.solve(v).info.iterations

    steps = 50
    limited = solvers.CG(maxiter=steps, stop_at_maxiter=True, rtol=0.0)
    few = limited.prepare(ops.Diagonal(torch.rand(60).double() + 1))
    iteration = _seconds(lambda: few.solve(v[:60]), repeats) / steps
    # Vectors that are too long for the cache.
    wide = ops.Sparse.from_scipy(laplacian(1000, 1000), symmetric=True)
    many, w = limited.prepare(wide), torch.ones(wide.shape[0], dtype=torch.float64)
    vectors = _seconds(lambda: many.solve(w), repeats) / steps
    vectors -= _seconds(lambda: wide @ w, repeats) + iteration

    # seconds = entry * nonzeros + flop * flops of both, as nearly as factors >= 0 can tell.
    rows = []
    for n in (100, 250):
        A, found = ops.Sparse(convection(n, 10.0)), analyse(laplacian(n, n))
        seconds = _seconds(lambda A=A: solvers.SparseLU().prepare(A), repeats)
        rows.append([2 * found.factor_nonzeros / seconds, 2 * found.flops / seconds])
    (entry, flop), _ = nnls(np.array(rows), np.ones(2))
    return [
        ("SPARSE_PRODUCT", product / grid.nnz),
        ("FACTOR_ENTRY", _seconds(lambda: cholesky.prepare(grid), repeats) / fill),
        ("FACTOR_SOLVE", _seconds(lambda: factor.solve(v), repeats) / fill),
        ("AMG_SETUP", _seconds(lambda: multigrid.prepare(grid), repeats) / grid.nnz),
        ("AMG_CYCLE", cycle / grid.nnz),
        ("SUPERLU_ENTRY", entry),
        ("SUPERLU_FLOP", flop),
        ("ITERATION", iteration),
        ("VECTOR", vectors / (10 * len(w))),
    ]
