"""Periodic colourings of stencils: the cosets of a sublattice of the grid as colours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray

from operators.coloured.vertex_order import Integers
from operators.sparse.pattern import Pattern

# Beyond these a pattern is no stencil, or the search is longer than a greedy colouring.
MOST_STEPS = 4096
MOST_LATTICES = 20_000


def steps_within_rows(pattern: Pattern, grid: tuple[int, ...]) -> Integers | None:
    """Differences between any two columns of one row, as steps on the grid of the columns.

    Parameters
    ----------
    pattern
        The pattern; its columns are the points of `grid` in row-major order.
    grid
        Points along each axis.

    Returns
    -------
    ndarray or None
        Steps ``(k, d)``, one of each pair ``+-d``; None where there are too many for a stencil.

    Notes
    -----
    One pass over the nonzeros for each place in the longest row.
    """
    longest = int(pattern.row_pointers.diff().max()) if pattern.shape[0] else 0
    if longest**2 > MOST_STEPS:
        return None
    columns = pattern.columns.cpu().numpy()
    rows = pattern.rows.cpu().numpy()
    # A step is told from every other on a grid twice as wide.
    wide = [2 * points - 1 for points in grid]
    strides = np.cumprod([1, *wide[:0:-1]])[::-1]
    places = sum(
        axis * stride for axis, stride in zip(np.unravel_index(columns, grid), strides, strict=True)
    )
    seen = np.zeros(prod(wide), bool)
    origin = int(sum((points - 1) * stride for points, stride in zip(grid, strides, strict=True)))
    for apart in range(1, longest):
        together = rows[apart:] == rows[:-apart]
        seen[(places[apart:] - places[:-apart])[together] + origin] = True
        if np.count_nonzero(seen) > MOST_STEPS:
            return None
    found = np.unravel_index(np.flatnonzero(seen), wide)
    return np.stack([axis - points + 1 for axis, points in zip(found, grid, strict=True)], 1)


def sublattices(index: int, dimension: int) -> Iterator[Integers]:
    """Every sublattice of ``Z^dimension`` with `index` cosets, by its Hermite normal form."""
    divisors = [i for i in range(1, index + 1) if index % i == 0]
    for diagonal in product(divisors, repeat=dimension):
        if prod(diagonal) != index:
            continue
        below = [range(diagonal[j]) for i in range(dimension) for j in range(i)]
        for entries in product(*below):
            basis = np.diag(np.array(diagonal, np.int64))
            basis[np.tril_indices(dimension, -1)] = entries
            yield basis


def cosets(points: Integers, basis: Integers) -> Integers:
    """Number of the coset that each point ``(k, d)`` is in; that of the lattice itself is 0."""
    remainder = points.copy()
    number = np.zeros(len(points), np.int64)
    for i in reversed(range(len(basis))):
        quotient = remainder[:, i] // basis[i, i]
        remainder -= quotient[:, None] * basis[i]
        number = number * basis[i, i] + remainder[:, i]
    return number


def periodic_colours(
    steps: Integers,
    grid: tuple[int, ...],
    least: int,
    most: int,
    suits: Callable[[NDArray[np.int64]], bool] | None = None,
) -> Integers | None:
    """Colouring of the grid by cosets of the largest sublattice that holds none of the steps.

    Parameters
    ----------
    steps
        Steps ``(k, d)`` that must lead to another colour.
    grid
        Points along each axis.
    least, most
        Numbers of colours to try.
    suits
        Further condition on a lattice, given by its basis.

    Returns
    -------
    ndarray or None
        Colour of each point, in row-major order; None where no lattice with few enough cosets
        does, or there are more than 20 000 to try.

    Notes
    -----
    The search is exact: no periodic colouring (with the colours a group) takes fewer. A five-point
    stencil gets 5 colours, a seven-point one in space 7, a full 3 x 3 one 9.
    """
    tried = 0
    for count in range(least, most + 1):
        for basis in sublattices(count, len(grid)):
            tried += 1
            if tried > MOST_LATTICES:
                return None
            if (cosets(steps, basis) > 0).all() and (suits is None or suits(basis)):
                points = np.indices(grid).reshape(len(grid), -1).T
                return cosets(points, basis)
    return None
