"""Colouring of the columns or rows of a sparsity pattern, so that few products give all nonzeros.

Columns that meet in no row get one colour; the product with the sum of their unit vectors then
holds each nonzero of theirs in a place of its own (Curtis, Powell and Reid, 1974).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from operators.coloured.lattice import periodic_colours, steps_within_rows
from operators.coloured.vertex_order import (
    Flags,
    Graph,
    Integers,
    Order,
    boolean_matrix,
    graph_of,
    in_rounds,
    priorities,
)
from operators.sparse.pattern import Pattern

Kind = Literal["column", "row", "star", "acyclic"]
Method = Literal["auto", "greedy", "lattice"]

# A row of this many nonzeros puts 2^30 edges into the intersection graph.
LONGEST_ROW = 2**15


class ColouringError(ValueError):
    """A colouring does not suit the pattern."""


@dataclass(frozen=True, eq=False)
class Colouring:
    """Colours of the columns, the rows, or the unknowns of a symmetric pattern.

    Parameters
    ----------
    colours
        Colour of each, from 0: int64 of shape ``(n,)``.
    kind
        ``"column"`` or ``"row"``: for a Jacobian by forward or reverse sweeps; ``"star"`` or
        ``"acyclic"``: for a symmetric matrix, directly or by substitution.
    method
        How it was found; for the reader.

    Raises
    ------
    ValueError
        A negative colour, or no such kind.
    TypeError
        `colours` is not an int64 tensor ``(n,)``.
    """

    colours: Tensor
    kind: Kind
    method: str = "given"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r}; expected one of {get_args(Kind)}")
        colours = self.colours
        if not isinstance(colours, Tensor) or colours.dtype != torch.int64 or colours.ndim != 1:
            raise TypeError(f"colours is {_describe(colours)}; expected an int64 tensor (n,)")
        if len(colours) and int(colours.min()) < 0:
            raise ValueError(f"colours has {int(colours.min())} among them; expected colours >= 0")

    @property
    def count(self) -> int:
        """Number of colours: of products that the nonzeros cost."""
        return int(self.colours.max()) + 1 if len(self.colours) else 0

    def __repr__(self) -> str:
        n = len(self.colours)
        return f"Colouring({self.count} colours of {n}, {self.kind}; {self.method})"


def column_colouring(
    pattern: Pattern,
    *,
    order: Order = "largest_first",
    method: Method = "auto",
    grid: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Colouring:
    """Colours of the columns such that two nonzeros of one row never share one.

    Parameters
    ----------
    pattern
        Where the nonzeros are.
    order
        Order of the greedy colouring: see `operators.coloured.vertex_order.priorities`.
    method
        ``"greedy"``: distance-2 colouring of the bipartite graph, first fit in `order`.
        ``"lattice"``: the best periodic colouring of a stencil on `grid`. ``"auto"``: the lattice
        where it meets the lower bound, the longest row; else the better of the two.
    grid
        Points along each axis where the columns are points of a grid in row-major order; by
        default they are points of a line.
    seed
        For the rounds of an order that takes too many: see
        `operators.coloured.vertex_order.in_rounds`.

    Raises
    ------
    ValueError
        No such order or method; a grid of another size; rows too long for an intersection graph;
        ``method="lattice"`` of what is no stencil.

    Notes
    -----
    Greedy colouring forms the pattern of ``A^T A``: ``sum_i nnz(row i)^2`` operations. Any method's
    result is verified before it is returned (`check_colouring`).

    Gebremedhin, Manne and Pothen (2005, SIAM Review 47, doi:10.1137/S0036144504444711), section 3.

    Examples
    --------
    >>> import torch
    >>> i = torch.arange(8)
    >>> rows, columns = torch.cat([i, i[1:], i[:-1]]), torch.cat([i, i[:-1], i[1:]])
    >>> column_colouring(Pattern.of(rows, columns, (8, 8))[0])
    Colouring(3 colours of 8, column; periodic)
    """
    least = int(pattern.row_pointers.diff().max()) if pattern.shape[0] else 0
    n = pattern.shape[1]
    grid = check_grid(grid, n)
    check_method(method)
    if not pattern.nnz:
        return Colouring(
            torch.zeros(n, dtype=torch.int64, device=pattern.device), "column", "empty"
        )
    found: list[tuple[Integers, str]] = []
    if method != "greedy":
        steps = steps_within_rows(pattern, grid)
        if steps is not None:
            periodic = periodic_colours(steps, grid, least, 2 * least + 8)
            found += [(periodic, "periodic")] if periodic is not None else []
        if method == "lattice" and not found:
            raise ValueError(
                f"method='lattice', but the pattern is no stencil on the grid {grid}, or no "
                f"periodic colouring with up to {2 * least + 8} colours suits it; use 'greedy'"
            )
    if least == n:
        found.append((np.arange(n), "a full row: one column a colour"))
    elif method != "lattice" and not (found and _count(found[0][0]) == least):
        if least > LONGEST_ROW:
            raise ValueError(
                f"a row of the pattern has {least} nonzeros, and so many colours are needed; "
                "colour the rows (mode='reverse'), or treat the dense rows apart"
            )
        matrix = boolean_matrix(pattern)
        graph = graph_of((matrix.T.tocsr() @ matrix).tocsr())
        found.append((first_fit(graph, priorities(graph, order), seed), f"greedy, {order}"))
    colours, how = min(found, key=lambda item: _count(item[0]))
    colouring = Colouring(torch.from_numpy(colours).to(pattern.device), "column", how)
    check_colouring(pattern, colouring)
    return colouring


def row_colouring(
    pattern: Pattern,
    *,
    order: Order = "largest_first",
    method: Method = "auto",
    grid: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Colouring:
    """Colours of the rows such that two nonzeros of one column never share one.

    Parameters
    ----------
    pattern, order, method, seed
        As for `column_colouring`.
    grid
        Points along each axis where the rows are points of a grid.

    Raises
    ------
    ValueError
        As `column_colouring` does.
    """
    transposed = column_colouring(
        pattern.transpose()[0], order=order, method=method, grid=grid, seed=seed
    )
    return Colouring(transposed.colours, "row", transposed.method)


def jacobian_colouring(
    pattern: Pattern,
    mode: Literal["auto", "forward", "reverse"] = "auto",
    *,
    order: Order = "largest_first",
    method: Method = "auto",
    grid: tuple[int, ...] | None = None,
    row_grid: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Colouring:
    """Column colouring, row colouring, or the one of fewer sweeps.

    Parameters
    ----------
    pattern, order, method, grid, seed
        As for `column_colouring`.
    mode
        ``"forward"``: columns. ``"reverse"``: rows. ``"auto"``: the fewer colours; columns in a
        tie. The side whose longest row (column) alone exceeds the colours found is not coloured.
    row_grid
        Grid of the rows.

    Raises
    ------
    ValueError
        As `column_colouring` does; no such mode.
    """
    if mode not in ("auto", "forward", "reverse"):
        raise ValueError(f"mode={mode!r}; expected 'auto', 'forward' or 'reverse'")

    def columns() -> Colouring:
        return column_colouring(pattern, order=order, method=method, grid=grid, seed=seed)

    def rows() -> Colouring:
        return row_colouring(pattern, order=order, method=method, grid=row_grid, seed=seed)

    if mode != "auto":
        return columns() if mode == "forward" else rows()
    m, n = pattern.shape
    longest_row = int(pattern.row_pointers.diff().max()) if m else 0
    longest_column = int(torch.bincount(pattern.columns, minlength=n).max()) if n else 0
    if longest_row <= longest_column:
        first = columns()
        return first if first.count <= longest_column else _fewer(first, rows())
    first = rows()
    return first if first.count < longest_row else _fewer(columns(), first)


def check_colouring(pattern: Pattern, colouring: Colouring) -> None:
    """Raise unless the colouring gives every nonzero of the pattern.

    Parameters
    ----------
    pattern
        Where the nonzeros are.
    colouring
        Of the columns or of the rows; `symmetric_colouring.check_symmetric` is for the others.

    Raises
    ------
    ColouringError
        It is of another size, of another kind, or two nonzeros of one row (column) share a colour.

    Notes
    -----
    One pass over the nonzeros.
    """
    if colouring.kind not in ("column", "row"):
        raise ColouringError(f"{colouring!r} is for a symmetric matrix, not for a Jacobian")
    m, n = pattern.shape
    lines, coloured = pattern.rows, pattern.columns
    if colouring.kind == "row":
        m, n, lines, coloured = n, m, coloured, lines
    if len(colouring.colours) != n:
        raise ColouringError(
            f"{colouring!r} has {len(colouring.colours)} {colouring.kind}s, but the pattern {n}"
        )
    count = colouring.count
    keys = lines * count + colouring.colours.to(pattern.device)[coloured]
    if m * count <= 8 * len(keys) + 1024:
        flags = torch.zeros(m * count, dtype=torch.bool, device=pattern.device)
        flags[keys] = True
        distinct = int(flags.sum())
    else:
        distinct = len(torch.unique(keys))
    if distinct != pattern.nnz:
        other = "row" if colouring.kind == "column" else "column"
        raise ColouringError(
            f"{colouring!r} is not valid: {pattern.nnz - distinct} nonzeros share a {other} and a "
            "colour with another"
        )


def first_fit(graph: Graph, priority: Integers, seed: int = 0) -> Integers:
    """Greedy colouring of a graph: the least colour that no neighbour of greater priority has."""
    colours = np.full(graph.size, -1, np.int64)
    most = 0

    def colour(front: Integers) -> Flags:
        nonlocal most
        owner, reached = graph.around(front)
        taken = colours[reached]
        known = taken >= 0
        colours[front] = least_free(owner[known], taken[known], len(front), most)
        most = max(most, int(colours[front].max()) + 1)
        return np.ones(len(front), bool)

    in_rounds(graph, priority, colour, seed)
    return colours


def least_free(owner: Integers, taken: Integers, count: int, most: int) -> Integers:
    """Least of the colours 0..most that are not taken, for each of `count` owners."""
    free = np.empty(count, np.int64)
    # A block of owners at a time keeps the table of flags small.
    block = max(1, 2**26 // (most + 1))
    if count <= block:
        return _least_free(owner, taken, count, most)
    bounds = np.searchsorted(owner, np.arange(0, count + block, block))
    for i, start in enumerate(range(0, count, block)):
        part = slice(bounds[i], bounds[i + 1])
        size = min(block, count - start)
        free[start : start + size] = _least_free(owner[part] - start, taken[part], size, most)
    return free


def _least_free(owner: Integers, taken: Integers, count: int, most: int) -> Integers:
    forbidden = np.zeros((count, most + 1), bool)
    forbidden[owner, taken] = True
    return forbidden.argmin(axis=1)


def check_grid(grid: tuple[int, ...] | None, n: int) -> tuple[int, ...]:
    """The grid without axes of one point; a line by default."""
    if grid is None:
        return (n,)
    if prod(grid) != n:
        raise ValueError(f"grid={grid} has {prod(grid)} points; expected {n}")
    return tuple(points for points in grid if points > 1) or (n,)


def check_method(method: str) -> None:
    """Raise unless it is one of `Method`."""
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}; expected one of {get_args(Method)}")


def _count(colours: Integers) -> int:
    return int(colours.max()) + 1


def _fewer(columns: Colouring, rows: Colouring) -> Colouring:
    return rows if rows.count < columns.count else columns


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
