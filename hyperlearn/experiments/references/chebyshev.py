"""Chebyshev nodes, derivatives at them, and sums of Chebyshev polynomials at any points."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def nodes(degree: int, lower: float, upper: float) -> Array:
    """The ``degree + 1`` Chebyshev-Lobatto nodes of an interval, ascending, ends included.

    Raises
    ------
    ValueError
        The degree is not positive.
    """
    if degree < 1:
        raise ValueError(f"degree={degree}; expected at least 1")
    # As a sine, they are symmetric to the last bit.
    unit = np.sin(np.pi * np.arange(-degree, degree + 1, 2) / (2 * degree))
    scaled: Array = lower + (upper - lower) * (1 + unit) / 2
    return scaled


def differentiation_matrix(x: Array) -> Array:
    """D with ``(D p(x))_i = p'(x_i)`` for polynomials of the nodes' degree, ``(n, n)``.

    ``D_ij = (w_j / w_i) / (x_i - x_j)`` with the Lobatto nodes' barycentric weights w, and rows
    that sum to zero. Berrut and Trefethen (2004), SIAM Review 46(3), sections 5.3 and 9.3.
    """
    weight = (-1.0) ** np.arange(len(x))
    weight[[0, -1]] /= 2
    difference = x[:, None] - x + np.eye(len(x))
    matrix: Array = weight / weight[:, None] / difference
    np.fill_diagonal(matrix, 0.0)
    np.fill_diagonal(matrix, -matrix.sum(axis=1))
    return matrix


def coefficients(values: Array) -> Array:
    """Chebyshev coefficients of the interpolant, along the first axis, of values at `nodes`."""
    degree = len(values) - 1
    table = np.polynomial.chebyshev.chebvander(nodes(degree, -1.0, 1.0), degree)
    solved = np.linalg.solve(table, values.reshape(degree + 1, -1)).reshape(values.shape)
    return np.asarray(solved, dtype=np.float64)


def polynomials(x: Tensor, degree: int, lower: float, upper: float) -> Tensor:
    """``T_0 .. T_degree`` of the interval at points ``(...)``, as ``(..., degree + 1)``.

    By the three-term recurrence, whose derivatives, unlike those of ``cos(k arccos x)``, are right
    at the ends.

    Examples
    --------
    >>> polynomials(torch.tensor([1.0, 0.5], dtype=torch.float64), 2, 0.0, 1.0).tolist()
    [[1.0, 1.0, 1.0], [1.0, 0.0, -1.0]]
    """
    unit = (2 * x - (lower + upper)) / (upper - lower)
    table = [torch.ones_like(unit), unit]
    for _ in range(degree - 1):
        table.append(2 * unit * table[-1] - table[-2])
    return torch.stack(table[: degree + 1], dim=-1)
