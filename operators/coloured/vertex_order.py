"""Orders in which greedy colouring takes the vertices of a graph, and its rounds.

A greedy colouring in a given order is the same if vertices that wait for no neighbour are coloured
together (Jones and Plassmann, 1993): each round is one pass of array operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse import csgraph

from operators.sparse.pattern import Pattern

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Order = Literal["natural", "largest_first", "smallest_last", "incidence_degree"]


class Graph(NamedTuple):
    """Symmetric adjacency without loops, in CSR form."""

    pointers: Integers
    indices: NDArray[np.int32]

    @property
    def size(self) -> int:
        """Number of vertices."""
        return len(self.pointers) - 1

    @property
    def degrees(self) -> Integers:
        """Number of neighbours of each vertex."""
        return np.diff(self.pointers)

    def around(self, vertices: Integers) -> tuple[Integers, Integers]:
        """All edges at `vertices`: position of the vertex in the list, and the neighbour."""
        starts = self.pointers[vertices]
        counts = self.pointers[vertices + 1] - starts
        owner = np.repeat(np.arange(len(vertices)), counts)
        first = np.cumsum(counts) - counts
        edges = np.arange(len(owner)) + (starts - first)[owner]
        return owner, self.indices[edges].astype(np.int64)


def boolean_matrix(pattern: Pattern) -> scipy.sparse.csr_array:
    """The pattern as scipy's matrix of ones."""
    columns = pattern.columns.cpu().numpy()
    pointers = pattern.row_pointers.cpu().numpy()
    if max(*pattern.shape, pattern.nnz) < 2**31:
        columns, pointers = columns.astype(np.int32), pointers.astype(np.int32)
    return scipy.sparse.csr_array((np.ones(len(columns), bool), columns, pointers), pattern.shape)


