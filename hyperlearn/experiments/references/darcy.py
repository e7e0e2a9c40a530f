"""Darcy flow with a known permeability, the truth of an inverse problem.

    -div(a grad u) = 1   in (0, 1)^2,     u = 0   on the boundary,

    a = exp(s) + exp(-s),     s = sin(2 pi x) + sin(2 pi y) .

In terms of ``w = log a``: ``Lap u + grad w . grad u + exp(-w) = 0``. Source of the task: Chen et
al. (2021), arXiv:2103.12959.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hyperlearn.experiments.references import chebyshev
from hyperlearn.experiments.references.points import UNIT_SQUARE, coordinates

BOX = UNIT_SQUARE


def solution(x: Tensor, *, degree: int = 48) -> Tensor:
    """The pressure u, by Chebyshev collocation; max u is about 0.0244.

    Parameters
    ----------
    x
        Points ``(..., 2)``.
    degree
        Of the polynomial in each coordinate; at least 2.

    Returns
    -------
    Tensor
        ``(...)``.

    Raises
    ------
    ValueError
        The degree is too small.

    Notes
    -----
    a is smooth, but u is not: in the corners -a Lap u = 1 contradicts u = 0 along both sides, and
    u behaves like ``r^2 log r``. So the error falls algebraically, and fastest where nodes cluster,
    which they do in the corners: with degree 48 it is 1.5e-8 at worst, next to a corner, and
    2e-10 in the mean square.

    The first call of a degree n factorises a matrix of ``(n - 1)^2`` rows: ``2 n^6 / 3`` flops,
    half a second for 48.
    """
    first, second = coordinates(x)
    table = torch.from_numpy(_coefficients(degree)).to(x)
    p, q = (chebyshev.polynomials(c, degree, 0.0, 1.0) for c in (first, second))
    return ((p @ table) * q).sum(-1)


def permeability(x: Tensor) -> Tensor:
    """``a = exp(s) + exp(-s)``; points ``(..., 2)``, result ``(...)``."""
    s = _exponent(x)
    return torch.exp(s) + torch.exp(-s)


def log_permeability(x: Tensor) -> Tensor:
    """``w = log a``; points ``(..., 2)``, result ``(...)``."""
    return torch.log(permeability(x))


def source(x: Tensor) -> Tensor:
    """The constant 1; points ``(..., 2)``, result ``(...)``."""
    return torch.ones_like(coordinates(x)[0])


def _exponent(x: Tensor) -> Tensor:
    first, second = coordinates(x)
    return torch.sin(2 * math.pi * first) + torch.sin(2 * math.pi * second)


@lru_cache(maxsize=4)
def _coefficients(degree: int) -> chebyshev.Array:
    if degree < 2:
        raise ValueError(f"degree={degree}; expected at least 2")
    x = chebyshev.nodes(degree, 0.0, 1.0)
    derivative = chebyshev.differentiation_matrix(x)
    inner = slice(1, -1)
    first, second = derivative[inner, inner], (derivative @ derivative)[inner, inner]
    s = np.sin(2 * np.pi * x[inner, None]) + np.sin(2 * np.pi * x[None, inner])
    slope = 2 * np.pi * np.cos(2 * np.pi * x[inner])
    # grad w = tanh(s) grad s; rows are nodes (i, j), columns (k, l)
    n = degree - 1
    along_x = second[:, None, :] + (np.tanh(s) * slope[:, None])[:, :, None] * first[:, None, :]
    along_y = second[None, :, :] + (np.tanh(s) * slope[None, :])[:, :, None] * first[None, :, :]
    operator = np.zeros((n, n, n, n))
    index = np.arange(n)
    # The two index arrays move to the front: (j, i, k), then (i, j, l).
    operator[:, index, :, index] += along_x.transpose(1, 0, 2)
    operator[index, :, index, :] += along_y
    u = np.zeros((degree + 1, degree + 1))
    solved = np.linalg.solve(operator.reshape(n * n, n * n), -1 / (2 * np.cosh(s)).ravel())
    u[inner, inner] = solved.reshape(n, n)
    by_x = chebyshev.coefficients(u)
    return np.ascontiguousarray(chebyshev.coefficients(np.ascontiguousarray(by_x.T)).T)
