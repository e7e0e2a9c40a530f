"""Linear systems that a choice of solver is judged by: forty, `systems`, and `others`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

import operators as ops
from operators import LinearOperator


@dataclass(frozen=True)
class SystemCase:
    """A system: how to make its operator, and what it is."""

    name: str
    build: Callable[[], LinearOperator]

    def right_hand_side(self, A: LinearOperator) -> Tensor:
        """One random vector; for least squares with a part in the range."""
        generator = torch.Generator().manual_seed(1)
        b = torch.randn(A.shape[0], generator=generator, dtype=torch.float64)
        if A.shape[0] > A.shape[1]:
            x = torch.randn(A.shape[1], generator=generator, dtype=torch.float64)
            b = A @ x + 0.1 * b
        return b


def systems() -> list[SystemCase]:
    """All of them; float64, seeded."""
    cases: list[SystemCase] = []

    def add(name: str, build: Callable[[], LinearOperator]) -> None:
        cases.append(SystemCase(name, build))

    for n in (100, 316, 700):
        add(f"Poisson 2D {n}^2", lambda n=n: _sparse(laplacian(n, n)))
    for n in (22, 36, 46):
        add(f"Poisson 3D {n}^3", lambda n=n: _sparse(laplacian(n, n, n)))
    for n in (100, 300):
        for epsilon in (1e-2, 1e-4):
            add(
                f"anisotropic {epsilon:g} 2D {n}^2",
                lambda n=n, e=epsilon: _sparse(laplacian(n, n, weights=(1.0, e))),
            )
    for sigma in (1.0, 2.0):
        add(f"rough coefficients {sigma:g} 2D 200^2", lambda s=sigma: _sparse(rough(200, s)))
    for n in (100, 300):
        for speed in (10.0, 1000.0):
            add(
                f"convection {speed:g} diffusion 2D {n}^2",
                lambda n=n, v=speed: ops.Sparse(convection(n, v)),
            )
    add("graph Laplacian, random 6-regular, 1e4", lambda: _sparse(_graph("regular", 10_000)))
    add("graph Laplacian, preferential, 1e4", lambda: _sparse(_graph("preferential", 10_000)))
    add("graph Laplacian, geometric, 2e4", lambda: _sparse(_graph("geometric", 20_000)))
    add("graph Laplacian, small world, 2e4", lambda: _sparse(_graph("small world", 20_000)))
    for n in (1000, 2500):
        for kind in ("smooth", "middling", "rough"):
            add(f"kernel, {kind}, {n}", lambda n=n, k=kind: kernel(n, k))
    add("low rank 50 + diagonal, 1e5", lambda: _low_rank(100_000, 50))
    add("low rank 500 + diagonal, 2e3", lambda: _low_rank(2000, 500))
    add("low rank 1500 + diagonal, 2e3", lambda: _low_rank(2000, 1500))
    add("Kronecker 40 x 50", lambda: ops.Kronecker(_spd(40, 0), _spd(50, 1)))
    add("Kronecker 20 x 20 x 20", lambda: ops.Kronecker(_spd(20, 0), _spd(20, 1), _spd(20, 2)))
    add("Kronecker sum 60 + 60", lambda: ops.KroneckerSum(_spd(60, 0), _spd(60, 1)))
    add("Kronecker 40 x 50 + shift", _shifted_kronecker)
    add("saddle, dense 400 + 100", lambda: _saddle_dense(400, 100))
    add("saddle, sparse 3600 + 300", lambda: _saddle_sparse(60, 300))
    add("saddle, sparse 40000 + 400", lambda: _saddle_sparse(200, 400))
    add("least squares, dense 2000 x 200", lambda: ops.Dense(_numbers(2000, 200)))
    add("least squares, dense 50000 x 100", lambda: ops.Dense(_numbers(50_000, 100)))
    add("least squares, condition 1e6, 2000 x 200", lambda: _graded(2000, 200, 6.0))
    add("least squares, sparse 20000 x 2000", lambda: ops.Sparse(_sparse_tall(20_000, 2000)))
    return cases


def others() -> list[SystemCase]:
    """Sixteen more of the same kinds, of other sizes: no constant was chosen by them."""
    found: dict[str, Callable[[], LinearOperator]] = {
        "Poisson 2D 50^2": lambda: _sparse(laplacian(50, 50)),
        "Poisson 2D 220^2": lambda: _sparse(laplacian(220, 220)),
        "Poisson 2D 500^2": lambda: _sparse(laplacian(500, 500)),
        "Poisson 3D 30^3": lambda: _sparse(laplacian(30, 30, 30)),
        "anisotropic 0.001 3D 25^3": lambda: _sparse(laplacian(25, 25, 25, weights=(1, 1, 1e-3))),
        "rough coefficients 3 2D 120^2": lambda: _sparse(rough(120, 3.0)),
        "convection 100 diffusion 2D 180^2": lambda: ops.Sparse(convection(180, 100.0)),
        "graph Laplacian, random 6-regular, 3e4": lambda: _sparse(_graph("regular", 30_000)),
        "graph Laplacian, geometric, 6e4": lambda: _sparse(_graph("geometric", 60_000)),
        "kernel, smooth, 1700": lambda: kernel(1700, "smooth"),
        "kernel, rough, 3000": lambda: kernel(3000, "rough"),
        "low rank 200 + diagonal, 2e4": lambda: _low_rank(20_000, 200),
        "Kronecker 15 x 25 x 30": lambda: ops.Kronecker(_spd(15, 0), _spd(25, 1), _spd(30, 2)),
        "saddle, sparse 10000 + 200": lambda: _saddle_sparse(100, 200),
        "least squares, dense 6000 x 300": lambda: ops.Dense(_numbers(6000, 300)),
        "least squares, sparse 40000 x 3000": lambda: ops.Sparse(_sparse_tall(40_000, 3000)),
    }
    return [SystemCase(name, build) for name, build in found.items()]


def laplacian(*sizes: int, weights: tuple[float, ...] | None = None) -> sp.csr_matrix:
    """``-1, 2, -1`` along each axis of a grid, times a weight for each."""
    total = sp.csr_matrix((int(np.prod(sizes)), int(np.prod(sizes))))
    for axis, size in enumerate(sizes):
        line = sp.diags([-1.0, 2.0, -1.0], [-1, 0, 1], shape=(size, size))
        before, after = int(np.prod(sizes[:axis])), int(np.prod(sizes[axis + 1 :]))
        term = sp.kron(sp.kron(sp.eye(before), line), sp.eye(after))
        total = total + (1.0 if weights is None else weights[axis]) * term
    return sp.csr_matrix(total)


def rough(n: int, sigma: float) -> sp.csr_matrix:
    """Diffusion on a grid with log-normal conductivities of the edges."""
    rng = np.random.default_rng(0)
    index = np.arange(n * n).reshape(n, n)
    pairs = [(index[1:].ravel(), index[:-1].ravel()), (index[:, 1:].ravel(), index[:, :-1].ravel())]
    i, j = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return _weighted(i, j, np.exp(sigma * rng.standard_normal(len(i))), n * n, shift=1e-3)


def convection(n: int, speed: float) -> sp.csr_matrix:
    """``-Lap u + v . grad u`` by upwind differences on the unit square, times h^2."""
    h = 1.0 / (n + 1)
    diffusion = laplacian(n, n)
    back = sp.diags([-1.0, 1.0], [-1, 0], shape=(n, n))
    eye = sp.eye(n)
    wind = speed * h * (sp.kron(back, eye) + 0.5 * sp.kron(eye, back))
    return sp.csr_matrix(diffusion + wind)


def kernel(n: int, kind: str) -> LinearOperator:
    """``K + 1e-3 I`` of n random points in the plane or in space; three rates of decay."""
    scale, dimension, order = {
        "smooth": (1.0, 2, "gaussian"),
        "middling": (0.5, 3, "matern"),
        "rough": (0.1, 3, "exponential"),
    }[kind]
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(n, dimension, generator=generator, dtype=torch.float64)
    r = torch.cdist(points, points) / scale
    K = {
        "gaussian": torch.exp(-r.square() / 2),
        "matern": (1 + 3**0.5 * r) * torch.exp(-(3**0.5) * r),
        "exponential": torch.exp(-r),
    }[order]
    # cdist is symmetric up to rounding only.
    K = (K + K.T) / 2 + 1e-3 * torch.eye(n, dtype=torch.float64)
    return ops.Dense(K, positive_definite=True)


def _sparse(matrix: sp.csr_matrix) -> LinearOperator:
    return ops.Sparse.from_scipy(matrix, symmetric=True)


def _weighted(i: np.ndarray, j: np.ndarray, w: np.ndarray, n: int, shift: float) -> sp.csr_matrix:
    W = sp.coo_matrix((np.r_[w, w], (np.r_[i, j], np.r_[j, i])), shape=(n, n)).tocsr()
    degrees = np.asarray(W.sum(1)).ravel()
    return sp.csr_matrix(sp.diags(degrees + shift) - W)


def _graph(kind: str, n: int) -> sp.csr_matrix:
    rng = np.random.default_rng(0)
    if kind == "regular":
        rounds = [(np.arange(n), rng.permutation(n)) for _ in range(3)]
        i, j = (np.concatenate(side) for side in zip(*rounds, strict=True))
    elif kind == "preferential":
        targets = np.zeros((n, 3), dtype=np.int64)
        ends = [0, 1, 2]
        for node in range(3, n):
            targets[node] = [ends[k] for k in rng.integers(len(ends), size=3)]
            ends += [node, *targets[node]]
        i, j = np.repeat(np.arange(3, n), 3), targets[3:].ravel()
    elif kind == "geometric":
        from scipy.spatial import cKDTree

        points = rng.random((n, 2))
        _, neighbours = cKDTree(points).query(points, k=7)
        i, j = np.repeat(np.arange(n), 6), neighbours[:, 1:].ravel()
    else:
        i = np.repeat(np.arange(n), 3)
        j = (i + np.tile([1, 2, 3], n)) % n
        moved = rng.random(len(j)) < 0.05
        j[moved] = rng.integers(n, size=int(moved.sum()))
    keep = i != j
    return _weighted(i[keep], j[keep], np.ones(int(keep.sum())), n, shift=1e-3)


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _spd(n: int, seed: int) -> LinearOperator:
    M = _numbers(n, n, seed=seed)
    return ops.Dense(M @ M.T / n + torch.eye(n, dtype=torch.float64), positive_definite=True)


def _low_rank(n: int, rank: int) -> LinearOperator:
    d = 0.1 + torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ops.LowRankPlusDiagonal(_numbers(rank, n), d)


def _shifted_kronecker() -> LinearOperator:
    return ops.Kronecker(_spd(40, 0), _spd(50, 1)) + 0.1 * ops.Identity(2000)


def _saddle_dense(n: int, m: int) -> LinearOperator:
    return ops.Saddle(_spd(n, 0), ops.Dense(_numbers(m, n, seed=1)))


def _saddle_sparse(grid: int, m: int) -> LinearOperator:
    n = grid * grid
    rng = np.random.default_rng(0)
    G = sp.random(m, n, density=10 / n, random_state=rng, format="csr")
    G = G + sp.csr_matrix((np.ones(m), (np.arange(m), np.arange(m) * (n // m))), shape=(m, n))
    return ops.Saddle(_sparse(laplacian(grid, grid)), ops.Sparse(sp.csr_matrix(G)))


def _graded(m: int, n: int, decades: float) -> LinearOperator:
    Q, _ = torch.linalg.qr(_numbers(m, n))
    V, _ = torch.linalg.qr(_numbers(n, n, seed=1))
    return ops.Dense(Q @ torch.diag(torch.logspace(0, -decades, n, dtype=torch.float64)) @ V)


def _sparse_tall(m: int, n: int) -> sp.csr_matrix:
    rng = np.random.default_rng(0)
    eye = sp.csr_matrix((np.ones(n), (np.arange(n), np.arange(n))), shape=(m, n))
    return sp.csr_matrix(sp.random(m, n, density=3 / n, random_state=rng) + eye)
