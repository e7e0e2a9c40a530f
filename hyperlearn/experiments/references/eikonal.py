"""The regularised eikonal equation in a square.

    |grad u|^2 = 1 + eps Lap u   in (0, 1)^2,     u = 0   on the boundary.

u tends to the distance from the boundary as eps -> 0. With ``u = -eps log v`` it is linear,
``v = eps^2 Lap v``, v = 1 on the boundary. Source of the task: Chen et al. (2021),
arXiv:2103.12959, with eps = 0.1; eps = 0.01 is the hard case.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperlearn.experiments.references.points import UNIT_SQUARE, in_slabs

BOX = UNIT_SQUARE
_SPLIT = 201  # first odd wave number that belongs to the tail
_ORDER = 9  # Gregory's end correction
_DOUBLINGS, _NODES = 19, 20  # panels of the tail's integral and Gauss nodes in each
_ROWS = 1024


def solution(x: Tensor, *, eps: float = 0.01) -> Tensor:
    """``u = -eps log v`` to about 1e-14 in the closed square, its corners included.

    Parameters
    ----------
    x
        Points ``(..., 2)`` of the closed unit square.
    eps
        Positive.

    Returns
    -------
    Tensor
        ``(...)``; exactly 0 on the boundary.

    Raises
    ------
    ValueError
        `eps` is not positive.

    Notes
    -----
    By symmetry let ``0 <= y <= x <= 1/2``. Separation of variables gives v as two sine series,
    both of which converge slowly near the boundary. The one that oscillates along the nearer side
    sums, but for terms of order ``m^-3``, to the solution between two parallel sides,
    ``c(y) = cosh((y - 1/2) / eps) / cosh(1 / (2 eps))``. With it taken out,

        v = c(y) + sum_{m = 1, 3, ...} a_m cosh(g_m (x - 1/2)) / cosh(g_m / 2) sin(m pi y) ,

        g_m^2 = (m pi)^2 + eps^-2 ,     a_m = 4 / (m pi (eps g_m)^2) .

    The terms now decay like ``m^-3 exp(-m pi x)``. What decay is left fails only in the corners,
    where Lap v jumps; there the terms vary slowly with m, and the sum from m = 201 on is half the
    integral over m with Gregory's end correction, by Gauss-Legendre in log m over 19 doublings.
    All terms of the sum together are positive and, since ``g_m x > y / eps``, of order c(y): their
    ratio is formed from differences of exponents and u through log1p, so nothing underflows or
    cancels where v is ``exp(-50)``.

    Costs about 500 evaluations of exp and sin a point.

    Examples
    --------
    >>> x = torch.tensor([[0.5, 0.5], [0.25, 0.4], [0.0, 0.7]], dtype=torch.float64)
    >>> torch.set_printoptions(precision=10)
    >>> solution(x, eps=0.1)
    tensor([0.3677169787, 0.2331048974, 0.0000000000], dtype=torch.float64)
    >>> torch.set_printoptions(profile="default")
    """
    if not eps > 0:
        raise ValueError(f"eps={eps}; expected a positive number")
    m, weight = (torch.from_numpy(table).to(x) for table in _wave_numbers())
    k = math.pi * m
    g = torch.sqrt(k**2 + eps**-2)
    coefficient = weight * 4 / (k * (1 + (eps * k) ** 2) * (1 + torch.exp(-g)))

    def value(first: Tensor, second: Tensor) -> Tensor:
        first = torch.where(first > 0.5, 1 - first, first)
        second = torch.where(second > 0.5, 1 - second, second)
        # Not minimum and maximum: their second derivatives are wrong where the two are equal.
        swapped = first < second
        far = torch.where(swapped, second, first)[:, None]
        near = torch.where(swapped, first, second)
        decay = torch.exp(near[:, None] / eps - g * far) * (1 + torch.exp(-g * (1 - 2 * far)))
        series = (decay * torch.sin(k * near[:, None])) @ coefficient
        # Both the series and c(y) are divided by exp(-y / eps).
        log_c = torch.log1p(torch.exp((2 * near - 1) / eps)) - math.log1p(math.exp(-1 / eps))
        return near - eps * (log_c + torch.log1p(series * torch.exp(-log_c)))

    return in_slabs(value, x, _ROWS)


@cache
def _wave_numbers() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes m and weights w with ``sum_{m odd} f(m) = sum w f(m)``, f smooth beyond m = 201."""
    direct = np.arange(1, _SPLIT, 2, dtype=float)
    # With the shift by 2 as 1 + D, sum - integral / 2 = 1 / log(1 + D) - 1 / D: the coefficients
    # of D^0, D^1, ... are Gregory's 1/2, -1/12, 1/24, ...
    gregory = [1.0]
    for n in range(1, _ORDER + 1):
        gregory.append(-sum((-1) ** j / (j + 1) * gregory[n - j] for j in range(1, n + 1)))
    correction = np.zeros(_ORDER)
    for n, factor in enumerate(gregory[1:]):
        for j in range(n + 1):
            correction[j] += factor * (-1) ** (n - j) * math.comb(n, j)
    start = _SPLIT + 2 * np.arange(_ORDER, dtype=float)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    panel = (np.arange(_DOUBLINGS)[:, None] + (nodes + 1) / 2) * math.log(2)
    tail = _SPLIT * np.exp(panel).ravel()
    integral = np.tile(weights * math.log(2) / 2, _DOUBLINGS) * tail / 2
    return (
        np.concatenate([direct, start, tail]),
        np.concatenate([np.ones_like(direct), correction, integral]),
    )
