"""Accuracy of estimated traces and log-determinants for what they spend on products."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

import operators as ops
from validation.bench.sparse import laplacian
from validation.bench.timing import Bench

FLOAT64 = torch.float64


def errors(bench: Bench) -> None:
    """Relative error of the trace against products, eigenvalues ``k^-2``."""
    n, runs = 1000, 20
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=FLOAT64)).Q
    eigenvalues = torch.arange(1, n + 1, dtype=FLOAT64) ** -2
    matrix = basis * eigenvalues @ basis.T
    exact = float(matrix.trace())
    # A matrix would know its trace: only products may be seen.
    A = ops.FunctionOperator(
        lambda v: matrix @ v, torch.zeros(n, dtype=FLOAT64), positive_definite=True
    )

    def estimate(method: str) -> Callable[[int], Tensor]:
        return lambda products: ops.trace(A, products, method=method, generator=generator).value

    estimators = {name: estimate(name) for name in ("xtrace", "hutch++", "hutchinson")}
    if bench.optional("curvlinops"):
        from curvlinops.trace.epperly2024xtrace import xtrace
        from curvlinops.trace.hutchinson import hutchinson_trace
        from curvlinops.trace.meyer2020hutch import hutchpp_trace

        peers = {"xtrace": xtrace, "hutch++": hutchpp_trace, "hutchinson": hutchinson_trace}
        for name, peer in peers.items():
            estimators[f"curvlinops {name}"] = lambda products, peer=peer: peer(matrix, products)

    def error(name: str, products: int) -> float:
        torch.manual_seed(0)  # curvlinops draws from the global generator
        squares = [(float(estimators[name](products)) / exact - 1) ** 2 for _ in range(runs)]
        return math.sqrt(sum(squares) / runs)

    budgets = (24, 60, 120, 240)
    rows = {
        name: {f"{products} products": error(name, products) for products in budgets}
        for name in estimators
    }
    # Var(v^T A v) = 2 (|A|_F^2 - sum A_ii^2) for signs.
    spread = 2 * (matrix.square().sum() - matrix.diagonal().square().sum())
    rows["hutchinson, in theory"] = {
        f"{products} products": math.sqrt(float(spread) / products) / exact for products in budgets
    }
    bench.table(
        f"Relative error of the trace, eigenvalues k^-2, n = {n} (root mean square of {runs})",
        rows,
        "XTrace and Hutch++ follow the eigenvalues, Hutchinson 1 / sqrt(products).",
    )


def logdet(bench: Bench) -> None:
    """Stochastic Lanczos quadrature on the 2D Poisson matrix, whose eigenvalues are known."""
    side = 100
    angles = torch.arange(1, side + 1, dtype=FLOAT64) * math.pi / (2 * (side + 1))
    line = 4 * angles.sin() ** 2
    exact = float((line[:, None] + line).log().sum())
    L = laplacian(side)
    A = ops.Sparse(L, positive_definite=True)

    def row(samples: int, steps: int) -> dict[str, float]:
        estimate = ops.logdet(A, samples, steps, method="slq")
        return {
            "products": estimate.products,
            "relative error": abs(float(estimate.value) / exact - 1),
            "estimated error": float(estimate.error) / exact,
            "of it bias": float(estimate.bias) / exact,
        }

    plans = ((16, 8), (16, 16), (16, 32), (16, 64), (64, 32))
    bench.table(
        f"log det by Lanczos quadrature, 2D Poisson matrix, n = {side**2:,}",
        {f"{samples} samples, {steps} steps": row(samples, steps) for samples, steps in plans},
        f"Exact: {exact:.6f}, from the eigenvalues.",
    )
    columns = scipy.sparse.csc_array(L)

    def factorised() -> float:
        lu = scipy.sparse.linalg.splu(columns)
        return float(np.log(abs(lu.U.diagonal())).sum())

    samples, steps = 16, 32
    products = samples * steps
    block = torch.randn(side**2, products, dtype=FLOAT64)
    limit = f"its {products} products alone"
    bench.compare(
        f"log det, 2D Poisson matrix, n = {side**2:,}: estimated and exact",
        {
            f"Lanczos, {samples} x {steps}": lambda: ops.logdet(A, samples, steps).value,
            "scipy, sparse LU": factorised,
        },
        lambda medians: (
            f"Its {products} products are "
            f"{medians[limit] / medians[f'Lanczos, {samples} x {steps}']:.0%} of the estimate's "
            "time: the rest keeps the Lanczos vectors orthogonal. In the plane LU has little fill."
        ),
        tolerance=0.01,
        beside={limit: lambda: A @ block},
    )
