"""Polynomials in derivatives of the heat kernel, at all pairs of points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.kernels.differences import differences
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


def heat_pairs(
    x: Tensor,
    y: Tensor,
    A: Tensor,
    B: Tensor,
    left: dict[Powers, Tensor],
    right: dict[Powers, Tensor],
    W: Tensor | None = None,
) -> Tensor:
    """``sum_ab p_a(x) q_b(y) d_x^a d_y^b E``, E the heat kernel.

    ``E = prod_i c_i^(-1/2) exp(-(x_i - y_i)^2 / c_i)`` with ``c_i = A_i(x) + B_i(y)``; its
    derivatives are Hermite functions.

    Parameters
    ----------
    x, y
        Points ``(..., n, d)``, ``(..., m, d)``.
    A, B
        ``(..., n, k)``, ``(..., m, k)`` with k = d, or k = 1 for one c of all coordinates.
    left, right
        ``p_a (..., n)`` and ``q_b (..., m)`` by their powers.
    W
        Weights ``(..., n, m)``: see `block_of`.

    Returns
    -------
    Tensor
        ``(..., n, m)``; with weights a number.

    Notes
    -----
    Its derivative is written out, with ``d E / d c_i = (1/4) d_i^2 E``: another row of the same
    tables. A Gram matrix and its derivative take 0.75 to 0.8 of what they take by automatic
    differentiation of each elementwise step.
    """
    rule = _Heat((tuple(left), tuple(right)))
    return block_of(rule, (x, y, A, B, *left.values(), *right.values()), W)


def _tables(
    x: Tensor, y: Tensor, A: Tensor, B: Tensor, orders: Sequence[int]
) -> tuple[Tensor, Tables]:
    """E, and ``h_n`` with ``d_i^n E = h_n E``.

    ``h_{n+1} = v h_n + n u h_{n-1}``, with ``u = -2 / c`` and ``v = u p``.
    """
    d, k = x.shape[-1], A.shape[-1]
    tables: list[list[Tensor | None]] = []
    exponent, volume, u = None, None, A
    sums = differences(A, -B)
    for i, p in enumerate(differences(x, y)):
        if i < k:
            c = sums[i]
            u = -2 / c
            volume = c if volume is None else volume * c
        v = u * p
        exponent = v * p if exponent is None else torch.addcmul(exponent, v, p)
        table: list[Tensor | None] = [None, v]
        for n in range(1, orders[i]):
            before, h = table[n - 1], table[n]
            assert h is not None
            lower = u if before is None else u * before
            table.append(torch.add(v * h, lower, alpha=n))
        tables.append(table)
    assert exponent is not None
    assert volume is not None
    return (0.5 * exponent).exp() * (volume.rsqrt() if k == d else volume ** (-d / 2)), tables


@dataclass(frozen=True)
class _Heat:
    """The block as a function of points, squares and coefficients."""

    spec: Spec

    def value(self, *tensors: Tensor) -> Tensor:
        x, y, A, B, *terms = tensors
        count = len(self.spec[0])
        E, tables = _tables(x, y, A, B, degrees(self.spec))
        return contracted(grouped(self.spec, terms[:count], terms[count:]), tables) * E

    def pulled_back(
        self, W: Tensor, needed: Sequence[bool], *tensors: Tensor
    ) -> list[Tensor | None]:
        x, y, A, B, *terms = tensors
        count = len(self.spec[0])
        p, q = terms[:count], terms[count:]
        need_x, need_y, need_A, need_B, *need_terms = needed
        d, k = x.shape[-1], A.shape[-1]
        further = 2 if need_A or need_B else 1 if need_x or need_y else 0
        E, tables = _tables(x, y, A, B, [degree + further for degree in degrees(self.spec)])
        WE = W * E
        found: list[Tensor | None] = [None, None, None, None]
        if further:
            C = coefficients(grouped(self.spec, p, q))
            if need_A or need_B:
                # d E / d c_i = d_i^2 E / 4
                parts = [summed(C, tables, unit(d, i, 2)) * WE for i in range(d)]
                if k == 1:
                    parts = [sum(parts[1:], parts[0])]
                found[2] = 0.25 * torch.stack([part.sum(-1) for part in parts], -1)
                found[3] = 0.25 * torch.stack([part.sum(-2) for part in parts], -1)
            if need_x or need_y:
                parts = [summed(C, tables, unit(d, i, 1)) * WE for i in range(d)]
                found[0] = torch.stack([part.sum(-1) for part in parts], -1)
                found[1] = -torch.stack([part.sum(-2) for part in parts], -1)
        of_terms: list[Tensor | None] = [None] * len(terms)
        if any(need_terms):
            of_terms = list(by_terms(self.spec, p, q, WE, tables))
        return [*found, *of_terms]
