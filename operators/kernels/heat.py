"""Polynomials in derivatives of the heat kernel, at all pairs of points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from operators.kernels.differences import differences
from operators.tracing import untransformed

# How often each coordinate is differentiated.
Powers = tuple[int, ...]
# For each derivative: the columns and rows whose outer products add up to its coefficient.
Groups = dict[Powers, tuple[list[Tensor], list[Tensor]]]
# For each coordinate: h_0 (None, for ones), h_1, h_2, ...
Tables = list[list[Tensor | None]]


def heat_pairs(
    x: Tensor,
    y: Tensor,
    A: Tensor,
    B: Tensor,
    left: dict[Powers, Tensor],
    right: dict[Powers, Tensor],
) -> Tensor:
    """``sum_ab p_a(x) q_b(y) d_x^a d_y^b E``, E the heat kernel.

    ``E = prod_i c_i^(-1/2) exp(-(x_i - y_i)^2 / c_i)`` with
    ``c_i = A_i(x) + B_i(y)``. Since E depends on x - y, ``d_y = -d_x``, and the coefficient of each
    derivative of E is a matrix of low rank; the derivatives are Hermite functions.

    Parameters
    ----------
    x, y
        Points ``(..., n, d)``, ``(..., m, d)``.
    A, B
        ``(..., n, k)``, ``(..., m, k)`` with k = d, or k = 1 for one c of all coordinates.
    left, right
        ``p_a (..., n)`` and ``q_b (..., m)`` by their powers.

    Returns
    -------
    Tensor
        ``(..., n, m)``.

    Notes
    -----
    Its derivative is written out, with ``d E / d c_i = (1/4) d_i^2 E``: another row of the same
    tables, at a third of what automatic differentiation of each elementwise step takes.
    """
    tensors = (x, y, A, B, *left.values(), *right.values())
    spec = (tuple(left), tuple(right))
    # Under a transform, also one of other tensors, torch takes no Function of this form.
    if untransformed(*tensors):
        value: Tensor = _HeatPairs.apply(spec, *tensors)
        return value
    return _value(spec, *tensors)


Spec = tuple[tuple[Powers, ...], tuple[Powers, ...]]


def _value(spec: Spec, x: Tensor, y: Tensor, A: Tensor, B: Tensor, *terms: Tensor) -> Tensor:
    left, _ = spec
    E, tables = _tables(x, y, A, B, _degrees(spec))
    return _contracted(_grouped(spec, terms[: len(left)], terms[len(left) :]), tables) * E


def _degrees(spec: Spec) -> list[int]:
    left, right = spec
    return [max(a[i] for a in left) + max(b[i] for b in right) for i in range(len(left[0]))]


def _tables(
    x: Tensor, y: Tensor, A: Tensor, B: Tensor, degrees: Sequence[int]
) -> tuple[Tensor, Tables]:
    """E, and ``h_n`` with ``d_i^n E = h_n E``.

    ``h_{n+1} = v h_n + n u h_{n-1}``, with ``u = -2 / c`` and ``v = u p``.
    """
    d, k = x.shape[-1], A.shape[-1]
    tables: Tables = []
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
        for n in range(1, degrees[i]):
            before, h = table[n - 1], table[n]
            assert h is not None
            lower = u if before is None else u * before
            table.append(torch.add(v * h, lower, alpha=n))
        tables.append(table)
    assert exponent is not None
    assert volume is not None
    return (0.5 * exponent).exp() * (volume.rsqrt() if k == d else volume ** (-d / 2)), tables


def _grouped(spec: Spec, p: Sequence[Tensor], q: Sequence[Tensor]) -> Groups:
    """``sum_{a + b = c} p_a q_b (-1)^|b|`` for each c; by y the sign turns."""
    left, right = spec
    groups: Groups = {}
    signed = [-one if sum(b) % 2 else one for b, one in zip(right, q, strict=True)]
    for a, column in zip(left, p, strict=True):
        for b, row in zip(right, signed, strict=True):
            both = groups.setdefault(_plus(a, b), ([], []))
            both[0].append(column)
            both[1].append(row)
    return groups


def _plus(a: Powers, b: Powers) -> Powers:
    return tuple(i + j for i, j in zip(a, b, strict=True))


def _coefficients(groups: Groups) -> dict[Powers, Tensor]:
    return {
        powers: torch.stack(columns, -1) @ torch.stack(rows, -2)
        for powers, (columns, rows) in groups.items()
    }


def _contracted(groups: Groups, tables: Tables) -> Tensor:
    return _summed(_coefficients(groups), tables, (0,) * len(tables))


def _summed(coefficients: dict[Powers, Tensor], tables: Tables, shift: Powers) -> Tensor:
    """``sum_c C_c prod_i h_{c_i + shift_i}``, nested over the coordinates."""
    if not tables:
        (only,) = coefficients.values()
        return only
    inner: dict[int, dict[Powers, Tensor]] = {}
    for powers, block in coefficients.items():
        inner.setdefault(powers[-1], {})[powers[:-1]] = block
    total: Tensor | None = None
    for n, rest in inner.items():
        block, h = _summed(rest, tables[:-1], shift[:-1]), tables[-1][n + shift[-1]]
        if h is not None and total is not None:
            total = torch.addcmul(total, block, h)
        else:
            term = block if h is None else block * h
            total = term if total is None else total + term
    assert total is not None
    return total


class _HeatPairs(torch.autograd.Function):
    """`_value`, with its derivative by points, squares and coefficients."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, *tensors: Tensor) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(*tensors)
        return _value(spec, *tensors)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        (W,) = outputs
        x, y, A, B, *terms = ctx.saved_tensors
        left, _ = ctx.spec
        p, q = terms[: len(left)], terms[len(left) :]
        need_x, need_y, need_A, need_B, *need_terms = ctx.needs_input_grad[1:]
        d, k = x.shape[-1], A.shape[-1]
        further = 2 if need_A or need_B else 1 if need_x or need_y else 0
        E, tables = _tables(x, y, A, B, [degree + further for degree in _degrees(ctx.spec)])
        WE = W * E
        groups = _grouped(ctx.spec, p, q)
        found: list[Tensor | None] = [None, None, None, None]
        if further:
            coefficients = _coefficients(groups)
            if need_A or need_B:
                # d E / d c_i = d_i^2 E / 4
                parts = [_summed(coefficients, tables, _unit(d, i, 2)) * WE for i in range(d)]
                if k == 1:
                    parts = [sum(parts[1:], parts[0])]
                found[2] = 0.25 * torch.stack([part.sum(-1) for part in parts], -1)
                found[3] = 0.25 * torch.stack([part.sum(-2) for part in parts], -1)
            if need_x or need_y:
                parts = [_summed(coefficients, tables, _unit(d, i, 1)) * WE for i in range(d)]
                found[0] = torch.stack([part.sum(-1) for part in parts], -1)
                found[1] = -torch.stack([part.sum(-2) for part in parts], -1)
        by_terms: list[Tensor | None] = [None] * len(terms)
        if any(need_terms):
            by_terms = list(_by_terms(ctx.spec, p, q, WE, tables))
        return None, *found, *by_terms


