"""Krylov methods against scipy's: same systems, same tolerances, iterations side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

import operators as ops
from solvers.krylov.bicgstab import BiCGStab
from solvers.krylov.cg import CG
from solvers.krylov.gmres import GMRES
from solvers.krylov.lsmr import LSMR
from solvers.krylov.minres import MINRES
from solvers.linear_solver import LinearSolver
from validation.bench.sparse import laplacian
from validation.bench.timing import Bench

RTOL = 1e-8


def dense_matrix(n: int) -> Tensor:
    """Symmetric, with eigenvalues by the semicircle law between 0.1 and 4.1."""
    M = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    M = (M + M.T).div_((2 * n) ** 0.5)
    M.diagonal().add_(2.1)
    return M


def dense(bench: Bench) -> None:
    """CG with a dense matrix 4000 x 4000."""
    n = 4000
    M = dense_matrix(n)
    b = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prepared = CG(rtol=RTOL).prepare(ops.Dense(M, symmetric=True))
    array, rhs = M.numpy(), b.numpy()
    cg = scipy.sparse.linalg.cg
    ours, theirs = prepared.solve(b).info.iterations, _iterations(cg, array, rhs)
    bench.compare(
        f"CG, dense {n} x {n}, float64, rtol {RTOL:.0e}",
        {
            "CG": lambda: prepared.solve(b).value,
            "solve(M, b, CG)": lambda: CG(rtol=RTOL).prepare(M).solve(b).value,
            "scipy cg": lambda: cg(array, rhs, rtol=RTOL)[0],
        },
        lambda medians: (
            f"{ours} iterations, scipy {theirs}; "
            f"CG takes {medians['CG'] / medians['scipy cg']:.2f} times scipy's time."
        ),
        tolerance=1e-6,
        beside={"as many products M @ b": lambda: [M @ b for _ in range(ours)]},
    )


def block(bench: Bench) -> None:
    """32 right-hand sides at once and one by one."""
    n, k = 2000, 32
    M = dense_matrix(n)
    B = torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prepared = CG(rtol=RTOL).prepare(ops.Dense(M, symmetric=True))
    array, rhs = M.numpy(), B.numpy()
    columns = [column.contiguous() for column in B.unbind(1)]

    def by_scipy() -> Any:
        solutions = [
            scipy.sparse.linalg.cg(array, rhs[:, j].copy(), rtol=RTOL)[0] for j in range(k)
        ]
        return np.stack(solutions, axis=1)

    bench.compare(
        f"CG, dense {n} x {n}, {k} right-hand sides, float64, rtol {RTOL:.0e}",
        {
            "one block": lambda: prepared.solve(B).value,
            "CG in a loop": lambda: torch.stack([prepared.solve(b).value for b in columns], 1),
            "scipy cg in a loop": by_scipy,
        },
        tolerance=1e-6,
    )


def sparse(bench: Bench) -> None:
    """CG, MINRES, GMRES, BiCGStab and LSMR with sparse matrices."""
    side = 100
    L = laplacian(side)
    n = L.shape[0]
    eye = scipy.sparse.eye_array(n, format="csr")
    ahead = scipy.sparse.diags_array([-1.0, 1.0], offsets=[-1, 0], shape=(side, side))
    wind = scipy.sparse.kron(scipy.sparse.eye_array(side), ahead, format="csr")
    random = np.random.default_rng(0)
    tall = scipy.sparse.random_array((4 * n, n), density=5e-4, rng=random, format="csr")
    tall = scipy.sparse.vstack([tall, eye], format="csr")
    linalg = scipy.sparse.linalg
    plain = f"five-point Laplacian, {n:,} unknowns"
    versus(bench, CG(rtol=RTOL), L, linalg.cg, plain, symmetric=True)
    indefinite = scipy.sparse.csr_array(L - 0.01 * eye)
    name = f"Laplacian less 0.01 I, {n:,} unknowns"
    versus(bench, MINRES(rtol=RTOL), indefinite, linalg.minres, name, symmetric=True)
    windy = scipy.sparse.csr_array(L + 0.5 * wind + 0.1 * eye)
    name = f"convection and diffusion, {n:,} unknowns"
    versus(bench, GMRES(rtol=RTOL, restart=30), windy, linalg.gmres, name, restart=30)
    versus(bench, BiCGStab(rtol=RTOL), windy, linalg.bicgstab, name)
    name = f"least squares, {tall.shape[0]:,} x {n:,}, {tall.nnz:,} nonzeros"
    versus(bench, LSMR(rtol=RTOL), tall, linalg.lsmr, name)


def versus(
    bench: Bench,
    solver: LinearSolver,
    matrix: scipy.sparse.csr_array,
    theirs: Callable[..., Any],
    name: str,
    *,
    symmetric: bool = False,
    **settings: Any,
) -> None:
    """One method of ours against scipy's, on one matrix."""
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(matrix.shape[0], dtype=torch.float64, generator=generator)
    rhs, kind = b.numpy(), type(solver).__name__
    prepared = solver.prepare(ops.Sparse(matrix, symmetric=symmetric))
    tolerance: dict[str, Any] = {"rtol": RTOL, **settings}
    if theirs is scipy.sparse.linalg.lsmr:
        tolerance = {"atol": RTOL, "btol": RTOL}
        counts = str(theirs(matrix, rhs, **tolerance)[2])
    else:
        counts = str(_iterations(theirs, matrix, rhs, **tolerance))
    bench.compare(
        f"{kind}, {name}, float64, rtol {RTOL:.0e}",
        {
            kind: lambda: prepared.solve(b).value,
            f"scipy {theirs.__name__}": lambda: theirs(matrix, rhs, **tolerance)[0],
        },
        f"{prepared.solve(b).info.iterations} iterations, scipy {counts}.",
        tolerance=1e-4,
    )


def _iterations(method: Callable[..., Any], matrix: Any, rhs: Any, **settings: Any) -> int:
    """How often scipy's method calls back: once an iteration."""
    calls: list[int] = []
    if method is scipy.sparse.linalg.gmres:
        settings["callback_type"] = "pr_norm"
    method(matrix, rhs, callback=lambda _: calls.append(1), **{"rtol": RTOL, **settings})
    return len(calls)
