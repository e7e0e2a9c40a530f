"""Low-rank curvature: M-FAC by Gram matrix or by the paper's recursion, and Nystrom sketches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

import operators as ops
from validation.bench import limits
from validation.bench.timing import Bench


class DynamicMFAC:
    """Sliding window of Frantar, Kurtic and Alistarh (2021, arXiv:2107.03356), dynamic form.

    Their loops over m are triangular solves here: with ``S = G G^T / l`` their D is that of the
    unpivoted LU factor of ``S + m I``, which is ``diag(L) L^T`` of its Cholesky factor.
    """

    def __init__(self, window: int, size: int, damping: float) -> None:
        self.m, self.damping, self.pushed = window, damping, 0
        self.rows, self.S = torch.zeros(window, size), torch.zeros(window, window)

    def push(self, gradient: Tensor) -> None:
        slot = self.pushed % self.m
        self.pushed += 1
        self.rows[slot] = gradient
        products = self.rows @ gradient / self.damping
        self.S[slot], self.S[:, slot] = products, products
        eye = torch.eye(self.m)
        L = torch.linalg.cholesky(self.S + self.m * eye)
        D = L.diagonal()[:, None] * L.T - self.m * eye
        self.pivots = self.m + D.diagonal()
        self.unit = (D / self.pivots[:, None]).T.tril(-1) + eye
        self.B = torch.linalg.solve_triangular(self.unit, eye / self.damping, upper=False)

    def solve(self, x: Tensor) -> Tensor:
        products = (self.rows @ x / self.damping)[:, None]
        q = torch.linalg.solve_triangular(self.unit, products, upper=False)[:, 0] / self.pivots
        return x / self.damping - self.rows.T @ (self.B.T @ q)


def mfac(bench: Bench) -> None:
    """A gradient into the window and one product with the inverse, d = 1e5, m = 64 and 256."""
    for window in (64, 256):
        mfac_of(bench, 100_000, window, damping=1e-3)


def mfac_of(bench: Bench, d: int, m: int, damping: float) -> None:
    """Both forms with one window; errors are those against float64."""
    generator = torch.Generator().manual_seed(0)
    rows, x = (torch.randn(*shape, generator=generator) for shape in ((m, d), (d,)))
    space = ops.Space.flat(d, torch.float32)
    # Each row comes back when it is the oldest: the window is full of the same rows at any time.
    runs = {
        "Gram form": mfac_steps(ops.MFAC(space, window=m, damping=damping), rows, x),
        "dynamic form": mfac_steps(DynamicMFAC(m, d, damping), rows, x),
    }
    G, wide = rows.double(), x.double()
    small = m * damping * torch.eye(m, dtype=torch.float64) + G @ G.T
    exact = (wide - G.T @ torch.linalg.solve(small, G @ wide)) / damping
    ours, theirs = (float((run().double() - exact).norm() / exact.norm()) for run in runs.values())
    # The window is read for its products with g and with x, and for the combination of its rows.
    traffic = 3 * rows.numel() * rows.element_size()
    limit = "a copy of as many bytes"
    bench.compare(
        f"M-FAC, push and solve, d = {d:,}, window {m}, float32",
        runs,
        lambda medians: (
            f"Errors: Gram form {ours:.1e}, dynamic form {theirs:.1e}. "
            f"{traffic / 1e6:.0f} MB at least; the Gram form moves them at "
            f"{traffic / 1e9 / medians['Gram form']:.1f} GB/s, a copy at "
            f"{traffic / 1e9 / medians[limit]:.1f} GB/s."
        ),
        tolerance=1e-4,
        beside={limit: limits.copy(traffic)},
    )


def mfac_steps(form: ops.MFAC | DynamicMFAC, rows: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """Fill the window; then each call pushes the next row and solves."""
    for row in rows:
        form.push(row)
    following = cycle(rows)

    def step() -> Tensor:
        form.push(next(following))
        return form.solve(x)

    return step


SKETCHES: dict[str, dict[str, Any]] = {
    "Gaussian": {"sketch": "gaussian"},
    "Gaussian, 10 more": {"sketch": "gaussian", "oversampling": 10},
    "uniform coordinates": {"sketch": "coordinate"},
    "RPCholesky": {"sketch": "rpcholesky"},
    "RPCholesky, blocks of 20": {"sketch": "rpcholesky", "block": 20},
}


def nystrom(bench: Bench) -> None:
    """Sketches of a kernel matrix: time, and error against the best of that rank."""
    points = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    K = torch.exp(-(torch.cdist(points, points) ** 2) / (2 * 0.3**2))
    K = (K + K.T) / 2
    eigenvalues = torch.linalg.eigvalsh(K)
    for rank in (50, 200):
        nystrom_of(bench, K, rank, best=float(eigenvalues[:-rank].sum()))


def nystrom_of(bench: Bench, K: Tensor, rank: int, best: float) -> None:
    """Every sketch at one rank; `best` is the least trace of ``A - A_k``."""
    A, n = ops.Dense(K, symmetric=True), len(K)

    def build(options: dict[str, Any], seed: int = 0) -> ops.Nystrom:
        generator = torch.Generator().manual_seed(seed)
        return ops.Nystrom(A, rank, power_iterations=0, generator=generator, **options)

    def left(options: dict[str, Any]) -> list[float]:
        traces = (build(options, seed).eigenvalues.sum() for seed in range(5))
        return sorted(float(K.trace() - kept) / best for kept in traces)

    errors = {name: left(options) for name, options in SKETCHES.items()}
    for name, values in errors.items():
        # No matrix of rank k below A is nearer to it than the best.
        assert values[0] > 1 - 1e-6, f"{name} leaves {values[0]} of the best: it is not below A"
    title = f"Nystrom, kernel matrix of {n} points, rank {rank}, float64"
    flops = 2 * n**2 * rank
    limit = f"one matrix product of {flops / 1e9:.1f} Gflop"
    bench.compare(
        title,
        {name: partial(build, options) for name, options in SKETCHES.items()},
        lambda medians: (
            f"A times {rank} vectors is {flops / 1e9:.1f} Gflop, and one matrix product of so many "
            f"takes {medians[limit] / medians['Gaussian']:.0%} of the Gaussian sketch's time; "
            "coordinates read columns and spare it."
        ),
        tolerance=None,  # approximations: each is compared with the best, in the table
        beside={limit: limits.matrix_product(flops, torch.float64)},
    )
    bench.table(
        f"{title}: trace of A - A_k over the least",
        {
            name: {"median of 5": values[2], "worst of 5": values[-1]}
            for name, values in errors.items()
        },
        f"The best of rank {rank} leaves {best:.3g} of {float(K.trace()):.0f}.",
    )