def graph_of(matrix: scipy.sparse.csr_array) -> Graph:
    """Graph of a symmetric matrix of ones; its diagonal is left out."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    off = rows != matrix.indices
    lengths = np.bincount(rows[off], minlength=matrix.shape[0])
    pointers = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Graph(pointers, matrix.indices[off])


def patience(size: int) -> int:
    """Rounds that a graph of `size` vertices gets before its order is given up.

    A grid of n points needs O(sqrt n) rounds in any of the orders; a chain would need n.
    """
    return 1000 + 5 * int(size**0.5)


def priorities(graph: Graph, order: Order) -> Integers:
    """Rank of each vertex in `order`; the greatest is coloured first.

    Parameters
    ----------
    graph
        The graph.
    order
        ``"natural"``: as numbered. ``"largest_first"``: by falling degree (Welsh and Powell, 1967).
        ``"smallest_last"``: last the vertex of the least degree, and so on in what remains (Matula
        and Beck, 1983); greedy colouring then takes no more than degeneracy + 1 colours.
        ``"incidence_degree"``: next the vertex with most neighbours before it (Coleman and More,
        1983). Ties go by number.

    Raises
    ------
    ValueError
        No such order.

    Notes
    -----
    The last two orders are sequential by nature. Here all vertices that tie are taken at once
    (which leaves the bound of smallest-last as it is). Should the ties be few and the rounds many,
    as along a chain, the rest follows in a coarser order: by degree up to 1.5 times the mean of
    what remains (Besta et al., 2020), or by the number of neighbours before.
    """
    if order not in get_args(Order):
        raise ValueError(f"order={order!r}; expected one of {get_args(Order)}")
    if order == "natural":
        return np.arange(graph.size)[::-1].copy()
    if order == "largest_first":
        level = graph.degrees
    elif order == "smallest_last":
        level = _peeling_rounds(graph)
    else:
        level = -_incidence_rounds(graph)
    ranked = np.argsort(level[::-1], kind="stable")
    rank = np.empty(graph.size, np.int64)
    rank[graph.size - 1 - ranked] = np.arange(graph.size)
    return rank


def _peeling_rounds(graph: Graph) -> Integers:
    """Round in which each vertex is taken off, least degree first."""
    degree = graph.degrees.copy()
    round_of = np.full(graph.size, -1, np.int64)
    bound, rounds = -1.0, 0
    front = np.empty(0, np.int64)
    alive = np.arange(graph.size)
    while True:
        if not len(front):
            alive = alive[round_of[alive] < 0]
            if not len(alive):
                return round_of
            patient = rounds < patience(graph.size)
            least = degree[alive].min() if patient else 1.5 * degree[alive].mean()
            bound = max(bound, float(least)) if patient else float(least)
            front = alive[degree[alive] <= bound]
        round_of[front] = rounds
        rounds += 1
        touched = graph.around(front)[1]
        touched = touched[round_of[touched] < 0]
        np.subtract.at(degree, touched, 1)
        front = np.unique(touched[degree[touched] <= bound])
        if rounds >= patience(graph.size):
            front = front[:0]


def _incidence_rounds(graph: Graph) -> Integers:
    """Round in which each vertex comes next, most neighbours before it first."""
    size, degree = graph.size, graph.degrees
    round_of = np.full(size, -1, np.int64)
    before = np.zeros(size, np.int64)
    # One vertex of the largest degree in every component begins.
    held = np.ones(len(graph.indices), bool)
    adjacency = scipy.sparse.csr_array((held, graph.indices, graph.pointers), (size, size))
    label = csgraph.connected_components(adjacency, directed=False)[1]
    ranked = np.lexsort((-degree, label))
    front = ranked[np.r_[True, np.diff(label[ranked]) > 0]] if size else ranked
    boundary = np.empty(0, np.int64)
    rounds, work = 0, 0
    while len(front):
        round_of[front] = rounds
        rounds += 1
        touched = graph.around(front)[1]
        touched = touched[round_of[touched] < 0]
        fresh = np.unique(touched[before[touched] == 0])
        np.add.at(before, touched, 1)
        boundary = np.concatenate([boundary[round_of[boundary] < 0], fresh])
        work += len(boundary)
        if rounds >= patience(size) or work > 50 * (size + len(graph.indices)):
            rest = np.flatnonzero(round_of < 0)
            round_of[rest] = rounds + before[rest].max(initial=0) - before[rest]
            break
        most = before[boundary].max(initial=0)
        front = boundary[before[boundary] == most]
    return round_of


def in_rounds(
    graph: Graph, priority: Integers, colour: Callable[[Integers], Flags], seed: int = 0
) -> None:
    """Call ``colour(front)`` on vertices whose neighbours of greater priority are all coloured.

    Vertices of one front are not adjacent. `colour` says which of them it did colour; the others
    come again in the next front, and at least one must succeed.

    Notes
    -----
    Costs O(edges) and some 0.1 ms a round. An order that takes more than `patience` rounds is
    followed so far; the rest comes in random order, in O(log n) rounds.
    """
    coloured = np.zeros(graph.size, bool)
    rounds, limit = 0, patience(graph.size)
    priority = priority.copy()
    owner = np.repeat(np.arange(graph.size), graph.degrees)
    pending = np.bincount(owner[priority[graph.indices] > priority[owner]], minlength=graph.size)
    del owner
    front = np.flatnonzero(pending == 0)
    while len(front):
        kept = colour(front)
        done = front[kept]
        coloured[done] = True
        owner, reached = graph.around(done)
        reached = reached[priority[reached] < priority[done[owner]]]
        np.subtract.at(pending, reached, 1)
        front = np.concatenate([front[~kept], np.unique(reached[pending[reached] == 0])])
        rounds += 1
        if rounds == limit and len(front):
            rest = np.flatnonzero(~coloured)
            priority[rest] = np.random.default_rng(seed).permutation(len(rest))
            owner, reached = graph.around(rest)
            waits = ~coloured[reached] & (priority[reached] > priority[rest[owner]])
            pending[rest] = np.bincount(owner[waits], minlength=len(rest))
            front = rest[pending[rest] == 0]
