"""Star and acyclic colouring of a symmetric pattern: fewer products than for a Jacobian.

Any two colours of a proper colouring induce a bipartite graph. Where each of them is a forest, the
nonzeros follow from the compressed matrix by substitution (acyclic colouring, Coleman and Cai,
1986); where each tree is a star they stand in it as they are (star colouring, Coleman and More,
1984).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from scipy.sparse import csgraph

from operators.coloured.bicoloured_greedy import Forests, Stars
from operators.coloured.colouring import (
    Colouring,
    ColouringError,
    Method,
    check_grid,
    check_method,
)
from operators.coloured.lattice import cosets, periodic_colours, steps_within_rows
from operators.coloured.vertex_order import (
    Integers,
    Order,
    boolean_matrix,
    graph_of,
    in_rounds,
    priorities,
)
from operators.sparse.pattern import Pattern

# A stencil that reaches farther is left to greedy colouring: acyclic periods are tried on a window.
FARTHEST = 4


class TwoColoured(NamedTuple):
    """The graph of all pairs of colours: node (u, b) is vertex u among the colours {c(u), b}."""

    rows: Integers  # every off-diagonal nonzero (u, v), by rows
    columns: Integers
    vertex: Integers  # u of each node
    partner: Integers  # b of each node
    head: Integers  # node (u, c(v)) of each nonzero
    tail: Integers  # node (v, c(u))
    degree: Integers  # of each node: neighbours of u that are coloured b


def two_coloured(pattern: Pattern, colours: Integers) -> TwoColoured:
    """Nodes and edges; an edge is there twice, as a nonzero and as its mirror."""
    rows, columns = pattern.rows.cpu().numpy(), pattern.columns.cpu().numpy()
    off = rows != columns
    rows, columns = rows[off], columns[off]
    count = int(colours.max()) + 1 if len(colours) else 1
    keys = rows * count + colours[columns]
    if pattern.shape[0] * count <= 8 * len(keys) + 1024:
        degrees = np.bincount(keys, minlength=pattern.shape[0] * count)
        nodes = np.flatnonzero(degrees)
        number = np.cumsum(degrees > 0) - 1
        head, degree = number[keys], degrees[nodes]
        tail = number[columns * count + colours[rows]]
    else:
        nodes, head, degree = np.unique(keys, return_inverse=True, return_counts=True)
        tail = np.searchsorted(nodes, columns * count + colours[rows])
    return TwoColoured(rows, columns, nodes // count, nodes % count, head, tail, degree)


def trees(graph: TwoColoured) -> tuple[int, Integers]:
    """Number of components of the two-coloured graphs, and that of each node."""
    size = len(graph.vertex)
    edges = scipy.sparse.coo_array(
        (np.ones(len(graph.head), bool), (graph.head, graph.tail)), (size, size)
    )
    number, label = csgraph.connected_components(edges.tocsr(), directed=False)
    return number, label.astype(np.int64)


def check_symmetric(pattern: Pattern, colouring: Colouring) -> TwoColoured:
    """Raise unless the colouring gives every nonzero of a symmetric pattern.

    Parameters
    ----------
    pattern
        Symmetric pattern.
    colouring
        ``"star"`` or ``"acyclic"``.

    Returns
    -------
    TwoColoured
        What recovery is planned on.

    Raises
    ------
    ColouringError
        Two neighbours share a colour; or a path of four vertices has two colours (star), or a
        cycle (acyclic); or the kind is another.
    ValueError
        The pattern is not symmetric, or of another size.

    Notes
    -----
    A two-coloured path of four vertices has an inner edge whose ends both have degree two or more;
    a graph is a forest if and only if edges = nodes - components. One pass over the nonzeros.
    """
    if colouring.kind not in ("star", "acyclic"):
        raise ColouringError(f"{colouring!r} is for a Jacobian, not for a symmetric matrix")
    require_symmetric(pattern)
    colours = colouring.colours.cpu().numpy()
    if len(colours) != pattern.shape[0]:
        raise ColouringError(f"{colouring!r} has {len(colours)} vertices, but {pattern}")
    graph = two_coloured(pattern, colours)
    clashes = np.count_nonzero(colours[graph.rows] == colours[graph.columns])
    if clashes:
        raise ColouringError(
            f"{colouring!r} is not valid: {clashes // 2} pairs of neighbours share a colour"
        )
    if colouring.kind == "star":
        inner = (graph.degree[graph.head] > 1) & (graph.degree[graph.tail] > 1)
        if inner.any():
            raise ColouringError(
                f"{colouring!r} is not valid: {np.count_nonzero(inner) // 2} edges are in the "
                "middle of a path of four vertices with two colours"
            )
    else:
        spare = len(graph.head) // 2 - (len(graph.vertex) - trees(graph)[0])
        if spare:
            raise ColouringError(
                f"{colouring!r} is not valid: {spare} edges close a cycle with two colours"
            )
    return graph


def require_symmetric(pattern: Pattern) -> None:
    """Raise unless the mirror of every nonzero is one."""
    if pattern.shape[0] != pattern.shape[1] or not pattern.symmetric:
        raise ValueError(
            f"{pattern} is not symmetric; unite it with its transpose, or colour it as a Jacobian"
        )


def symmetric_colouring(
    pattern: Pattern,
    kind: Literal["star", "acyclic"] = "star",
    *,
    order: Order = "largest_first",
    method: Method = "auto",
    grid: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Colouring:
    """Star or acyclic colouring of the adjacency graph of a symmetric pattern.

    Parameters
    ----------
    pattern
        Symmetric pattern; the diagonal may or may not be in it.
    kind
        ``"star"``: every path of four vertices has three colours or more; nonzeros are read off.
        ``"acyclic"``: every cycle has three colours or more; fewer colours, nonzeros by
        substitution, whose rounding errors grow with the depth of the trees.
    order, method, grid, seed
        As for `column_colouring`; ``"auto"`` takes a periodic colouring where a stencil (a
        pattern most of whose rows are full) has one with no more colours than the longest row, else
        the better of both.

    Raises
    ------
    ValueError
        The pattern is not symmetric; no such kind, order or method.

    Notes
    -----
    Greedy: first fit in `order`, exact as to the definition (Gebremedhin, Tarafdar, Manne and
    Pothen, 2007, SIAM J. Sci. Comput. 29, doi:10.1137/050639879, algorithms 4.1 and 5.1), in
    rounds: vertices that are not adjacent are coloured together, and where two of them complete a
    forbidden path or cycle, all but the first in the order are coloured again in a later round.

    Examples
    --------
    >>> import torch
    >>> i = torch.arange(7)  # an arrow: one full row and column
    >>> zero = torch.zeros_like(i)
    >>> arrow = Pattern.of(torch.cat([i, i, zero]), torch.cat([i, zero, i]), (7, 7))[0]
    >>> symmetric_colouring(arrow, "star")
    Colouring(2 colours of 7, star; greedy, largest_first)
    """
    if kind not in ("star", "acyclic"):
        raise ValueError(f"kind={kind!r}; expected 'star' or 'acyclic'")
    require_symmetric(pattern)
    check_method(method)
    grid = check_grid(grid, pattern.shape[0])
    longest = int(pattern.row_pointers.diff().max()) + 1 if pattern.shape[0] else 0
    found: list[tuple[Integers, str]] = []
    if method != "greedy" and pattern.nnz:
        periodic = _periodic(pattern, kind, grid, longest)
        found += [(periodic, "periodic")] if periodic is not None else []
        if method == "lattice" and not found:
            raise ValueError(
                f"method='lattice', but the pattern is no stencil on the grid {grid}, or no "
                "periodic colouring with few colours suits it; use 'greedy'"
            )
    # No lower bound is cheap; where most rows are full the pattern is a stencil indeed.
    regular = 2 * pattern.nnz >= pattern.shape[0] * longest
    if not found or (method == "auto" and (not regular or int(found[0][0].max()) >= longest)):
        graph = graph_of(boolean_matrix(pattern))
        state = (Stars if kind == "star" else Forests)(graph, priorities(graph, order))
        in_rounds(graph, state.priority, state.colour, seed)
        found.append((state.colours, f"greedy, {order}"))
    colours, how = min(found, key=lambda item: int(item[0].max(initial=0)))
    colouring = Colouring(torch.from_numpy(colours).to(pattern.device), kind, how)
    # A periodic acyclic colouring has been tried already, or it would not be here.
    if kind == "star" or how != "periodic":
        check_symmetric(pattern, colouring)
    return colouring


def _periodic(pattern: Pattern, kind: str, grid: tuple[int, ...], longest: int) -> Integers | None:
    """Colouring by cosets, verified on the pattern; None where there is none.

    For a star colouring no two steps of the stencil may differ by a step of the lattice, so that
    it is a distance-2 colouring; for an acyclic one a period of the grid is tried.
    """
    if kind == "star":
        # Neighbours need two colours also where the diagonal is not stored.
        steps = steps_within_rows(pattern.with_diagonal()[0], grid)
        if steps is None:
            return None
        return periodic_colours(steps, grid, 1, 2 * longest + 8)
    rows, columns = pattern.rows.cpu().numpy(), pattern.columns.cpu().numpy()
    off = rows != columns
    ends = (np.stack(np.unravel_index(x[off], grid), 1) for x in (rows, columns))
    jumps = np.subtract(*ends)
    if not len(jumps) or np.abs(jumps).max() > FARTHEST:
        return None
    strides = np.cumprod([1, *[2 * points - 1 for points in grid[:0:-1]]])[::-1]
    jumps = jumps[np.unique(jumps @ strides, return_index=True)[1]]
    reach = 4 * int(np.abs(jumps).max())

    def forest(basis: NDArray[np.int64]) -> bool:
        window = tuple(min(points, reach + int(basis.diagonal().max()) * 2) for points in grid)
        box = _box(jumps, window)
        points = np.indices(window).reshape(len(window), -1).T
        colours = Colouring(torch.from_numpy(cosets(points, basis)), "acyclic")
        return _valid(box, colours)

    periodic = periodic_colours(jumps, grid, 2, longest, forest)
    if periodic is None or not _valid(pattern, Colouring(torch.from_numpy(periodic), "acyclic")):
        return None
    return periodic


def _box(jumps: Integers, window: tuple[int, ...]) -> Pattern:
    """Pattern of the stencil on a small grid."""
    points = np.indices(window).reshape(len(window), -1).T
    rows, columns = [], []
    for jump in np.unique(np.concatenate([jumps, -jumps]), axis=0):
        there = points + jump
        inside = ((there >= 0) & (there < window)).all(axis=1)
        rows.append(np.flatnonzero(inside))
        columns.append(np.ravel_multi_index(tuple(there[inside].T), window))
    row, column = torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(columns))
    return Pattern.of(row, column, (len(points), len(points)))[0]


def _valid(pattern: Pattern, colouring: Colouring) -> bool:
    try:
        check_symmetric(pattern, colouring)
    except ColouringError:
        return False
    return True
