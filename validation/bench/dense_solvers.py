"""Dense solvers against torch.linalg: what `prepare` and `solve` add, many columns, batches."""

from __future__ import annotations

import torch
from torch import Tensor

import operators as ops
import solvers
from validation.bench.timing import Bench

BATCH, SMALL = 256, 32


def overhead(bench: Bench) -> None:
    """``prepare(A).solve(b)`` of one system of 20 and of 2000 unknowns."""
    for n in (20, 2000):
        A, b = _definite(n), _sampled(n)
        given, known = ops.Dense(A), ops.Dense(A, symmetric=True)
        title = f"one system of {n} unknowns, one right-hand side, float64"
        note = "The rest of the time goes into facts of A, the scale of b, and the true residual."
        bench.compare(
            f"LU, {title}",
            {
                "DenseLU": lambda A=given, b=b: solvers.DenseLU().prepare(A).solve(b).value,
                "solvers.solve": lambda A=given, b=b: solvers.solve(A, b, solvers.DenseLU()),
                "torch.linalg.solve": lambda A=A, b=b: torch.linalg.solve(A, b),
            },
            note,
            tolerance=1e-10,
        )
        bench.compare(
            f"Cholesky, {title}",
            {
                "DenseCholesky": lambda A=known, b=b: (
                    solvers.DenseCholesky().prepare(A).solve(b).value
                ),
                "torch.linalg.cholesky": lambda A=A, b=b: torch.cholesky_solve(
                    b[:, None], torch.linalg.cholesky(A)
                )[:, 0],
            },
            note,
            tolerance=1e-10,
        )
        factor, (LU, pivots) = solvers.DenseLU().prepare(given), torch.linalg.lu_factor(A)
        bench.compare(
            f"LU factorised before, {title}",
            {
                "factor.solve": lambda b=b, factor=factor: factor.solve(b).value,
                "torch.linalg.lu_solve": lambda b=b, LU=LU, pivots=pivots: torch.linalg.lu_solve(
                    LU, pivots, b[:, None]
                )[:, 0],
            },
            note,
            tolerance=1e-10,
        )


def least_squares(bench: Bench) -> None:
    """Tall systems against ``torch.linalg.lstsq``, by QR and by SVD."""
    for m, n in ((60, 20), (2000, 200)):
        A, b = _sampled(m, n), _sampled(m)
        given = ops.Dense(A)
        for solver, driver in ((solvers.QR(), "gels"), (solvers.SVD(), "gelsd")):
            bench.compare(
                f"{type(solver).__name__}, least squares {m} x {n}, float64",
                {
                    type(solver).__name__: lambda A=given, b=b, solver=solver: (
                        solver.prepare(A).solve(b).value
                    ),
                    f"torch.linalg.lstsq ({driver})": lambda A=A, b=b, driver=driver: (
                        torch.linalg.lstsq(A, b[:, None], driver=driver).solution[:, 0]
                    ),
                },
                "Ours can solve again, transposed too, and has measured the residual.",
                tolerance=1e-9,
            )


def columns(bench: Bench) -> None:
    """32 right-hand sides at once against one after the other."""
    n, k = 1000, 32
    A, B = ops.Dense(_definite(n), symmetric=True), _sampled(n, k)
    for solver in (solvers.DenseCholesky(), solvers.DenseLU()):
        factor = solver.prepare(A)
        bench.compare(
            f"{type(solver).__name__} factorised before, {n} unknowns, {k} right-hand sides",
            {
                "one block": lambda factor=factor: factor.solve(B).value,
                "a loop": lambda factor=factor: torch.stack(
                    [factor.solve(b).value for b in B.unbind(1)], 1
                ),
            },
            tolerance=1e-12,
        )


def batches(bench: Bench) -> None:
    """256 systems of 32 unknowns: one batched factorisation against a loop and torch.linalg."""
    A = torch.stack([_definite(SMALL, seed) for seed in range(BATCH)])
    b = _sampled(BATCH, SMALL)
    title = f"{BATCH} systems of {SMALL} unknowns, float64"
    stack = ops.Stacked([ops.Dense(M) for M in A])
    bench.compare(
        f"DenseLU, {title}",
        {
            "solvers.solve": lambda: solvers.solve(A, b, solver=solvers.DenseLU()),
            "Stacked, prepared": lambda: solvers.DenseLU().prepare(stack).solve(b).value,
            "a loop": lambda: torch.stack(
                [solvers.solve(M, c, solver=solvers.DenseLU()) for M, c in zip(A, b, strict=True)]
            ),
            "torch.linalg.solve": lambda: torch.linalg.solve(A, b),
        },
        tolerance=1e-10,
    )
    definite = ops.Stacked([ops.Dense(M, symmetric=True) for M in A])
    bench.compare(
        f"DenseCholesky, {title}",
        {
            "Stacked, prepared": lambda: solvers.DenseCholesky().prepare(definite).solve(b).value,
            "a loop": lambda: torch.stack(
                [
                    solvers.DenseCholesky().prepare(ops.Dense(M, symmetric=True)).solve(c).value
                    for M, c in zip(A, b, strict=True)
                ]
            ),
            "torch.linalg.solve": lambda: torch.linalg.solve(A, b),
            "torch.linalg.cholesky": lambda: torch.cholesky_solve(
                b[..., None], torch.linalg.cholesky(A)
            )[..., 0],
        },
        tolerance=1e-10,
    )


def _sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _definite(n: int, seed: int = 0) -> Tensor:
    root = _sampled(n, n, seed=seed)
    matrix = root @ root.T / n + torch.eye(n, dtype=torch.float64)
    return (matrix + matrix.T) / 2