def _unit(d: int, axis: int, order: int) -> Powers:
    return tuple(order if i == axis else 0 for i in range(d))


def _by_terms(
    spec: Spec, p: Sequence[Tensor], q: Sequence[Tensor], WE: Tensor, tables: Tables
) -> list[Tensor]:
    """``dp_a = sum_b (-1)^|b| D q_b``, ``dq_b = (-1)^|b| sum_a D^T p_a``, ``D = W d^(a+b) E``."""
    left, right = spec
    pairs: dict[Powers, list[tuple[int, int]]] = {}
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            pairs.setdefault(_plus(a, b), []).append((i, j))
    signs = [-1.0 if sum(b) % 2 else 1.0 for b in right]
    signed = [sign * one for sign, one in zip(signs, q, strict=True)]
    by_left: list[Tensor | None] = [None] * len(left)
    by_right: list[Tensor | None] = [None] * len(right)
    # W E times the factors of the leading coordinates, each product once.
    partial: dict[Powers, Tensor] = {(): WE}

    def weighted(powers: Powers) -> Tensor:
        if powers not in partial:
            block, h = weighted(powers[:-1]), tables[len(powers) - 1][powers[-1]]
            partial[powers] = block if h is None else block * h
        return partial[powers]

    for powers in sorted(pairs):
        M = weighted(powers)
        which = pairs[powers]
        rows = M @ torch.stack([signed[j] for _, j in which], -1)
        columns = M.mT @ torch.stack([p[i] for i, _ in which], -1)
        for k, (i, j) in enumerate(which):
            row, column = rows[..., k], signs[j] * columns[..., k]
            before, above = by_left[i], by_right[j]
            by_left[i] = row if before is None else before + row
            by_right[j] = column if above is None else above + column
        if len(powers) == len(tables):
            partial.pop(powers, None)
    return [part for part in (*by_left, *by_right) if part is not None]
