"""Blocks of Gaussian kernels on lines and circles, coordinate by coordinate, with derivative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from math import comb
from typing import Any

import torch
from torch import Tensor

from operators.kernels.differences import differences
from operators.kernels.functionals import Functionals
from operators.kernels.pullback import block_of
from operators.kernels.separable import (
    Powers,
    Spec,
    Tables,
    by_terms,
    coefficients,
    contracted,
    degrees,
    grouped,
    summed,
    unit,
)


def gaussian_pairs(
    left: Functionals,
    right: Functionals,
    rates: Tensor,
    circles: Sequence[bool],
    W: Tensor | None = None,
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
    W
        Weights ``(..., n, m)``: see `block_of`.

    Notes
    -----
    Its derivative is written out: by k it is another row of the tables, ``d/dk d^n e = -d^n (phi
    e)``.
    """
    p, q = _terms(left), _terms(right)
    rule = _Gaussian((tuple(p), tuple(q)), tuple(circles))
    return block_of(rule, (left.points, right.points, rates, *p.values(), *q.values()), W)


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


class _Factor:
    """``e = exp(-k phi(p))`` of one coordinate: ``phi, phi', ...`` and ``h_n = e^(n) / e``."""

    def __init__(self, p: Tensor, rate: Tensor, circle: bool, order: int) -> None:
        self.rate = rate
        self.phi: list[Tensor]
        if circle:
            # 1 - cos p would lose the digits of small angles.
            s = (0.5 * p).sin()
            square = s * s
            self.phi = [2 * square]
            if order:
                sin, cos = 2 * s * (0.5 * p).cos(), 1 - 2 * square
                self.phi += list(islice(cycle([sin, cos, -sin, -cos]), order))
        else:
            self.phi = [0.5 * p.square(), p, p.new_ones(())]
        slopes = [-rate * phi for phi in self.phi[1:]]
        # e' = -k phi' e, differentiated n times.
        self.table: list[Tensor | None] = [None]
        for n in range(order):
            self.table.append(_leibniz(slopes, self.table, n))

    def by_rate(self, n: int) -> Tensor:
        """``(d/dk d^n e) / e``."""
        return -_leibniz(self.phi, self.table, n)


def _leibniz(f: Sequence[Tensor], table: Sequence[Tensor | None], n: int) -> Tensor:
    """``(f e)^(n) / e`` of ``f, f', ...``; what is not listed is zero."""
    h = table[n]
    total = f[0] if h is None else f[0] * h
    for k in range(1, min(n + 1, len(f))):
        h = table[n - k]  # None, for ones, where k = n
        total = total + f[k] if h is None else torch.addcmul(total, f[k], h, value=comb(n, k))
    return total


def _factors(
    x: Tensor, y: Tensor, rates: Tensor, circles: Sequence[bool], orders: Sequence[int]
) -> list[_Factor]:
    each = zip(differences(x, y), rates.unbind(), circles, orders, strict=True)
    return [_Factor(p, rate, circle, order) for p, rate, circle, order in each]


def _exponential(factors: Sequence[_Factor]) -> Tensor:
    exponent = -factors[0].rate * factors[0].phi[0]
    for factor in factors[1:]:
        exponent = torch.addcmul(exponent, factor.rate, factor.phi[0], value=-1)
    return exponent.exp()


@dataclass(frozen=True)
class _Gaussian:
    """The block as a function of points, rates and coefficients."""

    spec: Spec
    circles: tuple[bool, ...]

    def value(self, *tensors: Tensor) -> Tensor:
        x, y, rates, *terms = tensors
        count = len(self.spec[0])
        factors = _factors(x, y, rates, self.circles, degrees(self.spec))
        groups = grouped(self.spec, terms[:count], terms[count:])
        return contracted(groups, [factor.table for factor in factors]) * _exponential(factors)

    def pulled_back(
        self, W: Tensor, needed: Sequence[bool], *tensors: Tensor
    ) -> list[Tensor | None]:
        x, y, rates, *terms = tensors
        need_x, need_y, need_rates, *need_terms = needed
        d, count = x.shape[-1], len(self.spec[0])
        p, q = terms[:count], terms[count:]
        moving = need_x or need_y
        orders = [degree + moving for degree in degrees(self.spec)]
        factors = _factors(x, y, rates, self.circles, orders)
        tables: Tables = [factor.table for factor in factors]
        WE = W * _exponential(factors)
        C = coefficients(grouped(self.spec, p, q)) if moving or need_rates else {}
        found: list[Tensor | None] = [None, None, None]
        if moving:
            parts = [summed(C, tables, unit(d, a, 1)) * WE for a in range(d)]
            found[0] = torch.stack([part.sum(-1) for part in parts], -1)
            found[1] = -torch.stack([part.sum(-2) for part in parts], -1)
        if need_rates:
            found[2] = torch.stack([(_by_rate(C, factors, a) * WE).sum() for a in range(d)])
        of_terms: list[Tensor | None] = [None] * len(terms)
        if any(need_terms):
            of_terms = list(by_terms(self.spec, p, q, WE, tables))
        return [*found, *of_terms]


def _by_rate(blocks: dict[Powers, Tensor], factors: Sequence[_Factor], axis: int) -> Tensor:
    """``sum_c C_c prod_i h_{c_i}`` with the derivative by a rate in place of one factor."""
    used = {powers[axis] for powers in blocks}
    tables: list[Any] = [factor.table for factor in factors]
    tables[axis] = {n: factors[axis].by_rate(n) for n in used}
    return summed(blocks, tables, (0,) * len(factors))
