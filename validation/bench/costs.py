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
from validation.bench.forty import laplacian
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
        ("DENSE_PRODUCT", _seconds(lambda: M @ v, repeats) / n**2),
    ]  # fmt: skip


def _sparse(repeats: int) -> list[tuple[str, float]]:
    grid, cube = (
        ops.Sparse.from_scipy(laplacian(*sizes), symmetric=True)
        for sizes in ((316, 316), (42, 42, 42))
    )
    v = torch.ones(grid.shape[0], dtype=torch.float64)

    rows, seconds, per_entry = [], [], []
    for A in (grid, cube):
        solver = solvers.SparseCholesky()
        prepared, found = solver.prepare(A), analyse(A)
        b = torch.ones(A.shape[0], dtype=torch.float64)
        rows.append([found.factor_nonzeros, found.flops])
        seconds.append(_seconds(lambda s=solver, A=A: s.prepare(A), repeats))
        per_entry.append(_seconds(lambda p=prepared, b=b: p.solve(b), repeats) / rows[-1][0])
    # seconds = entry * nonzeros + flop * flops of both, as nearly as factors >= 0 can tell.
    scaled = np.array(rows) / np.array(seconds)[:, None]
    (entry, flop), _ = nnls(scaled, np.ones(2))
    multigrid = solvers.CG(preconditioner=solvers.AMG(kind="ruge-stuben"), rtol=1e-8)
    prepared = multigrid.prepare(grid)
    info = prepared.solve(v).info
    cycles = _seconds(lambda: prepared.solve(v), repeats) / info.iterations
    few = solvers.CG(maxiter=50, stop_at_maxiter=True).prepare(ops.Diagonal(1 + v[:10].cumsum(0)))
    return [
        ("SPARSE_PRODUCT", _seconds(lambda: grid @ v, repeats) / grid.nnz),
        ("FACTOR_ENTRY", entry),
        ("FACTOR_FLOP", flop),
        ("FACTOR_SOLVE", per_entry[0]),
        ("AMG_SETUP", _seconds(lambda: multigrid.prepare(grid), repeats) / grid.nnz),
        ("AMG_CYCLE", cycles / grid.nnz),
        ("ITERATION", _seconds(lambda: few.solve(v[:10]), repeats) / 10),
    ]
