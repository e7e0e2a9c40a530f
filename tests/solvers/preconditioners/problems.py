"""Matrices of differential operators, kernels and least squares, to try preconditioners on."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

import operators as ops


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def line(side: int) -> Any:
    return sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(side, side))


def kron_sum(parts: list[Any]) -> Any:
    def add(A: Any, B: Any) -> Any:
        return sp.kron(A, sp.eye_array(B.shape[0])) + sp.kron(sp.eye_array(A.shape[0]), B)

    return sp.csr_array(reduce(add, parts))


def poisson(*sides: int, dtype: torch.dtype = torch.float64) -> ops.Sparse:
    """Five or seven points, unit spacing."""
    matrix = kron_sum([line(side) for side in sides])
    return ops.Sparse.from_scipy(matrix, dtype, symmetric=True, positive_definite=True)


def convection(*sides: int, wind: float = 0.7, dtype: torch.dtype = torch.float64) -> ops.Sparse:
    """Laplacian and upwind differences: not symmetric, diagonally dominant."""
    parts = [
        line(side) + wind * sp.diags_array([-1.0, 1.0], offsets=[-1, 0], shape=(side, side))
        for side in sides
    ]
    return ops.Sparse.from_scipy(kron_sum(parts), dtype)


def rough(side: int, roughness: float, seed: int = 0) -> ops.Sparse:
    """Graph Laplacian of a grid with weights ``exp(roughness g)``, grounded at its border."""
    index = np.arange(side * side).reshape(side, side)
    tails = np.concatenate([index[:, :-1].ravel(), index[:-1].ravel()])
    heads = np.concatenate([index[:, 1:].ravel(), index[1:].ravel()])
    weights = np.exp(roughness * np.random.default_rng(seed).standard_normal(len(tails)))
    n = side * side
    adjacency = sp.coo_array((weights, (tails, heads)), shape=(n, n))
    adjacency = sp.csr_array(adjacency + adjacency.T)
    border = 4.0 - np.asarray((adjacency != 0).sum(1)).ravel()
    degree = np.asarray(adjacency.sum(1)).ravel() + border
    matrix = sp.csr_array(sp.diags_array(degree) - adjacency)
    return ops.Sparse(matrix, symmetric=True, positive_definite=True)


def kernel(n: int, length: float, seed: int = 0) -> Tensor:
    """Gaussian kernel matrix of points in a plane."""
    points = sampled(n, 2, seed=seed)
    K = torch.exp(-(torch.cdist(points, points) ** 2) / (2 * length**2))
    return (K + K.T) / 2


def condition(P: Tensor, A: Tensor) -> float:
    """Condition number of ``P^1/2 A P^1/2``."""
    root = torch.linalg.cholesky(P)
    values = torch.linalg.eigvalsh(root.T @ A @ root)
    return float(values[-1] / values[0])
