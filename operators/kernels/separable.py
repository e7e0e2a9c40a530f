"""Polynomials in derivatives of ``E = prod_i e_i(x_i - y_i)``, at all pairs of points.

Since E depends on x - y, ``d_y = -d_x``: functionals of both arguments that are polynomials ``sum_a
p_a(x) d_x^a`` and ``sum_b q_b(y) d_y^b`` make a sum over c = a + b of a matrix of low rank times
``d^c E = prod_i h_{i, c_i} E``, where the tables ``h_{i, n} = e_i^(n) / e_i`` are those of one
coordinate each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# How often each coordinate is differentiated.
Powers = tuple[int, ...]
# Those of both functionals.
Spec = tuple[tuple[Powers, ...], tuple[Powers, ...]]
# For each derivative: the columns and rows whose outer products add up to its coefficient.
Groups = dict[Powers, tuple[list[Tensor], list[Tensor]]]
# For each coordinate: h_0 (None, for ones), h_1, h_2, ...
Tables = Sequence[Sequence[Tensor | None]]


def degrees(spec: Spec) -> list[int]:
    """How often each coordinate is differentiated at most, by both."""
    left, right = spec
    return [max(a[i] for a in left) + max(b[i] for b in right) for i in range(len(left[0]))]


def grouped(spec: Spec, p: Sequence[Tensor], q: Sequence[Tensor]) -> Groups:
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


def coefficients(groups: Groups) -> dict[Powers, Tensor]:
    """Each sum of outer products: one product of thin matrices."""
    return {
        powers: torch.stack(columns, -1) @ torch.stack(rows, -2)
        for powers, (columns, rows) in groups.items()
    }


def contracted(groups: Groups, tables: Tables) -> Tensor:
    """``sum_c C_c prod_i h_{c_i}``."""
    return summed(coefficients(groups), tables, (0,) * len(tables))


def summed(blocks: Mapping[Powers, Tensor], tables: Tables, shift: Powers) -> Tensor:
    """``sum_c C_c prod_i h_{c_i + shift_i}``, nested over the coordinates."""
    if not tables:
        (only,) = blocks.values()
        return only
    inner: dict[int, dict[Powers, Tensor]] = {}
    for powers, block in blocks.items():
        inner.setdefault(powers[-1], {})[powers[:-1]] = block
    total: Tensor | None = None
    for n, rest in inner.items():
        block, h = summed(rest, tables[:-1], shift[:-1]), tables[-1][n + shift[-1]]
        if h is not None and total is not None:
            total = torch.addcmul(total, block, h)
        else:
            term = block if h is None else block * h
            total = term if total is None else total + term
    assert total is not None
    return total


def unit(d: int, axis: int, order: int) -> Powers:
    """One coordinate so many times."""
    return tuple(order if i == axis else 0 for i in range(d))


def by_terms(
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
