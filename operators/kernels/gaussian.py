"""Blocks of Gaussian kernels on lines and circles, coordinate by coordinate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from math import comb

import torch
from torch import Tensor

from operators.kernels.differences import differences
from operators.kernels.functionals import Functionals
from operators.kernels.separable import Powers, contracted, degrees, grouped, unit


def gaussian_pairs(
    left: Functionals, right: Functionals, rates: Tensor, circles: Sequence[bool]
) -> Tensor:
    """``L_i M_j E``, ``(..., n, m)``, of ``E = prod_a exp(-k_a phi_a(x_a - y_a))``.

    ``phi = p^2 / 2`` on a line; on a circle, of angles, ``phi = 1 - cos p = 2 sin^2(p / 2)``.

    Parameters
    ----------
    left, right
        At x ``(..., n, d)`` and y ``(..., m, d)``.
    rates
        ``k``, ``(d,)``.
    circles
        Which coordinates are angles.

    Notes
    -----
    Differentiated as it is written: a derivative that is written out takes as long (0.9 to 1.0).
    """
    p, q = _terms(left), _terms(right)
    spec = (tuple(p), tuple(q))
    exponent, tables = None, []
    each = zip(differences(left.points, right.points), rates, circles, degrees(spec), strict=True)
    for coordinate in each:
        own, table = _factor(*coordinate)
        exponent = own if exponent is None else exponent + own
        tables.append(table)
    assert exponent is not None
    return contracted(grouped(spec, list(p.values()), list(q.values())), tables) * (-exponent).exp()


def _both(d: int, a: int, b: int) -> Powers:
    return tuple((i == a) + (i == b) for i in range(d))


def _terms(L: Functionals) -> dict[Powers, Tensor]:
    """Coefficients by derivative."""
    d, found = L.dimension, {}
    if L.value is not None:
        found[(0,) * d] = L.value
    if L.gradient is not None:
        for a in L.slopes:
            found[unit(d, a, 1)] = L.gradient[..., a]
    second = L.second()
    if second is not None:
        for a, b in L.couplings:
            found[_both(d, a, b)] = second[..., a, b] * (1 if a == b else 2)
    return found or {(0,) * d: torch.zeros_like(L.points[..., 0])}


def _factor(
    p: Tensor, rate: Tensor, circle: bool, order: int
) -> tuple[Tensor, list[Tensor | None]]:
    """``k phi(p)`` of ``e = exp(-k phi)``, and ``h_n = e^(n) / e``."""
    if circle:
        # 1 - cos p would lose the digits of small angles.
        s = (0.5 * p).sin()
        square = s * s
        phi = [2 * square]
        if order:
            sin, cos = 2 * s * (0.5 * p).cos(), 1 - 2 * square
            phi += islice(cycle([sin, cos, -sin, -cos]), order)
    else:
        phi = [0.5 * p.square(), p, p.new_ones(())]
    # e' = -k phi' e, differentiated n times.
    slopes = [-rate * one for one in phi[1:]]
    table: list[Tensor | None] = [None]
    for n in range(order):
        table.append(_leibniz(slopes, table, n))
    return rate * phi[0], table


def _leibniz(f: Sequence[Tensor], table: Sequence[Tensor | None], n: int) -> Tensor:
    """``(f e)^(n) / e`` of ``f, f', ...``; what is not listed is zero."""
    h = table[n]
    total = f[0] if h is None else f[0] * h
    for k in range(1, min(n + 1, len(f))):
        h = table[n - k]  # None, for ones, where k = n
        total = total + f[k] if h is None else torch.addcmul(total, f[k], h, value=comb(n, k))
    return total
