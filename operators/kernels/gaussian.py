"""Blocks of Gaussian kernels on lines and circles, coordinate by coordinate, with derivative."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

import torch
from torch import Tensor

from operators.kernels.differences import differences
from operators.kernels.functionals import Functionals
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
from operators.tracing import untransformed


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
    Its derivative is written out: by k it is another row of the tables, ``d/dk d^n e = -d^n (phi
    e)``.
    """
    p, q = _terms(left), _terms(right)
    tensors = (left.points, right.points, rates, *p.values(), *q.values())
    spec = (tuple(p), tuple(q))
    # Under a transform, also one of other tensors, torch takes no Function of this form.
    if untransformed(*tensors):
        value: Tensor = _GaussianPairs.apply(spec, tuple(circles), *tensors)
        return value
    return _value(spec, circles, *tensors)


def products(left: Functionals, right: Functionals) -> int:
    """How many derivatives of E the block is a sum of."""
    d = left.dimension
    return len({
        tuple(i + j for i, j in zip(a, b, strict=True))
        for a in _powers(left, d) for b in _powers(right, d)
    })  # fmt: skip


def _powers(L: Functionals, d: int) -> list[Powers]:
    found = [] if L.value is None else [(0,) * d]
    found += [unit(d, a, 1) for a in L.slopes]
    return found + [_both(d, a, b) for a, b in L.couplings]


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


def _value(
    spec: Spec, circles: Sequence[bool], x: Tensor, y: Tensor, rates: Tensor, *terms: Tensor
) -> Tensor:
    left, _ = spec
    factors = _factors(x, y, rates, circles, degrees(spec))
    groups = grouped(spec, terms[: len(left)], terms[len(left) :])
    return contracted(groups, [factor.table for factor in factors]) * _exponential(factors)


class _Factor:
    """``e = exp(-k phi(p))`` of one coordinate: ``phi, phi', ...`` and ``h_n = e^(n) / e``."""

    def __init__(self, p: Tensor, rate: Tensor, circle: bool, order: int) -> None:
        self.rate = rate
        self.phi: list[Tensor | float]
        if circle:
            # 1 - cos p would lose the digits of small angles.
            s = (0.5 * p).sin()
            square = s * s
            self.phi = [2 * square]
            if order:
                sin, cos = 2 * s * (0.5 * p).cos(), 1 - 2 * square
                self.phi += [sin, cos, -sin, -cos][:order]
                self.phi += self.phi[1 : order - 3]
        else:
            self.phi = [0.5 * p.square(), p, 1.0]
        slopes = [-rate * phi for phi in self.phi[1:]]
        # e' = -k phi' e, differentiated n times.
        self.table: list[Tensor | None] = [None]
        for n in range(order):
            self.table.append(_leibniz(slopes, self.table, n))

    def by_rate(self, n: int) -> Tensor:
        """``(d/dk d^n e) / e``."""
        return -_leibniz(self.phi, self.table, n)


def _leibniz(f: Sequence[Tensor | float], table: Sequence[Tensor | None], n: int) -> Tensor:
    """``(f e)^(n) / e`` of ``f, f', ...``; what is not listed is zero."""
    total: Any = None
    for k in range(min(n + 1, len(f))):
        h = table[n - k]
        term = comb(n, k) * (f[k] if h is None else f[k] * h)
        total = term if total is None else total + term
    assert total is not None
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


class _GaussianPairs(torch.autograd.Function):
    """`_value`, with its derivative by points, rates and coefficients."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, circles: tuple[bool, ...], *tensors: Tensor) -> Tensor:
        ctx.spec, ctx.circles = spec, circles
        ctx.save_for_backward(*tensors)
        return _value(spec, circles, *tensors)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        (W,) = outputs
        x, y, rates, *terms = ctx.saved_tensors
        need_x, need_y, need_rates, *need_terms = ctx.needs_input_grad[2:]
        spec, d = ctx.spec, x.shape[-1]
        p, q = terms[: len(spec[0])], terms[len(spec[0]) :]
        moving = need_x or need_y
        orders = [degree + moving for degree in degrees(spec)]
        factors = _factors(x, y, rates, ctx.circles, orders)
        tables: Tables = [factor.table for factor in factors]
        WE = W * _exponential(factors)
        blocks = coefficients(grouped(spec, p, q)) if moving or need_rates else {}
        found: list[Tensor | None] = [None, None, None]
        if moving:
            parts = [summed(blocks, tables, unit(d, a, 1)) * WE for a in range(d)]
            found[0] = torch.stack([part.sum(-1) for part in parts], -1)
            found[1] = -torch.stack([part.sum(-2) for part in parts], -1)
        if need_rates:
            found[2] = torch.stack([(_by_rate(blocks, factors, a) * WE).sum() for a in range(d)])
        of_terms: list[Tensor | None] = [None] * len(terms)
        if any(need_terms):
            of_terms = list(by_terms(spec, p, q, WE, tables))
        return None, None, *found, *of_terms


def _by_rate(blocks: dict[Powers, Tensor], factors: Sequence[_Factor], axis: int) -> Tensor:
    """``sum_c C_c prod_i h_{c_i}`` with the derivative by a rate in place of one factor."""
    used = {powers[axis] for powers in blocks}
    tables: list[Any] = [factor.table for factor in factors]
    tables[axis] = {n: factors[axis].by_rate(n) for n in used}
    return summed(blocks, tables, (0,) * len(factors))
