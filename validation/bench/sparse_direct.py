"""Sparse factorisations and their derivatives against the libraries that do the work, used raw."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.linalg import splu
from torch import Tensor

import operators as ops
import solvers
from solvers.sparse.analysis import analyse, analyses
from solvers.sparse.cholesky import SparseCholesky
from solvers.sparse.lu import SparseLU
from validation.bench.timing import Bench


def laplacian(*sizes: int) -> Any:
    """``-1, 2, -1`` along each axis of a grid: CSC, with indices of 32 bits."""
    total: Any = None
    for size in sizes:
        line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(size, size))
        total = line if total is None else scipy.sparse.kronsum(line, total)
    return _narrow(total)


def wind(side: int, speed: float) -> Any:
    """Upwind convection and diffusion on a square grid: not symmetric."""
    back = scipy.sparse.diags_array([-1.0, 1.0], offsets=[-1, 0], shape=(side, side))
    eye = scipy.sparse.eye_array(side)
    return _narrow(laplacian(side, side) + speed / side * scipy.sparse.kron(back, eye))


def _narrow(matrix: Any) -> Any:
    array = scipy.sparse.csc_array(matrix)
    array.sort_indices()
    array.indices, array.indptr = array.indices.astype(np.int32), array.indptr.astype(np.int32)
    return array


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradient(bench: Bench) -> None:
    """``x = A^-1 b`` and the gradient of ``<g, x>`` by b and the nonzeros of A."""
    cholmod = bench.optional("sksparse.cholmod")
    if cholmod is None:
        return
    for sizes in ((1000, 1000), (46, 46, 46)):
        gradient_of(bench, cholmod, sizes)


def gradient_of(bench: Bench, cholmod: Any, sizes: tuple[int, ...]) -> None:
    """For one grid, against a factorisation and two solves, which lack the gradient by A."""
    L = laplacian(*sizes)
    b, g = drawn(L.shape[0]), drawn(L.shape[0], seed=1)
    A = ops.Sparse.from_scipy(L, symmetric=True)
    values, right, adjoint = A.values, b.numpy(), g.numpy()

    def ours() -> list[Tensor]:
        moving, moving_b = values.clone().requires_grad_(), b.clone().requires_grad_()
        operator = ops.Sparse(moving, A.pattern, symmetric=True)
        x = solvers.solve(operator, moving_b, solver=SparseCholesky())
        x.backward(g)
        assert moving.grad is not None
        assert moving_b.grad is not None
        return [x, moving_b.grad]

    def cold() -> list[Tensor]:
        analyses.clear()
        return ours()

    def raw() -> list[Any]:
        factor = cholmod.cholesky(L)
        return [factor(right), factor(adjoint)]

    analyses.clear()
    ahead = analyse(A)
    bench.compare(
        f"Solve and gradient, Poisson {'x'.join(map(str, sizes))}, {L.shape[0]:,} unknowns",
        {"solvers.solve": cold, "CHOLMOD, raw": raw, "solvers.solve, analysed": ours},
        lambda medians: (
            f"{ahead.factor_nonzeros / L.shape[0]:.1f} nonzeros of L for an unknown and "
            f"{ahead.flops / 1e9:.1f} Gflop; analysing took {ahead.seconds:.2f} s. Raw: one "
            "factorisation and two solves, without the residuals and without the gradient by A."
        ),
        tolerance=1e-8,
    )


def blocks(bench: Bench) -> None:
    """32 right-hand sides at once."""
    for sizes in ((300, 300), (32, 32, 32)):
        L = laplacian(*sizes)
        factor = SparseCholesky().prepare(L)
        B = drawn(L.shape[0], 32)
        bench.compare(
            f"32 right-hand sides by {factor.backend}, Poisson {'x'.join(map(str, sizes))}",
            {
                "one block": lambda factor=factor, B=B: factor.solve(B).value,
                "one by one": lambda factor=factor, B=B: torch.stack(
                    [factor.solve(column).value for column in B.T], dim=1
                ),
            },
            tolerance=1e-10,
        )


def unsymmetric(bench: Bench) -> None:
    """SuperLU: a factorisation with a solve and a transposed one, and 32 right-hand sides."""
    M = wind(150, 20.0)
    A = ops.Sparse.from_scipy(M)
    b, B = drawn(M.shape[0]), drawn(M.shape[0], 32)
    solver = SparseLU(backend="superlu")

    def ours() -> list[Tensor]:
        factor = solver.prepare(A)
        return [factor.solve(b).value, factor.solve_transpose(b).value]

    def raw() -> list[Any]:
        factor = splu(M)
        return [factor.solve(b.numpy()), factor.solve(b.numpy(), "T")]

    bench.compare(
        "Factorise, solve and solve transposed, convection and diffusion 150x150",
        {"SparseLU": ours, "scipy splu": raw},
        tolerance=1e-10,
    )
    factor, other = solver.prepare(A), splu(M)
    bench.compare(
        "32 right-hand sides by SuperLU, convection and diffusion 150x150",
        {
            "SparseLU": lambda: factor.solve(B).value,
            "scipy splu": lambda: other.solve(B.numpy()),
            "SparseLU, one by one": lambda: torch.stack(
                [factor.solve(column).value for column in B.T], dim=1
            ),
        },
        "With more than one thread raw splu spreads each supernode's little product over them.",
        tolerance=1e-10,
    )
