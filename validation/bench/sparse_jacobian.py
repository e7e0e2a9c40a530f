"""All nonzeros of a Jacobian at 1e6 unknowns: coloured sweeps against scipy's differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from scipy.optimize._numdiff import approx_derivative, group_columns
from torch import Tensor

import operators as ops
from validation.bench import limits, memory
from validation.bench.sparse import laplacian
from validation.bench.timing import Bench

POINTS = 1000
STRENGTH = torch.tensor(1.0, dtype=torch.float64)


def bratu(u: Tensor, strength: Tensor) -> Tensor:
    """``-laplace u - strength exp(u)``, u = 0 on the boundary of the unit square."""
    scale = (len(u) + 1) ** 2
    p = torch.nn.functional.pad(u, (1, 1, 1, 1))
    around = p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2]
    return scale * (4 * u - around) - strength * torch.exp(u)


def start() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(POINTS, POINTS, dtype=torch.float64, generator=generator)


def pattern() -> scipy.sparse.csr_matrix:
    """Where the nonzeros are: scipy has to be told."""
    return scipy.sparse.csr_matrix(laplacian(POINTS).astype(bool).astype(np.int8))


def differences(
    u: Tensor, structure: scipy.sparse.csr_matrix, groups: NDArray[np.int32]
) -> scipy.sparse.csr_matrix:
    """A difference quotient for each group of columns: what scipy does with ``jac_sparsity``."""

    def residual(w: NDArray[np.float64]) -> NDArray[np.float64]:
        values = torch.from_numpy(np.ascontiguousarray(w)).reshape(POINTS, POINTS)
        return bratu(values, STRENGTH).reshape(-1).numpy()

    point = u.reshape(-1).numpy()
    return approx_derivative(residual, point, method="2-point", sparsity=(structure, groups))


def nonzeros(bench: Bench) -> None:
    """Times to the first nonzeros, and at another point; agreement; peak memory."""
    u, structure = start(), pattern()
    there = u + 1
    A = ops.SparseJacobian(bratu, u, STRENGTH)
    groups = group_columns(structure)
    exact, quotients = A.at(there, STRENGTH).to_scipy(), differences(there, structure, groups)
    off = abs(quotients - exact).max() / abs(exact).max()
    # Quotients of size 8e6 in steps of 1.5e-8 times u lose half of the digits.
    assert off < 1e-6, f"difference quotients are {off:.1e} off"
    known = ops.stencil((POINTS, POINTS), ops.FIVE_POINT)
    traffic = 8 * (A.nnz + u.numel())
    limit = "a copy of as many bytes"
    bench.compare(
        "First nonzeros of the Jacobian, nonlinear five-point residual, 1,000,000 unknowns",
        {
            "SparseJacobian": lambda: ops.SparseJacobian(bratu, u, STRENGTH),
            "SparseJacobian, pattern given": lambda: ops.SparseJacobian(
                bratu,
                u,
                STRENGTH,
                # A new one each time: a pattern keeps what was worked out of it.
                sparsity=ops.Pattern(known.columns, known.row_pointers, known.shape),
            ),
            "scipy, pattern given": lambda: differences(u, structure, group_columns(structure)),
        },
        lambda medians: (
            "Ours finds the pattern in the graph of the residual, colours, sweeps, and checks the "
            f"result by a product: {medians['SparseJacobian'] / medians[limit]:.0f} copies of the "
            f"{traffic / 1e6:.0f} MB of nonzeros and u, "
            f"{medians['SparseJacobian, pattern given'] / medians[limit]:.0f} from the pattern."
        ),
        tolerance=None,  # operators, not numbers: compared above
        beside={
            "stencil alone": lambda: ops.stencil((POINTS, POINTS), ops.FIVE_POINT),
            limit: limits.copy(traffic),
        },
    )
    directions = torch.randn(A.colours, POINTS, POINTS, dtype=torch.float64)

    def sweeps() -> None:
        for direction in directions:
            torch.func.jvp(lambda w: bratu(w, STRENGTH), (there,), (direction,))

    alone = f"{A.colours} sweeps (jvp) alone"
    bench.compare(
        "Nonzeros at another point, 1,000,000 unknowns",
        {
            "SparseJacobian.at": lambda: A.at(there, STRENGTH),
            "scipy, groups given": lambda: differences(there, structure, groups),
        },
        lambda medians: (
            f"{A.colours} colours (the least: the longest row has 5), scipy {groups.max() + 1} "
            f"groups; quotients are {off:.0e} off. Nonzeros and u are {traffic / 1e6:.0f} MB: at "
            f"{traffic / 1e9 / medians['SparseJacobian.at']:.2f} GB/s ours is "
            f"{medians['SparseJacobian.at'] / medians[limit]:.0f} times a copy, but "
            f"{medians['SparseJacobian.at'] / medians[alone]:.1f} "
            f"times its sweeps and {medians['SparseJacobian.at'] / medians['one residual']:.0f} "
            "residuals."
        ),
        tolerance=None,
        beside={
            alone: sweeps,
            "one residual": lambda: bratu(there, STRENGTH),
            limit: limits.copy(traffic),
        },
    )
    if not memory.can_measure():
        bench.console.print("peak memory is measured on Linux only\n")
        return
    tasks = {
        "SparseJacobian": first_of_ours,
        "SparseJacobian.at": second_of_ours,
        "scipy, pattern given": first_of_scipy,
    }
    held = A.nnz * 8
    bench.table(
        "Peak memory of the Jacobian, 1,000,000 unknowns",
        {
            name: {"GB above the start": peak / 1e9, "times the nonzeros": peak / held}
            for name, peak in ((name, memory.peak(task)) for name, task in tasks.items())
        },
        f"The nonzeros are {held / 1e6:.0f} MB, with 32-bit columns {1.5 * held / 1e6:.0f} MB.",
    )


def first_of_ours() -> Callable[[], object]:
    u = start()
    bratu(u, STRENGTH)
    return lambda: ops.SparseJacobian(bratu, u, STRENGTH)


def second_of_ours() -> Callable[[], object]:
    u = start()
    A = ops.SparseJacobian(bratu, u, STRENGTH)
    return lambda: A.at(u + 1, STRENGTH)


def first_of_scipy() -> Callable[[], object]:
    u, structure = start(), pattern()
    bratu(u, STRENGTH)
    return lambda: differences(u, structure, group_columns(structure))
