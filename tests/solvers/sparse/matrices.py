"""Sparse matrices that the tests of this folder share."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

import operators as ops

FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def poisson(*sizes: int, dtype: torch.dtype = FLOAT64) -> ops.Sparse:
    """``-1, 2, -1`` along each axis of a grid, symmetric."""
    total: Any = None
    for size in sizes:
        line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(size, size))
        total = line if total is None else scipy.sparse.kronsum(line, total)
    return ops.Sparse.from_scipy(total, dtype, symmetric=True)


def random_spd(n: int, seed: int, shift: float = 0.5) -> ops.Sparse:
    """A graph with random weights; diagonally dominant by `shift`."""
    rng = np.random.default_rng(seed)
    edges = np.triu(rng.random((n, n)) < 3 / max(n, 1), 1)
    weights = np.where(edges, rng.standard_normal((n, n)), 0.0)
    weights = weights + weights.T
    matrix = weights + np.diag(np.abs(weights).sum(1) + shift)
    return ops.Sparse.from_scipy(scipy.sparse.csr_array(matrix), symmetric=True)


def random_square(n: int, seed: int) -> ops.Sparse:
    """Far from symmetric, and not singular."""
    rng = np.random.default_rng(seed)
    matrix = np.where(rng.random((n, n)) < 3 / n, rng.standard_normal((n, n)), 0.0)
    matrix += np.diag(np.abs(matrix).sum(1) + 0.5)
    order = rng.permutation(n)
    return ops.Sparse.from_scipy(scipy.sparse.csr_array(matrix[order]))


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    """Equal relative to the size of the whole, not of each entry."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.linalg.vector_norm(actual - expected) <= rtol * torch.linalg.vector_norm(expected)
